"""The Triton kernels against the float64 oracle: on a GPU where there is one, else in Triton's interpreter."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton is imported
triton = pytest.importorskip("triton")

from dpo_ds.logprobs import chunked, token_logps, token_statistics  # noqa: E402
from dpo_ds.logprobs import triton as backend  # noqa: E402

TOO_LATE = DEVICE == "cpu" and type(triton.language.cdiv).__name__ != "InterpretedFunction"
here = pytest.mark.skipif(TOO_LATE, reason="triton was imported before; run by test_in_a_process_of_its_own")


@pytest.mark.skipif(not TOO_LATE, reason="the tests below run in this process")
def test_in_a_process_of_its_own():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def relaunched(launches, **changes):
    changed = [replace(x, **(changes | {"split": x.columns})) for x in (launches.fold, launches.gradient)]
    return backend.Launches(*changed)


@pytest.fixture(autouse=True, params=["descriptors", "pointers"])
def loads(request, monkeypatch):
    """Splits of one tile, so that a small vocabulary has several; and both ways of loading a tile."""
    change = {} if request.param == "descriptors" else {"descriptors": False}
    monkeypatch.setattr(backend, "INTERPRETED", relaunched(backend.INTERPRETED, **change))
    for key, launches in backend.LAUNCHES.items():
        monkeypatch.setitem(backend.LAUNCHES, key, relaunched(launches, **change))


@pytest.fixture(params=["all kept", "some kept", "recomputed"])
def kept(request, monkeypatch):
    """Budgets for the cases of up to 40 rows: of 256 columns and more, of 256, of none."""
    kept_bytes = {"all kept": 1 << 30, "some kept": 40 * 256 * 2, "recomputed": 0}[request.param]
    monkeypatch.setitem(chunked.TILES, "triton", chunked.TILES["triton"]._replace(kept_bytes=kept_bytes))


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
def test_accuracy_against_float64_of_the_same_inputs(kept, dtype, tolerance, N, D, V, scale, softcap, with_bias):
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
    kernel = backend.TritonKernel(1.0, None, backend._launches(hidden))
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
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_several_row_blocks_and_chunks_in_backward(monkeypatch, dtype, tolerance):
    hidden, weight, _, targets, grad = case(40, 16, 600, dtype)  # chunks of 256 columns, blocks of 16 rows
    gradients = []
    for tiles in (chunked.TILES["triton"], chunked.Tiles(0, 16, 16 * 256 * 4, 0)):
        monkeypatch.setitem(chunked.TILES, "triton", tiles)
        logps = token_logps(hidden, weight, targets, backend="triton")
        gradients.append(torch.autograd.grad(logps, (hidden, weight), grad))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


def passes(monkeypatch, kept_bytes, inputs, targets, grad, backwards=1, **options):
    """log-probs, and the gradients of one backward pass after another, with so much memory for exponentials."""
    monkeypatch.setitem(chunked.TILES, "triton", chunked.TILES["triton"]._replace(kept_bytes=kept_bytes))
    logps = token_statistics(*inputs[:2], targets, bias=inputs[2], backend="triton", **options).logps
    return logps, [torch.autograd.grad(logps, inputs, grad, retain_graph=True) for _ in range(backwards)]


@here
def test_kept_and_recomputed_agree(monkeypatch):
    """Log-probs to the bit; gradients to the rounding of an exponential and of its product to 8 bits, which in the
    interpreter cuts up to 2^-8 off. The budget of 40 x 512 x 2 bytes keeps 512 of 700 columns; a second backward pass
    finds them spent."""
    inputs, targets, grad = (lambda *x: (x[:3], *x[3:]))(*case(37, 40, 700, torch.bfloat16, spread=1.0))
    recomputed, (wanted,) = passes(monkeypatch, 0, inputs, targets, grad, scale=0.7)
    for kept_bytes in (1 << 30, 40 * 512 * 2):
        logps, (first, second) = passes(monkeypatch, kept_bytes, inputs, targets, grad, 2, scale=0.7)
        assert torch.equal(logps, recomputed)
        for a, b, c in zip(first, second, wanted, strict=True):
            assert (a - c).float().norm() <= 2**-7 * c.float().norm()
            assert (b - c).float().norm() <= 2**-7 * c.float().norm()
        assert not all(torch.equal(a, c) for a, c in zip(first, wanted, strict=True))  # they were kept


@here
def test_a_target_that_is_all_but_certain_keeps_its_gradient(monkeypatch):
    """Logits 16 * 0.5 * 1.375 = 11 and 63 zeros: 1 - p = 63 / (63 + e^11) = 0.00105. Neighbours of 1 in bfloat16 are
    2^-8 = 0.0039 below: an exponential kept in it would leave 0 or that."""
    hidden, weight = torch.full((1, 16), 0.5), torch.zeros(64, 16)
    weight[7] = 1.375
    inputs = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    logps = token_logps(*inputs, torch.tensor([7], device=DEVICE), backend="triton")
    (got,) = torch.autograd.grad(logps, inputs[1], torch.ones(1, device=DEVICE))
    assert got[7].tolist() == pytest.approx([0.5 * 63 / (63 + math.exp(11))] * 16, rel=2**-7)


@here
def test_nothing_is_kept_where_no_backward_follows_or_it_could_not_serve(monkeypatch):
    hidden, weight, bias, targets, _ = case(5, 16, 300, torch.bfloat16)
    columns = []
    tile = backend._padded_tile
    monkeypatch.setattr(backend, "_padded_tile", lambda like, rows, *x: columns.append(x[0]) or tile(like, rows, *x))
    frozen = hidden.detach(), weight.detach()
    token_logps(*frozen, targets, backend="triton")
    with torch.no_grad():
        token_logps(hidden, weight, targets, backend="triton")
    token_logps(hidden, weight, targets, softcap=3.0, backend="triton")
    token_logps(hidden.half(), weight.half(), targets, backend="triton")
    token_logps(hidden.float(), weight.float(), targets, backend="triton")
    assert columns == []
    token_logps(hidden, frozen[1], targets, bias=bias, backend="triton")
    assert columns == [300]


def test_columns_that_budgets_are_enough_for():
    """1 GiB of 2 bytes: 131,072 columns for 4096 rows, 32,768 for 16,384, 8192 for 65,536; no more rows are kept."""
    tiles = chunked.TILES["triton"]
    assert [tiles.kept_columns(n, 1 << 20) for n in (4096, 16384, 65536, 65537, 0)] == [131072, 32768, 8192, 0, 0]
    assert tiles.kept_columns(4097, 128256) == 128256 and tiles.kept_columns(4200, 128256) == 127744
    assert [tiles.kernel_columns(n, 2) for n in (16384, 65536, 1 << 20)] == [32768, 8192, 8192]
    assert tiles.kernel_columns(65536, 4) == 4096
    assert chunked.Tiles(0, 65536, 1, 1).kernel_columns(65536, 2) == 256


def test_a_split_must_be_whole_tiles():
    with pytest.raises(AssertionError, match="128 columns is no multiple of the tile's 256"):
        replace(backend.LAUNCHES[9, 2].fold, split=128)


@here
def test_float64_is_refused():
    hidden, weight, _, targets, _ = case(3, 4, 5)
    with pytest.raises(ValueError, match="float64"):
        token_logps(hidden.double(), weight.double(), targets, backend="triton")
