"""The varlen flash kernels that packed attention runs on, each as a forward and a backward of one call over blocks.

    forward(query [T, H, D], key [K, G, D], value [K, G, D], blocks, rule, causal) -> output [T, H, D], log_sums [H, T]
    backward(grad, query, key, value, output, log_sums, blocks, rule, causal) -> gradients by query, key, value

log_sums is the natural log of the sum of a query's exponentiated scores, float32. Causal blocks are aligned
bottom-right: a block's last query sees its last key. Backward may be given the output and log-sums of a larger
attention of which the call is a part: a weight is exp(score - log_sum), and nothing else is asked of the forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import Blocks

aten = torch.ops.aten


class Kernel(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _torch_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, rule: ScoreRule, causal: bool
) -> tuple[Tensor, Tensor]:
    """Calls torch's own flash attention 2, or what was activated in its place. By its operator and not by
    `varlen_attn`, whose signature is another in 2.10, 2.11 and 2.12 and which from 2.14 on may choose cuDNN: the
    operator's differs by num_splits alone, takes fewer key heads without being told, and it gives the log-sums.
    """
    assert not rule.softcap, "backend_for gives soft-capped models another kernel"
    # One split: a pair's result does not depend on what else is in the pack. Before 2.12 there is no other way.
    invariant = {"num_splits": 1} if "num_splits" in _arguments(aten._flash_attention_forward) else {}
    output, log_sums, *_ = aten._flash_attention_forward(
        query,
        key,
        value,
        *_block_arguments(blocks),
        0.0,
        causal and not rule.window,
        False,
        scale=rule.scale,
        **_window(rule, causal),
        **invariant,
    )
    return output, log_sums


def _torch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    blocks: Blocks,
    rule: ScoreRule,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        log_sums,
        *_block_arguments(blocks),
        0.0,
        causal and not rule.window,
        *no_dropout,
        scale=rule.scale,
        **_window(rule, causal),
    )


@cache
def _arguments(operator) -> frozenset[str]:
    return frozenset(argument.name for argument in operator.default._schema.arguments)


def _block_arguments(blocks: Blocks) -> tuple[Tensor, Tensor, int, int]:
    """Says 2 queries at least, which bounds the grid and nothing else: at 1 flash attention 2 begins to split keys."""
    return blocks.cu_queries, blocks.cu_keys, max(2, blocks.max_queries), blocks.max_keys


def _window(rule: ScoreRule, causal: bool) -> dict[str, int]:
    """Counts as flash attention does: keys besides the query's own, -1 for no limit."""
    return {
        "window_size_left": rule.window - 1 if rule.window else -1,
        "window_size_right": 0 if causal else -1,
    }


def _flash3_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, rule: ScoreRule, causal: bool
) -> tuple[Tensor, Tensor]:
    """Calls flash-attn-3, which torch puts in place of its own kernels for the whole process, SDPA's included."""
    if torch_attention.current_flash_attention_impl() != "FA3":
        torch_attention.activate_flash_attention_impl("FA3")
    return _torch_forward(query, key, value, blocks, rule, causal)


def _cute_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, rule: ScoreRule, causal: bool
) -> tuple[Tensor, Tensor]:
    """Calls flash-attn-4 itself: torch's registration of it (2.11) expects two results where newer ones return five."""
    results = import_package("flash-attn-4")._flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=blocks.cu_queries,
        cu_seqlens_k=blocks.cu_keys,
        max_seqlen_q=blocks.max_queries,
        max_seqlen_k=blocks.max_keys,
        softmax_scale=rule.scale,
        causal=causal,
        softcap=rule.softcap,
        return_lse=True,
        **_cute_window(rule),
    )
    return results[0], results[1]


def _cute_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    blocks: Blocks,
    rule: ScoreRule,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return import_package("flash-attn-4")._flash_attn_bwd(
        query,
        key,
        value,
        output,
        grad,
        log_sums,
        softmax_scale=rule.scale,
        causal=causal,
        softcap=rule.softcap or 0.0,
        cu_seqlens_q=blocks.cu_queries,
        cu_seqlens_k=blocks.cu_keys,
        max_seqlen_q=blocks.max_queries,
        max_seqlen_k=blocks.max_keys,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_cute_window(rule),
    )[:3]


def _cute_window(rule: ScoreRule) -> dict[str, int]:
    """Gives nothing where there is no window: causal says it all."""
    return {"window_size_left": rule.window - 1, "window_size_right": 0} if rule.window else {}


def _flash2_forward(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, rule: ScoreRule, causal: bool
) -> tuple[Tensor, Tensor]:
    """Calls flash-attn 2.7 or later."""
    output, log_sums, *_ = import_package("flash-attn")._flash_attn_varlen_forward(
        query,
        key,
        value,
        *_block_arguments(blocks),
        dropout_p=0.0,
        softmax_scale=rule.scale,
        causal=causal,
        softcap=rule.softcap or 0.0,
        **_window(rule, causal),
    )
    return output, log_sums


def _flash2_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    blocks: Blocks,
    rule: ScoreRule,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_empty(x.shape) for x in (query, key, value))
    import_package("flash-attn")._flash_attn_varlen_backward(
        grad,
        query,
        key,
        value,
        output,
        log_sums,
        *gradients,
        *_block_arguments(blocks),
        dropout_p=0.0,
        softmax_scale=rule.scale,
        causal=causal,
        softcap=rule.softcap or 0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_window(rule, causal),
    )
    return gradients


KERNELS = {
    "flash-attn-4": Kernel(_cute_forward, _cute_backward),
    "flash-attn-3": Kernel(_flash3_forward, _torch_backward),
    "torch-varlen": Kernel(_torch_forward, _torch_backward),
    "flash-attn": Kernel(_flash2_forward, _flash2_backward),
}

# Where each kernel's functions are. The wheel flash-attn-4 fills flash_attn/cute alone and flash-attn 2 all but that,
# so that `flash_attn` being found says nothing.
PACKAGES = {
    "flash-attn-4": "flash_attn.cute.interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn.flash_attn_interface",
}


@cache
def import_package(kernel: str):
    return importlib.import_module(PACKAGES[kernel])


def is_installed(kernel: str) -> bool:
    """Tells whether the kernel's package can be imported.

    Raises:
        ImportError, OSError, RuntimeError, AttributeError: it is there and its import fails.
    """
    if kernel not in PACKAGES:
        return True
    try:
        import_package(kernel)
    except ModuleNotFoundError as error:
        if error.name and f"{PACKAGES[kernel]}.".startswith(f"{error.name}."):
            return False
        raise
    return True
