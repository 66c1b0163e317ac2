"""What kind of model a folder holds is told from its config, before anything is loaded."""

import pytest
from transformers import AutoModelForSequenceClassification

from dpo_ds.config import ModelSection
from dpo_ds.demo.tiny import tiny_config
from dpo_ds.errors import ModelError
from dpo_ds.models.loading import check_model


def test_a_reward_model_is_no_language_model(tmp_path):
    config = tiny_config("gpt2", 64, hidden=16)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    with pytest.raises(ModelError, match="is a GPT2ForSequenceClassification, as dpo-ds reward makes them"):
        check_model(section, section.path)
    assert check_model(section, section.path, classifier=True).num_labels == 1
