"""Rotary frequencies that depend on a sequence's length: a pair's log-probs do not depend on what lies beside it."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ds.batch import PAIR, Group, packed_batch, padded_batch
from dpo_ds.errors import ModelError
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.layers import rope
from tests.families import shrink

BOUNDARY = 24  # tokens that the model was made for
LENGTHS = ((4, 3, 5), (30, 12, 7), (6, 2, 2), (12, 30, 25), (20, 4, 2))  # prompt, chosen, rejected
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": BOUNDARY}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
MODELS = {
    "phi3": {"rope_parameters": LONG | FACTORS, "original_max_position_embeddings": BOUNDARY},
    "phimoe": {"rope_parameters": LONG | FACTORS | {"short_mscale": 1.1, "long_mscale": 1.3}},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
}


def pairs(lengths=LENGTHS) -> list[Group]:
    generator = np.random.default_rng(3)
    tokens = [[generator.integers(3, 150, size=n) for n in pair] for pair in lengths]
    return [Group.pair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in tokens]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param)
    shrink(config)
    config.max_position_embeddings = BOUNDARY if request.param == "llama" else 4 * BOUNDARY
    for name, value in MODELS[request.param].items():
        setattr(config, name, copy.copy(value))
    return LogProbModel(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def of_pairs(model, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(batch).split(batch.target_counts.tolist()))


@pytest.mark.parametrize("layout", [packed_batch, padded_batch])
def test_log_probs_are_those_of_each_pair_alone(model, layout):
    """In the order of the batch and in another one, whose longest sequence comes first."""
    if layout is packed_batch:
        assert use_packed_attention(model.causal_lm) is None
    rope.check_lengths(model.causal_lm)
    alone = [of_pairs(model, layout([pair])) for pair in pairs()]
    for order in ([0, 1, 2, 3, 4], [3, 4, 1, 0, 2]):
        beside = of_pairs(model, layout([pairs()[i] for i in order]))
        for place, i in enumerate(order):
            for own, found in zip(alone[i], beside[2 * place : 2 * place + 2], strict=True):
                torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


def test_log_probs_are_the_models_own(model):
    """transformers on one sequence, of pairs whose sides are on the same side of the boundary."""
    for pair in pairs()[:4]:
        for side in PAIR if pair is not pairs()[1] else ("chosen",):
            ids = torch.from_numpy(np.concatenate([pair.prompt, getattr(pair, side)]))
            rope.tell_lengths(model.causal_lm, None)
            with torch.no_grad():
                logps = model.causal_lm(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(pair.prompt), len(ids))
            same = Group(pair.prompt, (getattr(pair, side),), (np.ones(len(places), bool),))
            (found,) = of_pairs(model, padded_batch([same]))
            torch.testing.assert_close(found, logps[places - 1, ids[places]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_part_of_a_row_has_the_frequencies_of_the_whole(model, ranks):
    """The first ranks have a long sequence's first positions alone."""
    rotary = model.causal_lm.ropes_of_length[0]
    batch, x = packed_batch(pairs(((30, 12, 7), (6, 2, 2)))), torch.zeros(1)
    rope.tell_lengths(model.causal_lm, batch)
    whole = rotary(x, batch.position_ids)
    parts = []
    for place in range(ranks):
        spread = batch.spread(ranks, place)
        rope.tell_lengths(model.causal_lm, spread)
        parts.append(rotary(x, spread.part.position_ids))
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found, dim=1)[:, : expected.shape[1]], expected)


def test_frequencies_of_another_kind_are_refused(model, monkeypatch):
    monkeypatch.setattr(rope, "_by_length", lambda module, *args: type(module).forward(module, *args))
    rope.take_lengths(model.causal_lm)
    with pytest.raises(ModelError, match="its frequencies depend on the batch's longest sequence"):
        rope.check_lengths(model.causal_lm)
