"""`dpo-ds convert`: files as TRL, LLaMA-Factory and Axolotl take them, made for this test, train a tiny model."""

import json

import pytest
import yaml

from dpo_ds import config
from dpo_ds.commands import cli
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from tests.ranks import ROOT
from tests.small_jobs import make_world, steps

TRL = """
model_name_or_path: {world}/model
dataset_name: {world}/train.jsonl
learning_rate: 1.0e-3
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
gradient_checkpointing: true
logging_steps: 25
eval_strategy: steps
eval_steps: 50
beta: 0.2
loss_type: [sigmoid, hinge]
loss_weights: [1.0, 0.5]
warmup_steps: 0.5
output_dir: {world}/trl
report_to: none
"""
LLAMA_FACTORY = """
model_name_or_path: {world}/model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_alpha: 16
lora_target: q_proj,v_proj
pref_beta: 0.3
pref_loss: simpo
simpo_gamma: 0.4
dataset_dir: {world}/data
dataset: tiny
template: default
cutoff_len: 512
max_samples: 40
output_dir: {world}/factory
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-3
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
plot_loss: true
report_to: none
"""
AXOLOTL = """
base_model: {world}/model
rl: ipo
rl_beta: 0.4
datasets:
  - path: {world}/train.jsonl
    type: chatml.intel
    split: train
sequence_len: 256
sample_packing: false
output_dir: {world}/axolotl
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: constant
learning_rate: 0.001
flash_attention: true
weight_decay: 0.1
save_steps: 7
"""
COPIED = {  # key: value of ours, which the file gives
    "TRL": (TRL, {"train.global_batch_size": 8, "loss.name": ["dpo", "hinge"], "loss.weights": [1.0, 0.5],
                  "train.warmup_ratio": 0.5, "train.eval_every": 50, "train.activation_memory": "checkpoint",
                  "loss.beta": 0.2, "tracking.to": []}),
    "LLaMA-Factory": (LLAMA_FACTORY, {"model.lora.r": 4, "model.lora.target_modules": ["q_proj", "v_proj"],
                                      "loss.name": "simpo", "loss.gamma": 0.4, "data.columns": {"chosen": "better"},
                                      "data.limit": 40, "train.schedule": "cosine", "train.warmup_ratio": 0.1}),
    "Axolotl": (AXOLOTL, {"loss.name": "ipo", "loss.beta": 0.4, "data.max_length": 256, "checkpoint.every": 7,
                          "train.weight_decay": 0.1, "train.schedule": "constant"}),
}  # fmt: skip
TOLD = {
    "TRL": ["logging_steps 25: here: every step is in metrics.jsonl"],
    "LLaMA-Factory": ["template 'default': the tokenizer's own", "bf16 True: here: bf16.enabled of the DeepSpeed JSON"],
    "Axolotl": ["optimizer 'adamw_bnb_8bit': here: AdamW alone", "datasets.type 'chatml.intel': the format is found"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    rows = [{"prompt": r["prompt"], "better": r["chosen"], "rejected": r["rejected"]} for r in preference_rows(50, 1)]
    (world / "data").mkdir()
    write_jsonl(world / "data/tiny.jsonl", rows)
    entry = {"file_name": "tiny.jsonl", "ranking": True, "columns": {"prompt": "prompt", "chosen": "better"}}
    (world / "data/dataset_info.json").write_text(json.dumps({"tiny": entry}))
    return world


@pytest.mark.parametrize("peer", COPIED)
def test_a_translated_file_trains(world, peer, capsys, forks):
    text, copied = COPIED[peer]
    theirs, ours = world / f"{peer}.yaml", world / f"{peer}-ours.yaml"
    theirs.write_text(text.format(world=world))
    assert cli.main(["convert", str(theirs)]) == 0
    said = capsys.readouterr()
    ours.write_text(said.out)
    for part in TOLD[peer]:
        assert part in said.err and part in said.out
    found = config.flatten(config.to_plain(config.load("train", str(ours), {})[0]), depth=3)
    flat = found | {"data.columns": yaml.safe_load(said.out)["data"].get("columns")}
    assert {key: flat[key] for key in copied} == copied
    argv = ["train", "--config", str(ours), "--deepspeed.config", f"{ROOT}/ds_configs/zero3_cpu.json"]
    out = world / f"{peer}-run"
    codes, output = forks.run([*argv, "--train.max_steps", "2", "--output_dir", str(out)], 1, world / f"{peer}.logs")
    assert codes == [0], output
    assert len(steps(out)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1", "a config of none of TRL, LLaMA-Factory and Axolotl"),
        ("{stage: ppo, model_name_or_path: m}", "stage 'ppo': sft, dpo, kto, rm can be translated"),
        ("{base_model: m, rl: grpo}", "rl 'grpo': dpo, ipo, orpo, kto, simpo can be translated"),
        ("{model_name_or_path: m, beta: 0.1, output_dir: o}", "data.train is required"),
        ("{model_name_or_path: m, beta: -1, dataset_name: d, output_dir: o}", "loss.beta: -1 should be"),
    ],
)
def test_what_makes_no_usable_config_is_a_mistake(text, said, tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    assert cli.main(["convert", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_commands_follow_from_the_file(tmp_path, capsys):
    rest = "dataset_name: d, output_dir: o"
    for text, command in (
        (f"{{model_name_or_path: m, packing: true, {rest}}}", "sft"),
        (f"{{model_name_or_path: m, center_rewards_coefficient: 0.01, {rest}}}", "reward"),
        (f"{{model_name_or_path: m, stage: rm, {rest}}}", "reward"),
        (f"{{base_model: m, {rest}}}", "sft"),
    ):
        path = tmp_path / "theirs.yaml"
        path.write_text(text)
        assert cli.main(["convert", "--file", str(path), "--gpus", "4"]) == 0
        assert f"# dpo-ds {command} --config run.yaml" in capsys.readouterr().out
