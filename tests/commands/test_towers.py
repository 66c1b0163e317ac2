"""A model that also sees: its text is trained, its tower stays, and final/ and export give the source's own names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.data_helpers import tokenizer, write_lines
from tests.families import tiny_config_of
from tests.small_jobs import run

pytestmark = pytest.mark.distributed


def test_final_and_export_are_the_same_bytes_under_the_names_of_the_source(forks, tmp_path):
    torch.manual_seed(0)
    config = tiny_config_of("gemma3")
    config.get_text_config().vocab_size = 300
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(8)]
    write_lines(tmp_path / "train.jsonl", rows)
    settings = {"train__global_batch_size": 4, "train__max_steps": 2, "train__learning_rate": 1e-2}
    codes, output = run(forks, tmp_path, "run", **settings)
    assert codes == [0, 0], output
    assert "multi_modal_projector, vision_tower stay as they are; the text model alone is trained" in output
    assert forks.run(["export", tmp_path / "run", "--to", tmp_path / "e"], 1, tmp_path / "logs")[0] == [0]
    final, exported, source = (tmp_path / name / "model.safetensors" for name in ("run/final", "e", "model"))
    assert final.read_bytes() == exported.read_bytes()
    before, after = load_file(source), load_file(final)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision" in name or "projector" in name for name in moved)
