"""The Triton kernels against the float64 oracle: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton is imported
triton = pytest.importorskip("triton")

from dpo_ds.logprobs import token_logps, token_statistics  # noqa: E402
from dpo_ds.logprobs import triton as backend  # noqa: E402

TOO_LATE = DEVICE == "cpu" and type(triton.language.cdiv).__name__ != "InterpretedFunction"
here = pytest.mark.skipif(TOO_LATE, reason="triton was imported before; run by test_in_a_process_of_its_own")


@pytest.mark.skipif(not TOO_LATE, reason="the tests below run in this process")
def test_in_a_process_of_its_own():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(autouse=True)
def several_splits(monkeypatch):
    monkeypatch.setattr(backend, "SPLIT_COLUMNS", 128)


def case(N, D, V, dtype=torch.float32, spread=0.3):
    generator = torch.Generator().manual_seed(N + D + V)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((N, D), (V, D), (V,)))
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (hidden * spread, weight, bias)]
    targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
    return *leaves, targets, torch.randn(N, generator=generator).to(DEVICE)


@here
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize(
    "N,D,V,scale,softcap,with_bias", [(37, 40, 333, 1.0, None, False), (33, 64, 129, 0.7, 4.0, True)]
)
def test_accuracy_against_float64_of_the_same_inputs(dtype, tolerance, N, D, V, scale, softcap, with_bias):
    hidden, weight, bias, targets, grad = case(N, D, V, dtype)
    targets[0], targets[-1] = 0, V - 1
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def statistics(leaves, name):
        bias = leaves[2] if with_bias else None
        return token_statistics(leaves[0], leaves[1], targets, bias=bias, scale=scale, softcap=softcap, backend=name)

    ours, oracle = statistics(inputs, "triton"), statistics(exact, "eager")
    for got, want in zip(ours, oracle, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 2e-5
    ours = torch.autograd.grad(ours.logps, inputs, grad)
    for got, leaf, want in zip(ours, inputs, torch.autograd.grad(oracle.logps, exact, grad.double()), strict=True):
        assert got.dtype == leaf.dtype
        assert (got.double() - want).norm() / want.norm() <= tolerance


@here
def test_a_row_does_not_depend_bit_for_bit_on_its_batch():
    hidden, weight, _, targets, _ = case(50, 32, 300)
    # Eighths make the matmul exact: the interpreter's own, numpy's, rounds a row by its place in the tile.
    hidden, weight = ((8 * x).round() / 8 for x in (hidden, weight))
    with torch.no_grad():
        full = token_logps(hidden, weight, targets, backend="triton")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for rows in (order, order[:1], order[:33]):
        assert torch.equal(token_logps(hidden[rows], weight, targets[rows], backend="triton"), full[rows])


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logit_gradient_is_written_in_the_matmuls_dtype(dtype):
    hidden, weight, _, targets, grad = case(20, 32, 100, dtype)
    y = hidden.detach().double() @ weight.detach().double().t()
    lse = y.logsumexp(1)
    kernel = backend.TritonKernel(1.0, None, backend._launch(hidden))
    got = kernel.logit_gradient(hidden, weight[64:], None, targets - 64, lse.float(), grad)
    onehot = torch.nn.functional.one_hot(targets, 100)
    want = (grad[:, None] * (onehot - (y - lse[:, None]).exp()))[:, 64:]
    assert got.dtype == dtype
    assert (got - want).norm() / want.norm() < 2**-8


@here
def test_no_rows_and_masked_rows_keep_a_connected_graph():
    hidden, weight, _, targets, grad = case(3, 16, 50)
    for rows in (slice(0, 0), slice(0, 3)):
        logps = token_logps(hidden[rows], weight, targets[rows], backend="triton")
        gradients = torch.autograd.grad(logps, (hidden, weight), 0 * grad[rows])
        assert all((gradient == 0).all() for gradient in gradients)


@here
def test_several_row_blocks_and_chunks_in_backward(monkeypatch):
    hidden, weight, _, targets, grad = case(40, 16, 150)
    gradients = []
    for tiles in (backend.TRITON_TILES, backend.Tiles(0, 16, 16 * 64 * 4, 0)):
        kernel = backend.TritonKernel(1.0, None, backend._launch(hidden), tiles)
        logps, *_ = backend.recomputed_logps(kernel, hidden, weight, None, targets, False)
        gradients.append(torch.autograd.grad(logps, (hidden, weight), grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@here
def test_float64_is_refused():
    hidden, weight, _, targets, _ = case(3, 4, 5)
    with pytest.raises(ValueError, match="float64"):
        token_logps(hidden.double(), weight.double(), targets, backend="triton")
