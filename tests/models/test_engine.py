"""What deepspeed.initialize raises, as one line; the rest of the engine is tested by what runs on ranks."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_ds.errors import ConfigError
from dpo_ds.models import engine


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
