"""What an update by dpo-ds rl should be, computed the plain way: one process, full logits, loops and autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

BETA, CLIP, DECAY, VALUE_CLIP = 0.2, 0.15, 0.9, 0.1


def drift(group: int, completion: int, token: int) -> float:
    """By how much the policy's log-prob of a token was another when it drew."""
    return 0.3 * math.sin(1 + group + 2 * completion + 3 * token)


def token_logps(model, prompt, completion) -> Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return torch.stack([row[token] for row, token in zip(rows, completion, strict=True)])


def token_values(classifier, prompt, completion) -> Tensor:
    hidden = classifier.model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
    return classifier.score(hidden[len(prompt) - 1 : -1])[:, 0]


class RlOracle:
    """Losses of one update with these groups and scores [groups][n], with gradients by name after `backward`."""

    def __init__(self, paths: dict[str, str], groups, scores):
        kinds = {name: AutoModelForCausalLM for name in ("policy", "reference")}
        kinds["critic"] = AutoModelForSequenceClassification
        models = {name: kind.from_pretrained(paths[name], dtype=torch.float32).eval() for name, kind in kinds.items()}
        self.policy, self.critic, self.scores = models["policy"], models["critic"], scores
        drawn = [(g, c, group.prompt.tolist(), ids.tolist()) for g, group in enumerate(groups)
                 for c, ids in enumerate(group.completions)]  # fmt: skip
        self.places = [(g, c) for g, c, *_ in drawn]
        self.logps = [token_logps(self.policy, *texts) for _, _, *texts in drawn]
        self.values = [token_values(self.critic, *texts) for _, _, *texts in drawn]
        with torch.no_grad():
            self.reference = [token_logps(models["reference"], *texts) for _, _, *texts in drawn]
        self.old = [
            own.detach() + torch.tensor([drift(g, c, t) for t in range(len(own))])
            for (g, c), own in zip(self.places, self.logps, strict=True)
        ]
        self.totals = [
            scores[g][c] - BETA * (old - ref).sum().item()
            for (g, c), old, ref in zip(self.places, self.old, self.reference, strict=True)
        ]

    def reinforce(self) -> Tensor:
        return self._of_completions(self.totals)

    def rloo(self) -> Tensor:
        found = []
        for (g, c), own in zip(self.places, self.totals, strict=True):
            others = [r for (h, d), r in zip(self.places, self.totals, strict=True) if h == g and d != c]
            found.append(own - sum(others) / len(others))
        return self._of_completions(found)

    def grpo(self) -> Tensor:
        total = 0.0
        for (g, c), logps, old, ref in zip(self.places, self.logps, self.old, self.reference, strict=True):
            scores = torch.tensor(self.scores[g])
            advantage = (self.scores[g][c] - scores.mean()) / (scores.std(correction=0) + 1e-4)
            of_tokens = [
                clipped((logp - was).exp(), advantage) + BETA * ((r - logp).exp() - (r - logp) - 1)
                for logp, was, r in zip(logps, old, ref, strict=True)
            ]
            total = total + sum(of_tokens) / len(of_tokens)
        return total / len(self.places)

    def ppo(self) -> tuple[Tensor, Tensor]:
        """Of the policy and of the critic."""
        advantages, returns = [], []
        for (g, c), old, ref, values in zip(self.places, self.old, self.reference, self.values, strict=True):
            rewards = [-BETA * x for x in (old - ref).tolist()]
            rewards[-1] += self.scores[g][c]
            known, after, own = values.tolist(), 0.0, []
            for t in reversed(range(len(rewards))):
                following = known[t + 1] if t + 1 < len(rewards) else 0.0
                after = rewards[t] + following - known[t] + DECAY * after
                own.insert(0, after)
            advantages += own
            returns.append(torch.tensor(own) + values.detach())
        white = torch.tensor(advantages, dtype=torch.float64)
        white = ((white - white.mean()) / (white.std(correction=0) + 1e-8)).float()
        ratios = torch.cat([(logps - old).exp() for logps, old in zip(self.logps, self.old, strict=True)])
        losses = torch.stack([clipped(ratio, advantage) for ratio, advantage in zip(ratios, white, strict=True)])
        squares = [0.5 * (v - r).square() for v, r in zip(self.values, returns, strict=True)]
        return losses.mean(), torch.cat(squares).mean()  # values are where they were: nothing is held

    def online_dpo(self) -> Tensor:
        """-log σ(β Δ) of the best against the worst."""
        losses = []
        for g, scores in enumerate(self.scores):
            best, worst = (self.places.index((g, scores.index(pick(scores)))) for pick in (max, min))
            ratios = [(self.logps[i] - self.reference[i]).sum() for i in (best, worst)]
            losses.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
        return torch.stack(losses).mean()

    def gradients(self, loss: Tensor, model) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def _of_completions(self, advantages) -> Tensor:
        ratios = [(logps - old).sum().exp() for logps, old in zip(self.logps, self.old, strict=True)]
        return torch.stack([clipped(*both) for both in zip(ratios, advantages, strict=True)]).mean()


def clipped(ratio: Tensor, advantage) -> Tensor:
    """-min(ρA, clip(ρ) A): held where a step would lead farther from 1, and then without a gradient."""
    if advantage > 0 and ratio > 1 + CLIP:
        return torch.tensor(-(1 + CLIP) * float(advantage))
    if advantage < 0 and ratio < 1 - CLIP:
        return torch.tensor(-(1 - CLIP) * float(advantage))
    return -ratio * advantage
