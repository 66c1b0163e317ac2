"""From checkpoint to Hugging Face folder: the gathered weights' bits, one output shard in memory at a time."""

import filecmp
import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from dpo_ds.commands import export as command
from dpo_ds.config import ExportConfig, TrainConfig, to_plain
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.errors import ConfigError
from dpo_ds.models import export as module
from dpo_ds.models.export import model_card, write_shards
from tests.small_jobs import make_world, run
from tests.tiny import VOCAB

LIMIT = 20_000  # bytes of an output shard in these tests; the largest weight has 19,200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("export"), hidden=16, layers=2)


@pytest.fixture(scope="module")
def trained(forks, world):
    codes, output = run(forks, world, "trained", train__max_steps=3, checkpoint__every=2)
    assert codes == [0, 0], output
    return world / "trained"


def export(source: Path, to: Path, **keys) -> Path:
    assert command.start(ExportConfig(source=str(source), to=str(to), **keys), LIMIT) == 0
    return to


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.distributed
def test_it_equals_what_the_run_itself_exported_file_by_file(forks, trained, tmp_path):
    """Under a launcher one of the ranks does it."""
    codes, output = forks.run(["export", trained, "--to", tmp_path / "a"], 2, tmp_path / "logs")
    assert codes == [0, 0] and output.count("is now") == 1, output
    names = sorted(path.name for path in (trained / "final").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(names)
    same, different, odd = filecmp.cmpfiles(trained / "final", tmp_path / "a", names, shallow=False)
    assert (sorted(same), different, odd) == (names, [], [])


def test_every_parameter_is_a_sign_of_life(tmp_path, monkeypatch):
    """An export that takes longer than DPO_DS_HANG_SECONDS is no hang."""
    alone = SimpleNamespace(get_rank=lambda: 0, barrier=lambda: None, is_initialized=lambda: False)
    monkeypatch.setattr(module.collectives, "dist", alone)
    for part in ("write_rest", "is_adapted"):
        monkeypatch.setattr(module if part == "write_rest" else module.lora, part, lambda *_: False)
    model, signs = random_model(tiny_config("llama", VOCAB)), []
    model.dropouts = {}
    module.export(model, None, tmp_path / "final", "card", progress=lambda: signs.append(0))
    assert len(signs) == len(dict(model.named_parameters())) == len(all_weights(tmp_path / "final"))


@pytest.mark.distributed
def test_several_files_hold_the_same_bits_and_open_as_a_model(trained, tmp_path):
    folder = export(trained / "checkpoints" / "step-00000003", tmp_path / "b")
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {path.name for path in files} == set(index["weight_map"].values())
    ours, theirs = all_weights(folder), load_file(trained / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys() == index["weight_map"].keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in ours.values())
    assert max(sum(value.nbytes for value in load_file(path).values()) for path in files) <= LIMIT
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(value.equal(theirs[name]) for name, value in model.named_parameters())


@pytest.mark.distributed
def test_bf16_is_rounded_from_fp32_and_an_older_step_is_another_model(trained, tmp_path):
    folder = export(trained, tmp_path / "c", dtype="bf16")
    theirs = load_file(trained / "final" / "model.safetensors")
    ours = all_weights(folder)
    assert all(value.dtype == torch.bfloat16 and value.equal(theirs[name].bfloat16()) for name, value in ours.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    older = all_weights(export(trained / "checkpoints" / "step-00000002", tmp_path / "d"))
    assert all(not older[name].equal(theirs[name]) for name in theirs)


@pytest.mark.distributed
def test_mistakes_are_one_line(trained, tmp_path):
    newest = trained / "checkpoints" / "step-00000003"
    with pytest.raises(ConfigError, match="--to .*: exists already"):
        export(newest, tmp_path)
    with pytest.raises(ConfigError, match="no MANIFEST.json.*name a folder checkpoints/step-"):
        export(tmp_path, tmp_path / "e")
    with pytest.raises(ConfigError, match="--merge: .* has no adapters"):
        export(newest, tmp_path / "e", merge=True)
    copy = tmp_path / "step-00000003"
    shutil.copytree(newest, copy)
    shard = copy / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match="zero_pp_rank_1.* differs from what was written"):
        export(copy, tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.distributed
def test_adapters_alone_or_merged(forks, world, tmp_path):
    from peft import PeftModel

    keys = {"model__lora__r": 4, "reference__kind": "adapter", "train__learning_rate": 1e-2}
    codes, output = run(forks, world, "lora", train__max_steps=3, **keys)
    assert codes == [0, 0], output
    alone = export(world / "lora", tmp_path / "alone")
    final = world / "lora" / "final"
    assert (alone / "adapter_model.safetensors").read_bytes() == (final / "adapter_model.safetensors").read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (alone, final)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    before = {name: value.clone() for name, value in base.named_parameters()}
    expected = PeftModel.from_pretrained(base, alone).merge_and_unload().state_dict()
    merged = all_weights(export(world / "lora", tmp_path / "merged", merge=True))
    assert merged.keys() == before.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    changed = {name for name in merged if not merged[name].equal(before[name])}
    assert changed == {name for name in before if "proj" in name}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generate(**tokenizer("A", return_tensors="pt"), max_new_tokens=2).shape[1] > 1


@pytest.mark.parametrize("trained_with", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_whether_the_models_code_runs_is_said_by_who_exports(trained_with, asked, capsys):
    """A checkpoint's manifest comes from whoever made it, and runs nothing by itself."""
    config = {"model": {"path": "m", "trust_remote_code": trained_with, "attn": "sdpa"}}
    received = SimpleNamespace(path=Path("step-1"), manifest={"config": config})
    section = command._section(received, ExportConfig(source="s", to="t", trust_remote_code=asked))
    assert (section.trust_remote_code, section.path, section.attn) == (asked, "m", "sdpa")
    line = "dpo-ds: m was trained with its own code, which export runs with --trust_remote_code alone\n"
    assert capsys.readouterr().out == (line if trained_with and not asked else "")
    assert not ExportConfig(source="s", to="t").trust_remote_code


HUB_NAMES = ["org/name", "null", "1.5"]


NAMES = ["a: b", "a\nlibrary_name: evil\n---\nb", "[a, b]", "{a: b}", "# a", "'a\"", "*a", "é: ☃", *HUB_NAMES]


@pytest.mark.parametrize("path", NAMES)
def test_a_model_card_opens_with_yaml_whatever_the_names_are(path):
    """The Hub reads what stands between two lines of three dashes, and refuses a base_model that it could not have."""
    settings = {"model": {"path": path}, "data": {"train": path}, "deepspeed": {"config": "c"}, "output_dir": "o"}
    for loss in ("dpo", ["dpo", "hinge"]):
        weights = {"weights": [1, 0.5]} if isinstance(loss, list) else {}
        run = to_plain(TrainConfig.model_validate(settings | {"loss": {"name": loss, **weights}}))
        card = model_card("train", run, {"loss": 0.5}, {"torch": "2"})
        before, front, text = re.split("^---$", card, maxsplit=2, flags=re.MULTILINE)
        assert before == "" and "| loss | 0.5 |" in text
        names = loss if isinstance(loss, list) else [loss]
        base = {"base_model": path} if path in HUB_NAMES else {}
        assert yaml.safe_load(front) == {"library_name": "transformers", **base, "tags": ["dpo_ds", *names]}


def test_never_more_than_one_output_shard_is_held(tmp_path):
    model = random_model(Qwen3MoeConfig(**MOE))
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    held, peak = weakref.WeakSet(), 0

    def read(name):
        nonlocal peak
        tensor = dict(model.named_parameters())[name].detach().clone()
        held.add(tensor)
        peak = max(peak, sum(alive.nbytes for alive in held))
        return tensor

    write_shards(tmp_path, sizes, read, model, limit=5000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert peak <= 5000 < sum(sizes.values()) / 4


MOE = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def test_experts_have_the_names_that_transformers_writes(tmp_path):
    model = random_model(Qwen3MoeConfig(**MOE))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    parameters = dict(model.named_parameters())
    write_shards(
        tmp_path / "ours",
        {name: p.nbytes for name, p in parameters.items()},
        lambda name: parameters[name].detach(),
        model,
    )
    theirs, ours = all_weights(tmp_path / "theirs"), all_weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys() and "model.layers.0.mlp.experts.3.up_proj.weight" in ours
    assert all(ours[name].equal(theirs[name]) for name in theirs)
