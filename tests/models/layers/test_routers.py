"""The routers' auxiliary loss against transformers' own, value and gradient, for families that route in other ways."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DbrxConfig

from dpo_ds.batch import Group, packed_batch, padded_batch
from dpo_ds.errors import ModelError
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.layers import compile as compilation
from dpo_ds.models.layers.activations import save_activation_memory
from dpo_ds.models.layers.compile import settle_compilation
from dpo_ds.models.layers.routers import RouterBalance, Tally, check_wanted, coefficient_of, sight
from dpo_ds.models.layers.units import is_compiled
from tests.families import pairs, tiny_config_of

FAMILIES = ("mixtral", "qwen3_moe", "jetmoe", "gpt_oss", "ernie4_5_moe", "granitemoe", "laguna", "phimoe", "qwen3_next")


class Whole(nn.Module):
    """Puts a padded batch through the model as transformers' users do."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
        return self.causal_lm(**inputs, output_router_logits=True, use_cache=False)


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config_of(family), dtype=torch.float32).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_are_those_of_transformers(family):
    model, batch = Whole(model_of(family)), padded_batch(pairs())
    coefficient = coefficient_of(model.causal_lm, None)
    config = model.causal_lm.config
    assert coefficient == getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", None)) > 0
    balance = RouterBalance(model, 1.0)
    with balance.counting(with_gradients=True) as tallies:
        out = model(batch)
    tally, loss = Tally.total(tallies), out.logits.logsumexp(-1).mean()
    load = tally.chosen / tally.tokens
    value = len(load) * (load * tally.probabilities).sum() / tally.tokens
    assert value.item() == pytest.approx(out.aux_loss.item(), rel=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(3 * (loss + out.aux_loss), parameters, **options)
    found = torch.autograd.grad(3 * balance.minimised(loss, load, tally.tokens), parameters, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_token_counts_once_for_every_completion_that_sees_it():
    mask = torch.ones(9, dtype=torch.bool).numpy()
    one, two = (torch.arange(3, 3 + n).numpy() for n in (2, 3))
    groups = [Group.pair(two, one, two, mask[:2], mask[:3]), Group(one, (two,), (mask[:3],))]
    assert sight(packed_batch(groups)).tolist() == [2] * 3 + [1] * 5 + [1] * 5
    assert sight(packed_batch(groups)).sum() == sight(padded_batch(groups)).sum()
    assert not sight(packed_batch([])).any() and not sight(padded_batch([])).any()


@pytest.mark.parametrize("family", ["llama", "doge", "deepseek_v3"])
def test_models_without_a_loss_that_is_known(family):
    model = model_of(family)
    assert coefficient_of(model, None) == coefficient_of(model, 0.0) == 0.0
    with pytest.raises(ModelError, match="has no routers with an auxiliary loss"):
        coefficient_of(model, 0.01)


def test_routers_that_give_logits_alone():
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=160, attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    assert coefficient_of(AutoModelForCausalLM.from_config(config), None) == 0.0
    with pytest.raises(ModelError, match="DbrxForCausalLM has no routers with an auxiliary loss"):
        check_wanted(0.01, config)


@pytest.mark.parametrize("how", ["none", "checkpoint"])
def test_compiled_layers_count_and_pull_too(monkeypatch, how):
    """By dynamo alone: what the hooks do stands outside of its graphs."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compilation, "_compiled", cache(partial(torch.compile, dynamic=True, backend="aot_eager")))
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: "")
    batch, found = packed_batch(pairs()), []
    for compiled in (False, True):
        model = LogProbModel(model_of("qwen3_moe"))
        save_activation_memory(model.causal_lm, how)
        balance = RouterBalance(model, 1.0)
        assert use_packed_attention(model.causal_lm) is None
        if compiled:
            settle_compilation(True, [SimpleNamespace(causal_lm=model.causal_lm, device=torch.device("cpu"))], print)
            assert is_compiled(model.causal_lm)
        with balance.counting(with_gradients=True) as tallies:
            logps = model(batch)
        tally = Tally.total(tallies)
        balance.minimised(logps.mean(), tally.chosen / tally.tokens, tally.tokens).backward()
        assert not compiled or is_compiled(model.causal_lm), "it fell back"
        assert (counters["stats"]["unique_graphs"] > 1) == compiled, "dynamo gave up on what it was to compile"
        found.append([len(tallies), *tally, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
