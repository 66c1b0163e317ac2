"""An adapter's folder named as a model: merged with its base as peft merges them, for every command, or its line."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpo_ds.config import ModelSection
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer
from dpo_ds.errors import ModelError
from dpo_ds.models.fingerprint import model_digest
from dpo_ds.models.loading import check_model, load_causal_lm, load_tokenizer

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and in `adapter` what peft saves of it: rank 4 but 2 in the second layer, B not zero."""
    folder = tmp_path_factory.mktemp("adapters")
    rows = list(preference_rows(30, seed=1))
    write_jsonl(folder / "pairs.jsonl", rows)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    save_tiny_model(folder / "base", tokenizer, model := tiny_llama(tokenizer, hidden=32, layers=2))
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", rank_pattern={r"layers\.1\..*": 2}, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder / "adapter")
    return folder, adapted.eval()


@pytest.fixture(autouse=True)
def _own_cache(world, monkeypatch):
    monkeypatch.setenv("DPO_DS_CACHE", str(world[0] / "cache"))


def test_the_merged_model_is_pefts(world, capsys):
    """Twice: the second time nothing is merged. A changed adapter is another model."""
    folder, adapted = world
    section = ModelSection(path=str(folder / "adapter"))
    for lines in (1, 0):
        config = check_model(section, section.path)
        assert capsys.readouterr().out.count(f"adapter: an adapter of {folder / 'base'}; merged into") == lines
    assert load_tokenizer(section, config, section.path).eos_token_id == 1
    with torch.no_grad():
        ours = load_causal_lm(section, {"bf16": {"enabled": False}})(IDS).logits
        theirs = adapted(IDS).logits
        with adapted.disable_adapter():
            base = adapted(IDS).logits
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - base).abs().max()
    before = model_digest(section.path, config)
    shutil.copytree(folder / "adapter", folder / "other")
    described = json.loads((folder / "other/adapter_config.json").read_text())
    (folder / "other/adapter_config.json").write_text(json.dumps(described | {"lora_alpha": 13}))
    check_model(section, str(folder / "other"))
    assert model_digest(str(folder / "other"), config) != before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, ["its base /nowhere/base is not there", "adapter_config.json"]),
        ({"base_model_name_or_path": None}, ["names no base_model_name_or_path"]),
        ({"task_type": "SEQ_CLS"}, ["task_type 'SEQ_CLS'", "CAUSAL_LM"]),
        ({"target_modules": ["no_such_layer"]}, ["cannot be merged", "no_such_layer"]),
        ({"no weights": True}, ["without its weights (adapter_model.safetensors)"]),
        ({"lora": True}, ["model.lora.r", "merge_and_unload"]),
    ],
)
def test_mistakes(world, tmp_path, change, parts):
    shutil.copytree(world[0] / "adapter", folder := tmp_path / "adapter")
    described = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(described))
    if "no weights" in change:
        (folder / "adapter_model.safetensors").unlink()
    section = ModelSection(path=str(folder), lora={"r": 4 if "lora" in change else 0})
    with pytest.raises(ModelError) as mistake:
        check_model(section, section.path)
    line = str(mistake.value)
    assert line.startswith(f"--model.path {folder}") and "\n" not in line
    assert [part for part in parts if part not in line] == [], line
