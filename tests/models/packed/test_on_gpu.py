"""The real kernels, where there is a GPU: each that is installed is right, and a compiled layer agrees with eager."""

import pytest
import torch

from dpo_ds.models.packed import backends, kernels, segments
from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import segment_table
from tests.models.packed.emulated import segments_of
from tests.models.packed.test_operator import Layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("rule", [ScoreRule(0.1), ScoreRule(0.1, window=64)], ids=["whole", "window"])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(32, 8, 128), (8, 8, 64), (4, 1, 256)])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_kernel(kernel, heads, key_heads, width, rule):
    """By the same trial as the canary's: output and gradients, copied and merged, within 2 % of float32."""
    if kernel not in backends._candidates(CUDA, torch.bfloat16, width, width, False):
        pytest.skip("not for this GPU")
    try:
        installed = kernels.is_installed(kernel)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        pytest.skip(f"cannot be imported: {error}")
    if not installed:
        pytest.skip("not installed")
    assert backends._trial(kernel, CUDA, torch.bfloat16, heads, key_heads, width, rule) is None


@pytest.mark.parametrize("merged", [True, False])
def test_a_compiled_layer_agrees_with_eager(merged, monkeypatch):
    monkeypatch.setattr(segments, "is_merged", lambda segment: merged)
    segments.forget_tables()
    torch._dynamo.reset()
    table = segment_table(segments_of((150, 60, 200), (3, 130, 1)))
    layer = Layer().to(CUDA, torch.bfloat16)
    hidden = torch.randn(1, table.length, 16, device=CUDA, dtype=torch.bfloat16)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=True)):
        output = run(hidden, segments=table)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))])
    segments.forget_tables()
    for compiled, eager in zip(*reversed(results), strict=True):
        assert (compiled - eager).float().norm() <= 0.02 * eager.float().norm()
