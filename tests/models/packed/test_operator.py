"""The opaque operator under torch.compile: no graph break, one graph for every batch, eager's values and gradients."""

import pytest
import torch
from torch import nn

from dpo_ds.models import attention
from dpo_ds.models.packed import backends, kernels, segments
from dpo_ds.models.packed.operator import packed_attention
from dpo_ds.models.packed.segments import segment_table
from tests.models.packed.emulated import CPU_KERNEL, HEADS, KEY_HEADS, WIDTH, segments_of

PACKS = [
    segments_of((5, 3, 4), (1, 1, 6)),
    segments_of((4, 1, 2)),
    segments_of((2, 9, 0), (7, 1, 3, 2), (3, 3, 3)),
]


@pytest.fixture
def _backend(request, monkeypatch):
    """With "kernel" the same lines run as on a GPU, with merged pairs."""
    if request.param == "kernel":
        monkeypatch.setitem(kernels.KERNELS, "cpu", CPU_KERNEL)
        monkeypatch.setattr(backends, "_candidates", lambda *args: ("cpu",))
        monkeypatch.setattr(segments, "is_merged", lambda segment: segment.prompt >= 4)
    backends.backend_for.cache_clear()
    segments.forget_tables()
    yield
    backends.backend_for.cache_clear()
    segments.forget_tables()


class Layer(nn.Module):
    """A decoder layer's attention: projections around the registered function."""

    def __init__(self, window: int | None = None, softcap: float | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(16, (HEADS + 2 * KEY_HEADS) * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 16)
        self.rule = {"sliding_window": window, "softcap": softcap}

    def forward(self, hidden, **kwargs):
        heads = self.heads(hidden).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        query, key, value = heads.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        rule = {"scaling": 0.3, **self.rule}
        output, _ = attention.packed_attention_forward(self, query, key, value, None, **rule, **kwargs)
        return hidden + self.out(output.flatten(2))


def run(layer, table):
    torch.manual_seed(table.length)
    hidden = torch.randn(1, table.length, 16, requires_grad=True)
    output = layer(hidden, segments=table)
    return [output, *torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()])]


WHOLE, WINDOW, SOFTCAP = {}, {"window": 3}, {"window": 3, "softcap": 0.7}


@pytest.mark.parametrize(
    ("_backend", "rule"),
    [("sdpa", WHOLE), ("sdpa", SOFTCAP), ("kernel", WHOLE), ("kernel", WINDOW)],
    indirect=["_backend"],
)
def test_a_compiled_layer_is_one_graph_for_every_batch(_backend, rule):
    torch._dynamo.reset()
    layer = Layer(**rule)
    compiled = torch.compile(Layer(**rule), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pack in PACKS:
            table = segment_table(pack)
            for actual, expected in zip(run(compiled, table), run(layer, table), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("_backend", ["sdpa", "kernel"], indirect=True)
def test_the_operator_keeps_to_what_it_declares(_backend):
    """Schema, fake shapes and strides, autograd: torch's own checks."""
    table = segment_table(PACKS[0])
    inputs = [torch.randn(table.length, n, WIDTH, requires_grad=True) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    torch.library.opcheck(packed_attention, (*inputs, table.handle, 0.3, None, None))
