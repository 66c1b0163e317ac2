"""The choice of a kernel: by what can be imported, by what it shows on this device, told where it is passed over."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_ds.models import attention
from dpo_ds.models.packed import backends, kernels
from dpo_ds.models.packed.backends import backend_for, refused_backends, try_backends
from dpo_ds.models.packed.kernels import Kernel
from dpo_ds.models.packed.probe import probe_attention
from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import segment_table
from tests.models.packed.emulated import (
    CPU_KERNEL,
    HEADS,
    KEY_HEADS,
    WIDTH,
    cpu_backward,
    cpu_forward,
    fake_cute,
    fake_flash2,
    segments_of,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CUTE, FLASH3, FLASH2 = "flash_attn.cute.interface", "flash_attn_interface", "flash_attn.flash_attn_interface"


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """Nothing that was found out here stays, and no flash attention that is installed is found."""
    caches = (backend_for, kernels.import_package, backends._trial)
    monkeypatch.setattr(backends, "_refused", {})
    for module in ("flash_attn", CUTE, FLASH3, FLASH2):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(kernels.importlib, "import_module", _import)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def _import(name: str):
    """As importlib does where only what lies in sys.modules is installed."""
    if name in sys.modules:
        return sys.modules[name]
    package = name.split(".")[0]
    missing = name if package in sys.modules else package
    raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_only_torch_is_there(hopper):
    assert backend_for(CPU, torch.bfloat16, 64) == "sdpa"
    assert backend_for(CUDA, torch.float32, 64) == "sdpa"
    assert backend_for(CUDA, torch.bfloat16, 64) == "torch-varlen"
    assert backend_for(CUDA, torch.bfloat16, 64, softcap=True) == "sdpa"
    assert backend_for(CUDA, torch.bfloat16, 192, 128) == "sdpa"
    assert backend_for(CUDA, torch.bfloat16, 320) == "sdpa"
    assert backend_for(CUDA, torch.bfloat16, 60) == "sdpa"
    assert refused_backends() == [], "what is not installed is not missed"


def test_before_ampere_nothing_but_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend_for(CUDA, torch.float16, 64) == "sdpa"


def test_the_wheel_of_flash_attn_4_is_no_flash_attn_2(hopper, monkeypatch):
    """It fills the namespace flash_attn/cute and nothing else."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, CUTE, fake_cute())
    assert backend_for(CUDA, torch.bfloat16, 64) == "flash-attn-4"
    assert not kernels.is_installed("flash-attn") and kernels.is_installed("flash-attn-4")


def test_flash_attn_2_serves_soft_caps(hopper, monkeypatch):
    """Where torch's own kernels serve they are as fast, being the same."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, FLASH2, fake_flash2())
    assert backend_for(CUDA, torch.bfloat16, 256, softcap=True) == "flash-attn"
    assert backend_for(CUDA, torch.bfloat16, 64) == "torch-varlen"


def test_flash_attn_3_and_4_want_a_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, CUTE, fake_cute())
    monkeypatch.setitem(sys.modules, FLASH3, SimpleNamespace())
    assert backend_for(CUDA, torch.bfloat16, 64) == "torch-varlen"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend_for.cache_clear()
    assert backend_for(CUDA, torch.bfloat16, 64) == "flash-attn-4"
    monkeypatch.delitem(sys.modules, CUTE)
    backend_for.cache_clear()
    kernels.import_package.cache_clear()
    assert backend_for(CUDA, torch.bfloat16, 64) == "flash-attn-3"


@pytest.mark.parametrize(
    "error",
    [ImportError("undefined symbol: _ZN3c104cuda"), ModuleNotFoundError("No module named 'cutlass'", name="cutlass")],
)
def test_a_package_whose_import_fails_is_told_of(hopper, monkeypatch, error):
    def broken(name):
        if name == CUTE:
            raise error
        return _import(name)

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert backend_for(CUDA, torch.bfloat16, 64) == "torch-varlen"
    assert refused_backends() == [
        f"packed attention: flash-attn-4 cannot serve heads of 64 ({error}); torch-varlen does"
    ]


def test_flash_attn_3_is_activated_by_torchs_registry(monkeypatch):
    active = []
    fake = SimpleNamespace(
        current_flash_attention_impl=lambda: active[-1] if active else None, activate_flash_attention_impl=active.append
    )
    monkeypatch.setattr(kernels, "torch_attention", fake)
    monkeypatch.setattr(kernels, "_torch_forward", lambda *args: args)
    for _ in range(2):
        assert kernels.KERNELS["flash-attn-3"].forward(*range(6)) == (*range(6),)
    assert active == ["FA3"]


# The trial: the CPU kernel stands in for a GPU's.


def _raises(*args):
    raise RuntimeError("no kernel image is available for execution on the device\nCUDA error")


def _wrong_gradients(*args):
    by_query, by_key, by_value = cpu_backward(*args)
    return by_query, by_key * 1.1, by_value


def _without_merging(grad, query, key, value, output, log_sums, blocks, rule, causal):
    """A backward that trusts its own forward alone: right for copied keys, wrong for merged ones."""
    own_output, own_sums = cpu_forward(query, key, value, blocks, rule, causal)
    return cpu_backward(grad, query, key, value, own_output, own_sums, blocks, rule, causal)


def _offer(monkeypatch, *offered: tuple[str, Kernel]):
    for name, kernel in offered:
        monkeypatch.setitem(kernels.KERNELS, name, kernel)
    monkeypatch.setattr(backends, "_candidates", lambda *args: tuple(name for name, _ in offered))


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel(_raises, cpu_backward), "no kernel image is available for execution on the device"),
        (Kernel(cpu_forward, _raises), "no kernel image is available for execution on the device"),
        (Kernel(cpu_forward, _wrong_gradients), "its results are off by 1.0e-01, more than 0.02"),
        (Kernel(cpu_forward, _without_merging), "its results are off by"),
    ],
)
def test_a_kernel_that_fails_gives_way_to_the_next_and_is_told_of(monkeypatch, kernel, reason):
    _offer(monkeypatch, ("first", kernel), ("second", CPU_KERNEL))
    inputs = [torch.randn(1, n, 4, WIDTH) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    assert backends.backend_of(inputs[0], inputs[2], ScoreRule(0.3)) == "first"
    with torch.no_grad():
        try_backends(*inputs, ScoreRule(0.3))
    assert backends.backend_of(inputs[0], inputs[2], ScoreRule(0.3)) == "second"
    (line,) = refused_backends()
    assert line.startswith(f"packed attention: first cannot serve heads of 8 ({reason}")
    assert line.endswith("); second does")


def test_the_canary_settles_the_kernel_and_a_later_call_takes_it(monkeypatch):
    """A failing kernel raises nothing while the canary looks, so that ZeRO-3 gathers and lets go as ever."""
    _offer(monkeypatch, ("first", Kernel(_raises, _raises)))
    table = segment_table(segments_of((2, 3, 1)))
    inputs = [torch.randn(1, n, 6, WIDTH) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    call = lambda: attention.packed_attention_forward(torch.nn.Module(), *inputs, None, segments=table)  # noqa: E731
    with pytest.raises(RuntimeError, match="no kernel image"):  # nobody looks: it is the user's to see
        call()
    with probe_attention() as probe:
        looked = call()[0]
    assert probe.backends == ["sdpa"] and torch.equal(looked, call()[0])
    assert "; sdpa does" in refused_backends()[0]
