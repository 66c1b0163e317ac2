"""Packed attention inside models: same log-probs and gradients as padded rows, blind where it must be, and checked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ds.batch import PAIR, Batch, Group, packed_batch, padded_batch
from dpo_ds.logprobs.head import install_head
from dpo_ds.models.attention import PACKED_ATTENTION, packed_refusal, use_packed_attention
from dpo_ds.models.causal_lm import hidden_states
from dpo_ds.models.packed import backends, kernels, segments
from dpo_ds.models.packed.probe import UnsupportedAttention, probe_attention
from tests.models.packed.emulated import CPU_KERNEL

VOCABULARY = 200
LAYERS = 2
PAIRS = ((9, 4, 7), (1, 1, 5), (0, 4, 3), (6, 1, 1), (1, 3, 1), (12, 6, 2))  # prompt, chosen, rejected
UNEVEN = (*PAIRS, (5, 3), (4, 2, 5, 1, 3), (0, 3, 2, 2), (8, 1, 4, 2, 6, 3, 2, 5))  # groups of 1, 4, 3 and 7, too

ROPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": ROPE,
    "qwen3": ROPE,
    "mistral": {**ROPE, "sliding_window": 4},
    "gemma2": {
        **ROPE,
        "num_hidden_layers": 3,
        "sliding_window": 4,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
MORE_FAMILIES = {
    "qwen2": {**ROPE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "phi": ROPE,
    "olmo2": ROPE,
    "cohere": ROPE,
    "granite": ROPE,
    "mixtral": {**ROPE, **EXPERTS},
    "qwen3_moe": {**ROPE, **EXPERTS},
    "jetmoe": {**ROPE, **EXPERTS, "kv_channels": 8, "num_key_value_heads": 4},  # views what attention gives
    "gpt_neox": {**ROPE, "max_position_embeddings": 64},
    "opt": {**ROPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
}
REFUSED = {  # family: its config and a word of the line that says why
    "bloom": ({"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}, "attention interface"),
    "mamba": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": LAYERS},
        "0 of its 2 layers",
    ),
    "codegen": ({**GPT2, "rotary_dim": 4}, "attention interface"),
    "falcon": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
        "attention interface",
    ),
    "gptj": ({**GPT2, "rotary_dim": 4}, "attention interface"),
    "gpt_oss": ({**ROPE, **EXPERTS}, "'s_aux'"),
}


class LogProbModel(nn.Module):
    """Token log-probs [N] of a batch in either layout, as dpo_ds.models.causal_lm has it."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        self.causal_lm = causal_lm
        self.head = install_head(causal_lm)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(hidden_states(self.causal_lm, batch)[batch.target_rows], batch.targets)


def tiny(family: str, settings: dict) -> LogProbModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    return LogProbModel(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def random_groups(lengths=UNEVEN) -> list[Group]:
    """Of each its first completion is better than the others."""
    generator, groups = np.random.default_rng(1), []
    for prompt, *completions in lengths:
        ids = [generator.integers(3, VOCABULARY, size=n) for n in (prompt, *completions)]
        masks = tuple(np.ones(n, bool) for n in completions)
        better = np.array([(0, worse) for worse in range(1, len(completions))], np.int64).reshape(-1, 2)
        groups.append(Group(ids[0], tuple(ids[1:]), masks, better))
    return groups


def logps_and_gradients(model: LogProbModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps = model(batch)
    weights = torch.linspace(-1, 2, len(logps))  # no two tokens alike, both signs
    (logps * weights).mean().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():  # a key bias's gradient is 0 but for rounding: hence the total
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family):
    model = tiny(family, FAMILIES[family])
    pairs = random_groups()
    expected, expected_gradients = logps_and_gradients(model, padded_batch(pairs))
    assert use_packed_attention(model.causal_lm) is None
    with probe_attention() as probe:
        logps, gradients = logps_and_gradients(model, packed_batch(pairs))
    assert probe.backends == ["sdpa"] * model.causal_lm.config.num_hidden_layers and not probe.refusals
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected_gradients)


@pytest.fixture
def _varlen(monkeypatch):
    """What runs on a GPU, on a kernel of the CPU: prompts of 6 tokens and more are merged, shorter ones copied."""
    monkeypatch.setitem(kernels.KERNELS, "cpu", CPU_KERNEL)
    monkeypatch.setattr(backends, "_candidates", lambda device, dtype, width, value_width, softcap: ("cpu",))
    monkeypatch.setattr(segments, "is_merged", lambda segment: segment.prompt >= 6)
    segments.forget_tables()
    backends.backend_for.cache_clear()
    yield
    segments.forget_tables()
    backends.backend_for.cache_clear()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_packed_equals_padded_by_varlen_calls(family, checkpointing, _varlen):
    model = tiny(family, FAMILIES[family]).train()
    pairs = random_groups()
    expected, expected_gradients = logps_and_gradients(model, padded_batch(pairs))
    assert packed_refusal(model.causal_lm, model) is None
    if checkpointing:
        model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    with probe_attention() as probe:
        logps, gradients = logps_and_gradients(model, packed_batch(pairs))
    assert set(probe.backends) == {"cpu"} and len(probe.backends) == LAYERS * (1 + checkpointing)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_windows_of_the_test_models_matter(family):
    """Without its window the same model gives other log-probs: the agreement above is of windows that do cut."""
    pairs, settings = random_groups(), FAMILIES[family]
    windowed = tiny(family, settings)(padded_batch(pairs))
    full = tiny(family, {**settings, "sliding_window": 64})(padded_batch(pairs))
    assert (windowed - full).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pairs_place_in_the_pack_changes_nothing(family):
    model = tiny(family, FAMILIES[family])
    use_packed_attention(model.causal_lm)
    pairs = random_groups()
    alone = torch.cat([model(packed_batch([pair])) for pair in pairs])
    together = model(packed_batch(pairs))
    backwards = model(packed_batch(pairs[::-1]))
    sizes = [int(packed_batch([pair]).target_counts.sum()) for pair in pairs]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(backwards.split(sizes[::-1])[::-1]), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changed", ["chosen", "rejected"])
def test_neither_side_sees_the_other(family, changed):
    model = tiny(family, FAMILIES[family])
    use_packed_attention(model.causal_lm)
    pairs = random_groups()
    completions = list(pairs[0].completions)
    completions[PAIR.index(changed)] = completions[PAIR.index(changed)][::-1] + 1
    assert (completions[PAIR.index(changed)] != getattr(pairs[0], changed)).all()
    perturbed = [replace(pairs[0], completions=tuple(completions)), *pairs[1:]]
    before, after = (packed_batch(p) for p in (pairs, perturbed))
    before, after = (batch.pair_logps(model(batch)) for batch in (before, after))
    seen, unseen = ("chosen", "rejected") if changed == "chosen" else ("rejected", "chosen")
    assert torch.equal(getattr(before, unseen), getattr(after, unseen))
    assert getattr(before, seen)[0] != getattr(after, seen)[0]
    assert torch.equal(getattr(before, seen)[1:], getattr(after, seen)[1:])


def test_a_completions_place_in_its_group_changes_nothing():
    """Moved to every place among seven, its log-probs are the same but for rounding."""
    model = tiny("llama", FAMILIES["llama"])
    use_packed_attention(model.causal_lm)
    group = random_groups()[-1]
    order = list(range(len(group.completions)))
    found = []
    for shift in order:
        turned = order[shift:] + order[:shift]
        parts = {name: tuple(getattr(group, name)[i] for i in turned) for name in ("completions", "masks")}
        batch = packed_batch([replace(group, **parts)])
        of_each = model(batch).split(batch.target_counts.tolist())
        found.append(torch.cat([of_each[turned.index(i)] for i in order]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(family, use_reentrant):
    model = tiny(family, FAMILIES[family]).train()
    use_packed_attention(model.causal_lm)
    batch = packed_batch(random_groups())
    expected, expected_gradients = logps_and_gradients(model, batch)
    model.causal_lm.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.causal_lm.enable_input_require_grads()
    with probe_attention() as probe:
        logps, gradients = logps_and_gradients(model, batch)
    assert len(probe.backends) == 2 * model.causal_lm.config.num_hidden_layers  # forward, then recomputed
    assert torch.equal(logps, expected)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


def test_a_batch_first_seen_in_inference_mode_can_be_trained_on():
    """The masks are shared by the reference's pass and the policy's, whose backward saves them."""
    model = tiny("mistral", FAMILIES["mistral"])
    use_packed_attention(model.causal_lm)
    batch = packed_batch(random_groups(((5, 6, 8),)))
    with torch.inference_mode():
        model(batch)
    model(batch).sum().backward()


def test_an_empty_micro_batch_still_has_a_backward():
    model = tiny("llama", FAMILIES["llama"])
    use_packed_attention(model.causal_lm)
    batch = packed_batch([])
    batch.pair_logps(model(batch)).chosen.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert model.causal_lm.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_call_without_segments_is_an_error():
    model = tiny("llama", FAMILIES["llama"])
    use_packed_attention(model.causal_lm)
    with pytest.raises(UnsupportedAttention, match="gets no segments"):
        model.causal_lm(torch.tensor([[3, 4, 5]]))


def test_attention_dropout_is_an_error():
    model = tiny("llama", {**FAMILIES["llama"], "attention_dropout": 0.1}).train()
    use_packed_attention(model.causal_lm)
    with pytest.raises(UnsupportedAttention, match="dropout 0.1"):
        model(packed_batch(random_groups()))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_canary_lets_families_pass(family):
    model = tiny(family, {**FAMILIES, **MORE_FAMILIES}[family])
    assert packed_refusal(model.causal_lm, model) is None
    assert model.causal_lm.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("family", REFUSED)
def test_the_canary_refuses(family):
    settings, why = REFUSED[family]
    model = tiny(family, settings) if family != "mamba" else mamba(settings)
    refusal = packed_refusal(model.causal_lm, model)
    assert refusal and why in refusal and "\n" not in refusal
    assert model.causal_lm.config._attn_implementation == "eager"
    with probe_attention() as probe:
        model(padded_batch(random_groups()[:2]))  # still usable in the padded layout
    assert not probe.backends


def mamba(settings: dict) -> LogProbModel:
    torch.manual_seed(0)
    return LogProbModel(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))).eval()


class BlindToPositions(nn.Module):
    """A model that numbers positions by place in the pack."""

    def __init__(self, model: LogProbModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        length = batch.input_ids.shape[1]
        return self.model(Batch(**{**vars(batch), "position_ids": torch.arange(length).expand_as(batch.input_ids)}))


def test_the_canary_sees_wrong_positions():
    model = tiny("gpt2", FAMILIES["gpt2"])
    assert "differ from unpacked ones" in packed_refusal(model.causal_lm, BlindToPositions(model))


def test_the_canary_sees_a_window_that_only_the_mask_has(monkeypatch):
    model = tiny("mistral", {**FAMILIES["mistral"], "sliding_window": 32})  # longer than the canary's sequences
    assert packed_refusal(model.causal_lm, model) is None
    model.causal_lm.set_attn_implementation("eager")
    for layer in model.causal_lm.model.layers:
        attention = layer.self_attn
        monkeypatch.setattr(attention, "config", AutoConfig.for_model("mistral", **ROPE, sliding_window=None))
        attention.config._attn_implementation = PACKED_ATTENTION
    assert packed_refusal(model.causal_lm, model) == "it limits attention to 32 tokens by a mask alone"


def test_the_canary_reports_a_forward_that_fails():
    model = tiny("llama", FAMILIES["llama"])

    def forward_logps(batch: Batch) -> Tensor:
        raise TypeError("forward() got an unexpected keyword argument 'segments'")

    assert "unexpected keyword argument 'segments'" in packed_refusal(model.causal_lm, forward_logps)
