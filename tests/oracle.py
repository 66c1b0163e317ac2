"""What a run should give, computed the plain way: one process, full logits, autograd."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@dataclass
class Oracle:
    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]


def relative_errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """|found - wanted| / |wanted| by name; what is below a thousandth of the largest is measured by that."""
    least = 1e-3 * max(gradient.norm().item() for gradient in wanted.values())
    return {name: ((found[name] - own).norm() / max(own.norm().item(), least)).item() for name, own in wanted.items()}


def sequence_logp(model, prompt, completion, mask) -> torch.Tensor:
    """The sum of the trained tokens' log-probs, one unpadded sequence, from the model's own logits."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
    logits = model(input_ids=ids).logits[0].float()
    total = logits.new_zeros(())
    for i, (token, wanted) in enumerate(zip(completion, mask, strict=True)):
        if wanted:
            total = total + logits[len(prompt) + i - 1].log_softmax(-1)[token]
    return total


def dpo_by_autograd(policy_path, reference_path, pairs, beta, label_smoothing=0.0, attn="auto") -> Oracle:
    """Mean DPO loss over `pairs` and its gradient by name."""
    options = {} if attn == "auto" else {"attn_implementation": attn}
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32, **options).eval()
    reference = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32, **options).eval()
    losses = []
    for pair in pairs:
        chosen = (pair.prompt, pair.chosen, pair.masks[0])
        rejected = (pair.prompt, pair.rejected, pair.masks[1])
        with torch.no_grad():
            anchor = sequence_logp(reference, *chosen) - sequence_logp(reference, *rejected)
        logit = beta * (sequence_logp(policy, *chosen) - sequence_logp(policy, *rejected) - anchor)
        losses.append(-(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit))
    return _by_autograd(policy, losses)


def score(classifier, ids) -> torch.Tensor:
    """A scalar, at the last token of one unpadded sequence, by the classifier's own forward."""
    classifier.config.pad_token_id = None  # else it passes over a last token that equals it
    return classifier(input_ids=torch.as_tensor(ids)[None]).logits[0, 0]


def reward_by_autograd(path, pairs, margins, centering) -> Oracle:
    """Mean Bradley-Terry loss over `pairs` and its gradient by name."""
    classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    losses = []
    for pair, margin in zip(pairs, margins, strict=True):
        chosen, rejected = (
            score(classifier, np.concatenate([pair.prompt, side])) for side in (pair.chosen, pair.rejected)
        )
        losses.append(-logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2)
    return _by_autograd(classifier, losses)


def _by_autograd(model, losses) -> Oracle:
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    return Oracle(loss.item(), norm, gradients)
