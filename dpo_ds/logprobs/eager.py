"""The oracle: one float32 [N, V] matrix of logits and torch's own log_softmax (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    scale: float,
    softcap: float | None,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    """(logps,) or (logps, entropy, hits, log_sum_p2), each [N]; differentiable through torch's autograd."""
    dtype = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
    logits_NV = scale * F.linear(hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logps_NV = F.log_softmax(logits_NV, dim=-1)
    logps_N = logps_NV.gather(1, targets_N[:, None]).squeeze(1)
    if not with_statistics:
        return (logps_N,)
    with torch.no_grad():
        entropy_N = -(logps_NV.exp() * logps_NV).sum(1)
        best_N = logits_NV.amax(1)
        hits_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1).eq(best_N).to(dtype)
        return logps_N, entropy_N, hits_N, torch.logsumexp(2 * logps_NV, dim=1)
