"""What a model folder or a name must be, told before anything is loaded; what a saved file may be read by."""

import json
import os
import socket
import stat

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dpo_ds.config import ModelSection
from dpo_ds.demo.tiny import random_model, save_tiny_model, tiny_config, train_tokenizer
from dpo_ds.errors import ConfigError, ModelError
from dpo_ds.models import loading
from dpo_ds.models.loading import (
    check_model,
    check_no_more,
    has_table_of_positions,
    load_causal_lm,
    load_tokenizer,
    save_tensors,
)
from tests.families import tiny_config_of


def test_a_reward_model_is_no_language_model(tmp_path):
    config = tiny_config("gpt2", 64, hidden=16)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    with pytest.raises(ModelError, match="is a GPT2ForSequenceClassification, as dpo-ds reward makes them"):
        check_model(section, section.path)
    assert check_model(section, section.path, classifier=True).num_labels == 1


def test_an_attention_that_transformers_lacks_is_told_by_its_key(tmp_path):
    with pytest.raises(ConfigError, match="^--model.attn spda: unknown to transformers; did you mean 'sdpa'\\?$"):
        check_model(ModelSection(path="any", attn="spda"), "any")


def test_a_mistyped_folder_is_told_at_once(tmp_path, monkeypatch):
    """Without a look at the network where the folder around it is there."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", None)
    section = ModelSection(path="models/nope")
    with pytest.raises(ModelError, match="--model.path models/nope: does not exist, though the folder models does"):
        check_model(section, section.path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_asked_is_told_at_once(monkeypatch, offline):
    def unreachable(address, timeout):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    section = ModelSection(path="nobody/nothing")
    why = "HF_HUB_OFFLINE is set" if offline else "huggingface.co cannot be reached: Name or service not known"
    with pytest.raises(ModelError, match=rf"nobody/nothing: no such folder, and the .*Hub cannot be asked \({why}\)"):
        check_model(section, section.path)


def test_weights_of_layers_that_the_config_does_not_have_are_refused():
    """The head of a language model that becomes a classifier, or a tower of another sense, is not a layer too many."""
    model = random_model(tiny_config("llama", 64, hidden=16, layers=1))
    check_no_more("m", model, {"lm_head.weight", "vision_tower.layers.7.weight", "model.layers.0.extra.weight"})
    with pytest.raises(ModelError, match="m: holds model.layers.1.mlp.up_proj.weight, but .* says 1 model.layers"):
        check_no_more("m", model, {"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(ModelError, match="holds layers.1.mlp.up_proj.weight"):  # of a file without the head
        check_no_more("m", model, {"layers.1.mlp.up_proj.weight"})


def test_a_broken_generation_config_is_refused(tmp_path):
    """transformers goes on without it, and answers no longer end where the model's own do."""
    random_model(tiny_config("llama", 64, hidden=16)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    section = ModelSection(path=str(tmp_path))
    with pytest.raises(ModelError, match="generation_config.json: not JSON; mend it or delete it"):
        check_model(section, section.path)


def test_a_saved_file_may_be_read_by_whoever_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


MISTAKES = {  # file -> what is written there, and what the line says beside the folder's name
    "an activation": ("config.json", {"hidden_act": "gelly"}, "cannot be loaded: KeyError: 'gelly'"),
    "no heads": ("config.json", {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": None}, "ZeroDivision"),
    "other shapes": ("config.json", {"intermediate_size": 7}, "weights of other shapes than its config"),
    "an index": ("model.safetensors.index.json", {"weight_map": 3}, "no index of weights: AttributeError"),
    "a number": ("config.json", {"vocab_size": "many"}, "no usable model config: "),
    "a kind": ("tokenizer.json", {"model": {"type": "abacus"}}, "no usable tokenizer: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_whatever_transformers_raises_is_one_line(name, tmp_path, monkeypatch, capsys):
    """Also what no list of exceptions would name; DPO_DS_VERBOSE shows where."""
    file, change, said = MISTAKES[name]
    save_tiny_model(tmp_path, train_tokenizer(["a few words"], 300), tiny_config("llama", 300, hidden=16))
    random_model(tiny_config("llama", 300, hidden=16)).save_pretrained(tmp_path)
    given = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(given | change))
    section = ModelSection(path=str(tmp_path))

    def load():
        with pytest.raises(ModelError) as caught:
            load_tokenizer(section, check_model(section, section.path), section.path)
            load_causal_lm(section, {"bf16": {"enabled": False}})
        return str(caught.value)

    line = load()
    assert str(tmp_path) in line and said in line and "\n" not in line, line
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DPO_DS_VERBOSE", "1")
    load()
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_for_deepspeed_is_not_called_the_models(tmp_path):
    """transformers reads the configuration while it loads weights, and there pydantic's error is a ValueError."""
    random_model(tiny_config("llama", 64, hidden=16)).save_pretrained(tmp_path)
    engine = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 3, "offload_param": "cpu"}}
    with pytest.raises(ConfigError, match="DeepSpeed refuses deepspeed.config: .*offload_param is 'cpu'") as caught:
        load_causal_lm(ModelSection(path=str(tmp_path)), engine)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "looks_up"),
    [("gpt2", True), ("openai-gpt", True), ("opt", True), ("gpt_neo", True), ("biogpt", True), ("gpt_bigcode", True),
     ("llama", False), ("gpt_neox", False), ("gemma3_text", False), ("bloom", False), ("mixtral", False)],
)  # fmt: skip
def test_a_table_of_positions_is_told_from_positions_that_are_computed(family, looks_up):
    assert has_table_of_positions(tiny_config_of(family)) == looks_up
