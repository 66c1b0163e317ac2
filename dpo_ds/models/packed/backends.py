"""The kernel that serves a packed attention: the fastest whose package can be imported and which has shown on this very
device, when the canary tried it, that it computes what it should. A kernel that is passed over is told of."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from dpo_ds.batch import Segment
from dpo_ds.errors import first_line
from dpo_ds.models.packed.kernels import is_installed
from dpo_ds.models.packed.sdpa import ScoreRule, sdpa
from dpo_ds.models.packed.segments import SegmentTable
from dpo_ds.models.packed.varlen import varlen_attention

HALF_TYPES = (torch.float16, torch.bfloat16)
TRIAL_TOLERANCE = 0.02  # relative error of output and gradients against float32; bfloat16 rounds to 0.002 to 0.004
TRIAL_GROUPS = ((150, 60, 200), (3, 130, 1), (0, 5, 40), (260, 1, 70, 30, 5))  # whole tiles of 128 rows and bits

# (kernel, device type, dtype, head width, value width, is soft-capped): why it does not serve.
_refused: dict[tuple, str] = {}


@cache
def backend_for(
    device: torch.device, dtype: torch.dtype, head_width: int, value_width: int | None = None, softcap: bool = False
) -> str:
    """Returns the kernel that packed attention runs: the first candidate not found wanting, "sdpa" if all were."""
    value_width = value_width or head_width
    for kernel in _candidates(device, dtype, head_width, value_width, softcap):
        case = (kernel, device.type, dtype, head_width, value_width, softcap)
        try:
            if case not in _refused and is_installed(kernel):
                return kernel
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # found, but not for this torch or CUDA
            _refused[case] = first_line(error)
    return "sdpa"


def _candidates(
    device: torch.device, dtype: torch.dtype, head_width: int, value_width: int, softcap: bool
) -> tuple[str, ...]:
    """Returns the kernels that may serve, the fastest first. They want an Ampere or later GPU, a 16-bit type and value
    heads as wide as the keys', a multiple of 8 and 256 at most; flash-attn-3 a Hopper GPU, flash-attn-4 that or a later
    one. flash-attn-4 and flash-attn 2 alone know soft-caps.
    """
    fits = head_width <= 256 and head_width % 8 == 0 and value_width == head_width and dtype in HALF_TYPES
    if not fits or device.type != "cuda":
        return ()
    major = torch.cuda.get_device_capability(device)[0]
    if major < 8:
        return ()
    newest = (("flash-attn-4",) if major >= 9 else ()) + (("flash-attn-3",) if major == 9 else ())
    if softcap:
        return *(kernel for kernel in newest if kernel == "flash-attn-4"), "flash-attn"
    return *newest, "torch-varlen", "flash-attn"


def attend(
    query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule, merge: bool | None = None
) -> Tensor:
    """Attends by the kernel that serves these: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D],
    contiguous as transformers' own attentions give it: some models view it (JetMoe).
    """
    backend = backend_of(query, value, rule)
    if backend == "sdpa":
        return sdpa(query, key, value, table, rule)
    return varlen_attention(backend, query, key, value, table, rule, merge)


def backend_of(query: Tensor, value: Tensor, rule: ScoreRule) -> str:
    return backend_for(query.device, query.dtype, query.shape[-1], value.shape[-1], bool(rule.softcap))


def try_backends(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> None:
    """Settles which kernel serves tensors like these, [1, heads, T, D] each. It is tried, forward and backward, keys
    copied and merged, against float32; one that raises or errs gives way to the next."""
    heads, key_heads = query.shape[1], key.shape[1]
    while (backend := backend_of(query, value, rule)) != "sdpa":
        reason = _trial(backend, query.device, query.dtype, heads, key_heads, query.shape[-1], rule)
        if reason is None:
            return
        case = (backend, query.device.type, query.dtype, query.shape[-1], value.shape[-1], bool(rule.softcap))
        _refused[case] = reason
        backend_for.cache_clear()


def refused_backends() -> list[str]:
    """Returns a line for each kernel that is there and does not serve: why, and what serves in its place."""
    lines = []
    for (kernel, device, dtype, head_width, value_width, softcap), reason in list(_refused.items()):
        serves = backend_for(torch.device(device), dtype, head_width, value_width, softcap)
        lines.append(f"packed attention: {kernel} cannot serve heads of {head_width} ({reason}); {serves} does")
    return lines


@cache
def _trial(
    kernel: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, rule: ScoreRule
) -> str | None:
    """Tells what is wrong with a kernel, or None."""
    table = _trial_table()
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [
            torch.randn(1, n, table.length, width, device=device, dtype=dtype, generator=generator).requires_grad_()
            for n in (heads, key_heads, key_heads)
        ]
        grad = torch.randn(1, table.length, heads, width, device=device, dtype=dtype, generator=generator)
        exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
        exact = sdpa(*exact_inputs, table, rule)
        exact_results = exact, *torch.autograd.grad(exact, exact_inputs, grad.float())
        for merge in (False,) if rule.window or rule.softcap else (False, True):
            try:
                output = varlen_attention(kernel, *inputs, table, rule, merge)
                results = output, *torch.autograd.grad(output, inputs, grad)
            except Exception as error:  # a kernel compiled on the spot raises what it likes; the reason is told
                if kernel == "flash-attn-3" and torch_attention.current_flash_attention_impl() == "FA3":
                    torch_attention.restore_flash_attention_impl()
                return first_line(error)
            errors = [_relative(x, y) for x, y in zip(results, exact_results, strict=True)]
            if not max(errors) <= TRIAL_TOLERANCE:  # also when it is not a number
                return f"its results are off by {max(errors):.1e}, more than {TRIAL_TOLERANCE}"
    return None


def _trial_table() -> SegmentTable:
    segments, start = [], 0
    for prompt, *completions in TRIAL_GROUPS:
        segments.append(Segment(start, prompt, tuple(completions)))
        start = segments[-1].end
    return SegmentTable(tuple(segments))


def _relative(x: Tensor, exact: Tensor) -> float:
    return ((x.float() - exact).norm() / exact.norm()).item()
