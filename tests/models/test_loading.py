"""What a model folder or a name must be, told before anything is loaded; what a saved file may be read by."""

import os
import socket
import stat

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dpo_ds.config import ModelSection
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.errors import ModelError
from dpo_ds.models import loading
from dpo_ds.models.loading import check_model, check_no_more, save_tensors


def test_a_reward_model_is_no_language_model(tmp_path):
    config = tiny_config("gpt2", 64, hidden=16)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    with pytest.raises(ModelError, match="is a GPT2ForSequenceClassification, as dpo-ds reward makes them"):
        check_model(section, section.path)
    assert check_model(section, section.path, classifier=True).num_labels == 1


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
