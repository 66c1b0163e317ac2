"""Compiled decoder layers against the same layers in eager mode: numbers, how many graphs, and what happens without a
compiler.
"""

from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from dpo_ds.batch import packed_batch
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Replica
from dpo_ds.models.layers import compile as compilation
from dpo_ds.models.layers.activations import save_activation_memory
from dpo_ds.models.layers.compile import settle_compilation
from dpo_ds.models.layers.units import is_compiled
from dpo_ds.models.packed import operator
from tests.tiny import VOCAB, random_pairs

CPU = torch.device("cpu")
FAMILIES = {"llama": (1, {}), "gemma2": (2, {"sliding_window": 5})}  # kinds of layers
pytestmark = pytest.mark.timeout(600)  # compilers beside other work


@pytest.fixture(scope="module", autouse=True)
def one_compiler():
    """No pool of processes, which would import torch first."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def passes(model: LogProbModel, batches) -> list[torch.Tensor]:
    """Token log-probs of every batch, without and with gradients, and the gradients."""
    found = []
    for batch in batches:
        with torch.no_grad():
            found.append(model.eval()(batch))
        logps = model.train()(batch)
        logps.square().mean().backward()
        found += [logps.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """The same model in eager mode and compiled, with what was said, the kinds of its layers."""
    kinds, changes = FAMILIES[request.param]
    config = tiny_config(request.param, VOCAB, hidden=32, layers=4, **changes)
    eager, compiled = (LogProbModel(random_model(config, seed=0)) for _ in range(2))
    said = []
    for model in (eager, compiled):
        assert use_packed_attention(model.causal_lm) is None
    settle_compilation(True, [type("Model", (), {"causal_lm": compiled.causal_lm, "device": CPU})], said.extend)
    assert is_compiled(compiled.causal_lm) and not is_compiled(eager.causal_lm)
    return eager, compiled, said, kinds


def test_layers_agree_and_all_batches_share_their_graphs(pair):
    eager, compiled, said, kinds = pair
    batches = [packed_batch(random_pairs(count, seed=count)) for count in (3, 1, 6)]
    before = graphs()
    for ours, theirs in zip(passes(compiled, batches), passes(eager, batches), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(1.0, theirs.norm())
    assert graphs() - before == 2 * kinds  # with gradients and without
    assert sum(line.startswith("compiled a decoder layer in") for line in said) >= 2 * kinds


def test_a_single_token_and_a_cache_make_no_graph(pair):
    eager, compiled, _, _ = pair
    batch = packed_batch([])
    before = graphs()
    assert len(compiled(batch)) == 0
    for model in (eager, compiled):
        model.causal_lm.set_attn_implementation("eager")
    ids = torch.arange(1, 8)[None]
    ours, theirs = (m.causal_lm.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (compiled, eager))
    for model in (eager, compiled):
        use_packed_attention(model.causal_lm)
    assert torch.equal(ours, theirs) and graphs() == before


@pytest.mark.parametrize("how", ["checkpoint", "selective"])
def test_what_recomputed_layers_keep_and_compute_again(monkeypatch, how):
    layers, width, inner = 3, 32, 96
    model = LogProbModel(random_model(tiny_config("llama", VOCAB, hidden=width, layers=layers)))
    use_packed_attention(model.causal_lm)
    batch = packed_batch(random_pairs(4))
    tokens = batch.num_tokens

    def step() -> tuple[int, int, list[torch.Size], list[torch.Tensor]]:
        saved = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.shape), x)[1], lambda x: x)
        forwards = mock.Mock(side_effect=operator.sdpa)
        counting = profile(activities=[ProfilerActivity.CPU], with_flops=True)  # a mode would switch graphs off
        with counting, keep, mock.patch.object(operator, "sdpa", forwards):
            model.train()(batch).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        of_tokens = [shape for shape in saved if tokens in shape]
        flops = sum(event.flops for event in counting.key_averages() if event.key == "aten::mm")
        return flops, forwards.call_count, of_tokens, gradients

    expected = step()[-1]
    graph = partial(torch.compile, dynamic=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(compilation, "_compiled", cache(graph))
    settle_compilation(True, [Replica(model, CPU)], lambda _: None)
    model.requires_grad_(True)
    step()  # operators run while a graph is made, too
    all_kept, *_ = step()
    save_activation_memory(model.causal_lm, how)
    step()
    again, attentions, saved, gradients = step()
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(1.0, theirs.norm())
    around_attention = 2 * width + 2 * 16  # query and output; key and value
    products = tokens * width * (2 * inner + (how == "checkpoint") * around_attention)  # gate, up
    assert again - all_kept == layers * 2 * products
    assert attentions == layers * (2 if how == "checkpoint" else 1)
    inputs_and_last_norm = layers + 3
    assert sum(shape == (1, tokens, width) for shape in saved) == inputs_and_last_norm
    kept = sorted(shape[1] for shape in saved if len(shape) == 2 and shape[0] == tokens)
    assert kept == ([] if how == "checkpoint" else sorted(layers * [width, width, 16, 16])), saved
    assert max(shape[-1] for shape in saved if len(shape) > 2) == width


def test_what_fails_to_compile_runs_eagerly_and_says_so_once(monkeypatch):
    model = LogProbModel(random_model(tiny_config("llama", VOCAB, hidden=32, layers=3)))
    use_packed_attention(model.causal_lm)
    batch, said = packed_batch(random_pairs(3)), []
    expected = model(batch)
    settle_compilation(True, [Replica(model, CPU)], said.extend)

    def broken(*_, **__):
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no such instruction"), None)

    monkeypatch.setattr(compilation, "_compiled", lambda forward: broken)
    assert torch.equal(model(batch), expected) and torch.equal(model(batch), expected)
    assert len(said) == 1 and "LlamaDecoderLayer cannot be compiled" in said[0] and not is_compiled(model.causal_lm)


def test_auto_leaves_a_cpu_alone():
    model = LogProbModel(random_model(tiny_config("llama", VOCAB, hidden=32)))
    for wanted in ("auto", False):
        settle_compilation(wanted, [Replica(model, CPU)], pytest.fail)
    assert not is_compiled(model.causal_lm)
