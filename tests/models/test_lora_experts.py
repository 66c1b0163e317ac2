"""LoRA on a mixture of experts: what is trained is what is merged, by peft and by us, in final/ and by export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_ds.config import LoraSection
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, train_tokenizer
from dpo_ds.models import lora
from tests.families import tiny_config_of
from tests.small_jobs import run

pytestmark = pytest.mark.distributed
FAMILIES = ("mixtral", "qwen3_moe", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_is_pefts_own(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config_of(family))
    lora.add_adapters(model, LoraSection(r=4), seed=1)
    for parameter in lora.trained(model).values():
        torch.nn.init.normal_(parameter)
    held, merging = model.state_dict(), lora.Merging(model)
    read = merging.reader(lambda name: held[name].clone())
    ours = {name: read(name) for name in merging.names}
    for module in model.modules():  # peft's merge, from the outermost wrapper inwards
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    theirs = model.state_dict()
    for name, own in merging.names.items():
        torch.testing.assert_close(ours[name], theirs[own], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("experts")
    rows = list(preference_rows(24, seed=4))
    write_jsonl(folder / "train.jsonl", rows)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    config = tiny_config_of("mixtral")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    save_tiny_model(folder / "model", tokenizer, AutoModelForCausalLM.from_config(config))

    def train(out, **settings):
        settings |= {"model__lora__r": 4, "train__learning_rate": 5e-2, "train__max_steps": 2}
        codes, output = run(forks, folder, out, **settings)
        assert codes == [0, 0], output
        return folder / out

    return type("World", (), {"folder": folder, "train": staticmethod(train), "forks": forks})


def logits(model, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer("a text of some words")["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_a_reward_models_final_folder_holds_the_experts_that_were_trained(world):
    """Before, the wrappers' names stayed in it and transformers drew every expert anew."""
    out = world.train("reward", command="reward")
    model, loading = AutoModelForSequenceClassification.from_pretrained(out / "final", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    source = {name.removeprefix("model.") for name in load_file(world.folder / "model/model.safetensors")}
    saved = {name.removeprefix("model.") for name in load_file(out / "final/model.safetensors")}
    assert saved == source - {"lm_head.weight"} | {"score.weight"}
    exported = world.folder / "exported-reward"
    assert world.forks.run(["export", out, "--to", exported], 1, world.folder / "logs")[0] == [0]
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    again = AutoModelForSequenceClassification.from_pretrained(exported)
    torch.testing.assert_close(logits(again, tokenizer), logits(model, tokenizer), atol=1e-5, rtol=1e-5)


def test_adapters_on_experts_alone_train_and_merge(world):
    out = world.train("experts", model__lora__target_modules="[w1, w2, w3]")
    first, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
    base = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    before = logits(base, tokenizer)
    adapted = logits(PeftModel.from_pretrained(base, str(out / "final")), tokenizer)
    assert (adapted - before).abs().max() > 1e-3
    merged = world.folder / "merged"
    assert world.forks.run(["export", out, "--merge", "true", "--to", merged], 1, world.folder / "logs")[0] == [0]
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged), tokenizer), adapted, atol=1e-5, rtol=1e-5
    )
    names = [set(load_file(Path(folder) / "model.safetensors")) for folder in (merged, world.folder / "model")]
    assert names[0] == names[1]
