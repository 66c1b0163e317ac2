"""A varlen kernel emulated on a CPU by aten's own flash kernels, block by block, in any floating type; and stand-ins
for torch's operators, flash-attn-4 and flash-attn 2 that take what the real ones take and have it do the work."""

from types import SimpleNamespace

import torch
from torch import Tensor

from dpo_ds.batch import Segment
from dpo_ds.models.packed.kernels import Kernel
from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import Blocks

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
aten = torch.ops.aten


def segments_of(*lengths: tuple[int, ...]) -> tuple[Segment, ...]:
    segments, start = [], 0
    for prompt, *completions in lengths:
        segments.append(Segment(start, prompt, tuple(completions)))
        start = segments[-1].end
    return tuple(segments)


def cpu_forward(query, key, value, blocks: Blocks, rule: ScoreRule, causal: bool) -> tuple[Tensor, Tensor]:
    output, log_sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for queries, keys in _rows(blocks):
        q, k, v = _heads_first(query[queries], key[keys], value[keys])
        mask = _mask(q, k, rule, causal)
        part, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=rule.scale)
        output[queries], log_sums[:, queries] = part[0].transpose(0, 1), sums[0]
    return output, log_sums


def cpu_backward(grad, query, key, value, output, log_sums, blocks: Blocks, rule: ScoreRule, causal: bool):
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for queries, keys in _rows(blocks):
        q, k, v = _heads_first(query[queries], key[keys], value[keys])
        g, o = (x[queries].transpose(0, 1)[None] for x in (grad, output))
        by_query, *by_keys = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, log_sums[None, :, queries].contiguous(), 0.0, False,
            attn_mask=_mask(q, k, rule, causal), scale=rule.scale,
        )  # fmt: skip
        grads[0][queries] += by_query[0].transpose(0, 1)
        for whole, share in zip(grads[1:], by_keys, strict=True):
            whole[keys] += share[0].unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(grads)


CPU_KERNEL = Kernel(cpu_forward, cpu_backward)


def _rows(blocks: Blocks):
    bounds = blocks.cu_queries.unfold(0, 2, 1).tolist(), blocks.cu_keys.unfold(0, 2, 1).tolist()
    assert blocks.cu_queries.dtype == blocks.cu_keys.dtype == torch.int32
    for queries, keys in zip(*bounds, strict=True):
        assert queries[0] < queries[1] and keys[0] < keys[1], "no kernel is asked for an empty block"
        yield slice(*queries), slice(*keys)


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    group = query.shape[1] // key.shape[1]
    return [query.transpose(0, 1)[None], *(x.repeat_interleave(group, 1).transpose(0, 1)[None] for x in (key, value))]


def _mask(query: Tensor, key: Tensor, rule: ScoreRule, causal: bool) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = (distance < 0) & causal | (distance >= (rule.window or keys + queries))
    return query.new_zeros(queries, keys).masked_fill_(hidden, float("-inf"))


FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"
)
RESULTS = ") -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
FORWARDS = {  # as the wheels of these releases declare it
    "2.11": FORWARD + RESULTS,
    "2.14": FORWARD + ", Tensor? block_table=None, int? num_splits=None" + RESULTS,
}
BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)


class FakeOperator:
    """An operator of torch with a given schema: takes its arguments by that and calls run(arguments by name)."""

    def __init__(self, schema: str, run):
        self.default = SimpleNamespace(_schema=torch._C.parse_schema(schema))
        self.run = run

    def __call__(self, *args, **kwargs):
        declared = self.default._schema.arguments
        positional = [argument.name for argument in declared if not argument.kwarg_only]
        assert len(args) == len(positional), "every positional argument is given"
        assert kwargs.keys() <= {argument.name for argument in declared if argument.kwarg_only}, kwargs.keys()
        return self.run(dict(zip(positional, args, strict=True)) | kwargs)


def fake_aten(release: str) -> SimpleNamespace:
    """torch.ops.aten as far as flash attention goes, of torch 2.11 or 2.14."""

    def forward(given: dict):
        assert given.get("num_splits") == (1 if release == "2.14" else None)
        output, log_sums = cpu_forward(given["query"], given["key"], given["value"], *_asked(given))
        return output, log_sums, None, None, None

    def backward(given: dict):
        names = ("grad_out", "query", "key", "value", "out", "logsumexp")
        assert given["grad_out"].is_contiguous() and given["logsumexp"].is_contiguous()
        return cpu_backward(*(given[name] for name in names), *_asked(given))

    return SimpleNamespace(
        _flash_attention_forward=FakeOperator(FORWARDS[release], forward),
        _flash_attention_backward=FakeOperator(BACKWARD, backward),
    )


def _asked(given: dict) -> tuple[Blocks, ScoreRule, bool]:
    """As `varlen_attn` hands it down: causal is (-1, 0) with is_causal, a window (left, 0) without."""
    blocks = Blocks(given["cum_seq_q"], given["cum_seq_k"], given["max_q"], given["max_k"])
    assert blocks.max_queries == max(2, blocks.cu_queries.diff().max()) and given["dropout_p"] == 0
    left, right = given["window_size_left"], given["window_size_right"]
    assert given["is_causal"] == ((left, right) == (-1, 0))
    return blocks, ScoreRule(given["scale"], None if left < 0 else left + 1), right == 0


def fake_cute() -> SimpleNamespace:
    """flash_attn.cute.interface of flash-attn-4 4.0.0b36, as far as it is called."""

    def asked(cu_q, cu_k, max_q, max_k, scale, causal, left, right):
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        assert right is None or causal
        return Blocks(cu_q, cu_k, max_q, max_k), ScoreRule(scale, None if left is None else left + 1), causal

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
        return_lse=False,
    ):  # fmt: skip
        assert return_lse and qv is None and not softcap
        sizes = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        how = asked(*sizes, softmax_scale, causal, window_size_left, window_size_right)
        return *cpu_forward(q, k, v, *how), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):  # fmt: skip
        assert not softcap and not deterministic
        sizes = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        how = asked(*sizes, softmax_scale, causal, window_size_left, window_size_right)
        return cpu_backward(dout, q, k, v, out, lse, *how)

    return SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


def fake_flash2() -> SimpleNamespace:
    """flash_attn.flash_attn_interface of flash-attn 2.8, as far as it is called."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert dropout_p == 0 and not softcap and window_size_right == (0 if causal else -1)
        blocks = Blocks(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rule = ScoreRule(softmax_scale, None if window_size_left < 0 else window_size_left + 1)
        return *cpu_forward(q, k, v, blocks, rule, causal), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert alibi_slopes is None and not deterministic
        blocks = Blocks(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rule = ScoreRule(softmax_scale, None if window_size_left < 0 else window_size_left + 1)
        results = cpu_backward(dout, q, k, v, out, softmax_lse, blocks, rule, causal)
        for place, result in zip((dq, dk, dv), results, strict=True):
            place.copy_(result)
        return out.new_empty(0)

    return SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
