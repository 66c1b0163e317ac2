"""Token log-probs: values by hand, float64 oracle, special cases, bitwise independence of batch and order."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from dpo_ds.logprobs import chunked, token_logps, token_statistics

CPU_BACKENDS = ("eager", "chunked")


@pytest.fixture(params=["kept", "recomputed"])
def tiles(request, monkeypatch):
    """Small tiles, so that a few rows and columns make many; backward with kept exponentials or a second matmul."""
    kept = (1 << 20) if request.param == "kept" else 0
    monkeypatch.setitem(chunked.TILES, "cpu", chunked.Tiles(4, 6, 6 * 64 * 8, kept))


def case(N, D, V, dtype=torch.float64, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    grad = torch.randn(N, generator=generator, dtype=torch.float64)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden * spread, weight, bias)]
    return *leaves, targets, grad


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_by_hand(backend):
    # Logits of the one row are ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]]).log()
    probabilities = [1 / 8, 2 / 8, 5 / 8]
    for token, p in enumerate(probabilities):
        stats = token_statistics(hidden, weight, torch.tensor([token]), backend=backend)
        assert stats.logps.item() == pytest.approx(math.log(p), abs=1e-6)
        assert stats.entropy.item() == pytest.approx(-sum(q * math.log(q) for q in probabilities), abs=1e-6)
        assert stats.log_sum_p2.item() == pytest.approx(math.log(30 / 64), abs=1e-6)
        assert stats.hits.item() == (token == 2)
    # scale 2 squares the odds: 1, 4, 25; a cap far above changes nothing, a cap of 1 bounds the odds to e^2.
    logp = token_logps(hidden, weight, torch.tensor([2]), scale=2.0, backend=backend)
    assert logp.item() == pytest.approx(math.log(25 / 30), abs=1e-6)
    capped = [math.exp(math.tanh(math.log(x))) for x in (1, 2, 5)]
    logp = token_logps(hidden, weight, torch.tensor([2]), softcap=1.0, backend=backend)
    assert logp.item() == pytest.approx(math.log(capped[2] / sum(capped)), abs=1e-6)


@pytest.mark.parametrize("scale,softcap,with_bias", [(1.0, None, False), (0.7, None, True), (1.3, 2.0, True)])
def test_gradcheck_float64(tiles, scale, softcap, with_bias):
    hidden, weight, bias, targets, _ = case(9, 3, 70)

    def logps(hidden, weight, bias):
        bias = bias if with_bias else None
        return token_logps(hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, backend="chunked")

    inputs = hidden, weight, bias if with_bias else None
    assert gradcheck(logps, inputs, fast_mode=False)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 19), D=st.integers(1, 9), V=st.integers(1, 200), scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 3.0]), with_bias=st.booleans(), kept=st.sampled_from([0, 1 << 20]),
)  # fmt: skip
def test_any_shape_matches_the_oracle(N, D, V, scale, softcap, with_bias, kept):
    hidden, weight, bias, targets, grad = case(N, D, V, seed=N + 31 * V)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    options = dict(bias=bias if with_bias else None, scale=scale, softcap=softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.TILES, "cpu", chunked.Tiles(4, 6, 6 * 64 * 8, kept))
        ours = token_statistics(hidden, weight, targets, backend="chunked", **options)
        ours_grads = torch.autograd.grad(ours.logps, inputs, grad)
    oracle = token_statistics(hidden, weight, targets, backend="eager", **options)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(ours_grads, torch.autograd.grad(oracle.logps, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tiles", ["kept", "recomputed"], indirect=True)
def test_accuracy_against_float64_of_the_same_inputs(tiles, dtype, tolerance, softcap):
    hidden, weight, bias, targets, grad = case(50, 32, 700, dtype, spread=0.2)
    inputs = [hidden, weight, bias]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logps = token_logps(hidden, weight, targets, bias=bias, softcap=softcap, backend="chunked")
    oracle = token_logps(exact[0], exact[1], targets, bias=exact[2], softcap=softcap, backend="eager")
    assert logps.dtype == torch.float32
    assert (logps - oracle).abs().max() <= 2e-5
    ours = torch.autograd.grad(logps, inputs, grad.float())
    for got, leaf, want in zip(ours, inputs, torch.autograd.grad(oracle, exact, grad), strict=True):
        assert got.dtype == leaf.dtype
        assert relative(got, want) <= tolerance


def test_bfloat16_weight_gradient_is_rounded_once(tiles):
    # 64 equal rows: summing 64 bfloat16 terms one by one would stall, one rounding keeps half a unit in the last place.
    hidden, weight, _, targets, _ = case(1, 8, 20, torch.bfloat16)
    many = hidden.detach().expand(64, 8).contiguous()
    logps = token_logps(many, weight, targets.expand(64), backend="chunked")
    (got,) = torch.autograd.grad(logps.sum(), weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(token_logps(many.double(), exact, targets.expand(64), backend="eager").sum(), exact)
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads,D,V", [(1, 40, 333), (1, 64, 1000), (1, 256, 5001), (2, 40, 2500)])
def test_a_row_does_not_depend_bit_for_bit_on_its_batch(dtype, threads, D, V):
    hidden, weight, bias, targets, _ = case(300, D, V, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            full = token_statistics(hidden, weight, targets, bias=bias, backend="chunked")
        order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
        for rows in (order, order[:1], order[:7], order[:128], order[:129], torch.arange(37, 290)):
            # The policy's pass, gradient and statistics on; then without statistics: the same bits.
            part = token_statistics(hidden[rows], weight, targets[rows], bias=bias, backend="chunked")
            for a, b in zip(part, full, strict=True):
                assert torch.equal(a, b[rows])
            plain = token_logps(hidden[rows], weight, targets[rows], bias=bias, backend="chunked")
            assert torch.equal(plain, full.logps[rows])
    finally:
        torch.set_num_threads(before)


def test_only_a_pass_that_will_be_differentiated_keeps_anything(monkeypatch):
    hidden, weight, _, targets, _ = case(5, 4, 100)
    kept = []
    original = chunked.ChunkedKernel.fold

    def fold(self, *arguments):
        results = original(self, *arguments)
        kept.append(len(results[1]))
        return results

    monkeypatch.setattr(chunked.ChunkedKernel, "fold", fold)
    token_logps(hidden, weight, targets, backend="chunked")
    with torch.no_grad():
        token_logps(hidden, weight, targets, backend="chunked")
    token_logps(hidden.detach(), weight.detach(), targets, backend="chunked")
    monkeypatch.setitem(chunked.TILES, "cpu", chunked.TILES["cpu"]._replace(kept_bytes=5 * 100 * 8 - 1))
    token_logps(hidden, weight, targets, backend="chunked")
    assert kept == [1, 0, 0, 0]  # one chunk


def test_cublas_may_not_round_parts_of_a_sum_while_gradients_are_computed(monkeypatch):
    flags, seen = torch.backends.cuda.matmul, []
    original = chunked.ChunkedKernel.kept_logit_gradient

    def gradient(self, *arguments):
        seen.append(flags.allow_bf16_reduced_precision_reduction)
        return original(self, *arguments)

    monkeypatch.setattr(chunked.ChunkedKernel, "kept_logit_gradient", gradient)
    hidden, weight, _, targets, grad = case(5, 4, 100)
    token_logps(hidden, weight, targets, backend="chunked").backward(grad)
    assert seen == [False] and flags.allow_bf16_reduced_precision_reduction


def test_backward_repeats_bit_for_bit(tiles):
    hidden, weight, bias, targets, grad = case(50, 16, 300, torch.float32)
    logps = token_logps(hidden, weight, targets, bias=bias, backend="chunked")
    first, second = (torch.autograd.grad(logps, (hidden, weight, bias), grad.float(), retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_chunk_sizes_change_rounding_only(backend, monkeypatch):
    hidden, weight, _, targets, grad = case(40, 16, 500, torch.float32)
    results = []
    for tiles in (chunked.Tiles(4, 6, 6 * 64 * 4, 0), chunked.Tiles(128, 128, 1 << 20, 0)):
        monkeypatch.setitem(chunked.TILES, "cpu", tiles)
        logps = token_logps(hidden, weight, targets, backend=backend)
        results.append((logps.detach(), *torch.autograd.grad(logps, (hidden, weight), grad.float())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gradient_signs_and_masked_rows(tiles):
    hidden, weight, _, targets, grad = case(20, 8, 100)
    grad[::3] = 0
    logps = token_logps(hidden, weight, targets, backend="chunked")
    positive = torch.autograd.grad(logps, (hidden, weight), grad, retain_graph=True)
    negative = torch.autograd.grad(logps, (hidden, weight), -grad, retain_graph=True)
    for a, b in zip(positive, negative, strict=True):
        assert torch.equal(a, -b)
    assert (positive[0][::3] == 0).all() and (positive[0][1::3] != 0).any()
    kept = grad != 0
    subset = token_logps(hidden[kept], weight, targets[kept], backend="chunked")
    torch.testing.assert_close(torch.autograd.grad(subset, weight, grad[kept])[0], positive[1])
    for gradient in torch.autograd.grad(logps, (hidden, weight), torch.zeros_like(grad)):
        assert (gradient == 0).all()


def test_zero_gradient_rows_are_dropped_in_recomputation(monkeypatch):
    monkeypatch.setitem(chunked.TILES, "cpu", chunked.Tiles(4, 6, 6 * 64 * 8, 0))
    hidden, weight, _, targets, grad = case(20, 8, 100)
    seen = []
    original = chunked.ChunkedKernel.logit_gradient
    spy = lambda self, hidden, *rest: (seen.append(len(hidden)), original(self, hidden, *rest))[1]  # noqa: E731
    monkeypatch.setattr(chunked.ChunkedKernel, "logit_gradient", spy)
    grad[5:] = 0
    token_logps(hidden, weight, targets, backend="chunked").backward(grad)
    assert seen == [5, 5]  # one block of five rows in each of the two chunks of 64 and 36 columns


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_target_in_the_first_and_in_the_last_partial_chunk(tiles, backend):
    hidden, weight, _, _, _ = case(2, 4, 129)
    logps = token_logps(hidden, weight, torch.tensor([0, 128]), backend=backend)
    expected = torch.log_softmax(hidden @ weight.t(), -1)[[0, 1], [0, 128]]
    torch.testing.assert_close(logps, expected)


def test_logits_of_a_thousand(tiles):
    hidden, weight, _, targets, grad = case(30, 64, 300, torch.float32, spread=40.0)
    exact_hidden = hidden.detach().double().requires_grad_()
    oracle = token_logps(exact_hidden, weight.detach().double(), targets, backend="eager")
    assert (hidden @ weight.t()).abs().max() > 1000
    logps = token_logps(hidden, weight, targets, backend="chunked")
    assert (logps - oracle).abs().max() < 1e-3  # eight units in the last place of 1000 in float32
    (got,), (want,) = torch.autograd.grad(logps, hidden, grad.float()), torch.autograd.grad(oracle, exact_hidden, grad)
    assert relative(got, want) < 1e-3
    # The most likely token of every row: its log-prob is 0 or a little below, never above.
    best = (hidden @ weight.t()).argmax(1)
    assert (token_logps(hidden, weight, best, backend="chunked") <= 0).all()


def test_vocabulary_entries_switched_off_by_bias(tiles):
    hidden, weight, _, _, _ = case(5, 4, 130)
    bias = torch.zeros(130, dtype=torch.float64)
    bias[:70] = -math.inf  # all of the first chunk
    logps = token_logps(hidden, weight, torch.full((5,), 100), bias=bias, backend="chunked")
    expected = torch.log_softmax(hidden @ weight[70:].t(), -1)[:, 30]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(
        torch.autograd.grad(logps.sum(), weight)[0][70:], torch.autograd.grad(expected.sum(), weight)[0][70:]
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_rows_keep_a_connected_graph(backend):
    hidden, weight, bias, _, _ = case(0, 4, 10, torch.float32)
    stats = token_statistics(hidden, weight, torch.empty(0, dtype=torch.int64), bias=bias, backend=backend)
    assert all(x.shape == (0,) and x.dtype == torch.float32 for x in stats)
    stats.logps.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert (weight.grad == 0).all() and (bias.grad == 0).all()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(tiles, frozen):
    hidden, weight, bias, targets, grad = case(10, 4, 70)
    full = torch.autograd.grad(
        token_logps(hidden, weight, targets, bias=bias, backend="chunked"), (hidden, weight, bias), grad
    )
    inputs = [hidden, weight, bias]
    inputs[frozen].requires_grad_(False)
    token_logps(hidden, weight, targets, bias=bias, backend="chunked").backward(grad)
    for index, leaf in enumerate(inputs):
        assert leaf.grad is None if index == frozen else torch.equal(leaf.grad, full[index])


def test_autocast_does_not_round_the_logits():
    hidden, weight, _, targets, _ = case(20, 32, 100, torch.float32)
    plain = token_logps(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_logps(hidden, weight, targets), plain)


def test_errors_name_the_value_and_the_rule():
    hidden, weight, bias, targets, _ = case(4, 3, 10, torch.float32)
    with pytest.raises(ValueError, match="'chunkd'.*'chunked'"):
        token_logps(hidden, weight, targets, backend="chunkd")
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(10, 2\)"):
        token_logps(hidden, weight[:, :2], targets)
    with pytest.raises(ValueError, match=r"int64 \[4\].*\(3,\)"):
        token_logps(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="int32"):
        token_logps(hidden, weight, targets.int())
    with pytest.raises(ValueError, match=r"bias must be \[10\]"):
        token_logps(hidden, weight, targets, bias=bias[:9])
    with pytest.raises(ValueError, match="softcap.*0"):
        token_logps(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="target -100 of row 2.*vocabulary of 10"):
        token_logps(hidden, weight, torch.tensor([0, 9, -100, 1]))


def test_the_cpu_never_imports_the_triton_backend():
    code = (
        "import sys, torch; from dpo_ds.logprobs import token_logps;"
        "token_logps(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64));"
        "assert 'dpo_ds.logprobs.triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
