"""What deepspeed.initialize raises, as one line; the rest of the engine is tested by what runs on ranks."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_ds.cluster import collectives
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.errors import ConfigError, ModelError
from dpo_ds.models import checks, engine
from dpo_ds.models.causal_lm import LogProbModel


def raising(error):
    raise error


@pytest.fixture
def initialize(monkeypatch):
    """Runs the engine's set-up with `call` in place of DeepSpeed's."""
    monkeypatch.setattr(engine, "make_units", lambda *_: "")

    def run(call):
        monkeypatch.setattr(deepspeed, "initialize", lambda **_: call())
        return engine._initialize(SimpleNamespace(causal_lm=None), {"zero_optimization": {}})

    return run


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: raising(TypeError("got an\n  unexpected keyword")), "TypeError: got an unexpected keyword"),
        (lambda: raising(AssertionError()), "AssertionError"),
        (lambda: raising(KeyError("type")), "KeyError: 'type'"),
        (lambda: raising(RuntimeError("Unable to JIT load the async_io op")), "RuntimeError: Unable to JIT load"),
        (lambda: DeepSpeedZeroConfig(stage=3, offload_param="cpu"), "DeepSpeedZeroConfig: offload_param is 'cpu'"),
    ],
)  # fmt: skip
def test_whatever_deepspeed_raises_is_one_line(initialize, call, part, monkeypatch, capsys):
    with pytest.raises(ConfigError) as caught:
        initialize(call)
    assert "DeepSpeed refuses" in str(caught.value) and part in str(caught.value) and "\n" not in str(caught.value)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DPO_DS_VERBOSE", "1")
    with pytest.raises(ConfigError):
        initialize(call)
    assert "Traceback" in capsys.readouterr().err


NOBODYS = {"memory": lambda: raising(torch.OutOfMemoryError("CUDA out of memory")), "peer": torch.distributed.barrier}


@pytest.mark.parametrize("call", NOBODYS.values(), ids=NOBODYS)
def test_what_is_no_mistake_of_the_users_stays_what_it_is(initialize, call):
    with pytest.raises(Exception) as caught:
        initialize(call)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "as its weights model.norm.weight hold such values"),
        (float("inf"), "as its weights model.norm.weight hold such values"),
        (3e38, "though its weights are finite: they overflow in its dtype"),
    ],
)
def test_outputs_that_are_no_numbers_are_the_weights_fault(value, said, monkeypatch):
    """Every logit is a sum of final norm's weight times a number of about 1: beyond 3.4e38 in float32."""
    monkeypatch.setattr(collectives, "gather_objects", lambda own: [own])
    causal_lm = random_model(tiny_config("llama", 64, hidden=16))
    with torch.no_grad():
        causal_lm.model.norm.weight.fill_(value)
        causal_lm.get_output_embeddings().weight.fill_(1.0)
    causal_lm.config._name_or_path = "models/broken"
    with pytest.raises(ModelError, match=f"^models/broken: its own outputs are NaN or infinite, {said}$"):
        checks.check_head(engine.Replica(LogProbModel(causal_lm), torch.device("cpu")))
