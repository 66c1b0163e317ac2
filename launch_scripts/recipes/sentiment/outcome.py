"""What the experiment found: reward and KL of every policy over the seeds, and which of two is higher at equal KL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from launch_scripts.recipes.sentiment.plan import REINFORCED, Policy

TITLES = {
    "dpo": "DPO", "ipo": "IPO", "orpo": "ORPO", "preferred": "SFT on preferred", "ppo": "PPO", "rloo": "RLOO",
    "online_dpo": "online DPO",
}  # fmt: skip
COMPARED = ("preferred", *REINFORCED)  # with DPO, at their KL
LEVEL = 0.95  # of the interval that leaves out 0 where one is higher


class Verdict(str, Enum):
    """Of a policy against another method at its KL; BEYOND all of that one's points there is nothing to compare."""

    HIGHER = "higher"
    LOWER = "lower"
    NOT_APART = "not told apart"
    BEYOND = "beyond"


@dataclass(frozen=True)
class Row:
    """kl (nats a completion) and reward of a policy, one of each a seed, tokens of its completions and the share of
    them that ended; None: the reference.
    """

    policy: Policy | None
    kl: list[float]
    reward: list[float]
    tokens: list[float]
    finished: list[float]

    @property
    def title(self) -> str:
        if self.policy is None:
            return "π_ref"
        beta, rate = self.policy.beta, self.policy.learning_rate
        return f"{series(self.policy)}, {f'learning rate {rate:g}' if beta is None else f'β {beta:g}'}"


@dataclass(frozen=True)
class EqualKL:
    """A policy against another method at its KL, one of each a seed. there: the method's reward, read off the line
    through π_ref and its points in the order of KL; beyond the last of them that one's.
    """

    title: str
    method: str
    kl: list[float]
    reward: list[float]
    there: list[float]
    verdict: Verdict

    @property
    def difference(self) -> list[float]:
        return _differences(self.there, self.reward)


@dataclass(frozen=True)
class Outcome:
    """The reference's row first."""

    rows: list[Row]

    @classmethod
    def read(cls, evaluations: Sequence[Path], policies: Sequence[Policy]) -> Outcome:
        """From the evaluation.json of every seed."""
        seeds = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in evaluations]
        named = [{row["name"]: row["samples"] for row in [seed["reference"], *seed["policies"]]} for seed in seeds]

        def row(policy: Policy | None) -> Row:
            found = [samples["reference" if policy is None else policy.name] for samples in named]
            measured = ([samples[key]["mean"] for samples in found] for key in ("kl", "reward"))
            return Row(policy, *measured, *([samples[key] for samples in found] for key in ("tokens", "finished")))

        return cls([row(policy) for policy in [None, *policies]])

    def at_equal_kl(self) -> list[EqualKL]:
        """DPO at the KL of SFT on the preferred completions, at every learning rate, and of what draws for itself."""
        others = [row for row in self.rows if row.policy and row.policy.loss in COMPARED]
        return [self._against("dpo", TITLES["dpo"], row) for row in others]

    def learned_at_equal_kl(self) -> list[EqualKL]:
        """The ground truth as reward at the KL of every policy of a learned one, by the same algorithm where it was
        trained with both.
        """
        with_truth = {row.policy.loss for row in self.rows if row.policy and not row.policy.learned}
        learned = [row for row in self.rows if row.policy and row.policy.learned and row.policy.loss in with_truth]
        methods = [f"{TITLES[row.policy.loss]} of the ground truth" for row in learned]
        return [self._against(row.policy.loss, of, row) for row, of in zip(learned, methods, strict=True)]

    def _against(self, loss: str, method: str, row: Row) -> EqualKL:
        points = [own for own in self.rows if own.policy and own.policy.loss == loss and not own.policy.learned]
        there, is_beyond = [], True
        for seed, kl in enumerate(row.kl):
            line = sorted((own.kl[seed], own.reward[seed]) for own in [self.rows[0], *points])
            there.append(float(np.interp(kl, *zip(*line, strict=True))))
            is_beyond &= kl > line[-1][0]
        verdict = Verdict.BEYOND if is_beyond else compared(row.reward, there)
        return EqualKL(row.title, method, row.kl, row.reward, there, verdict)


def series(policy: Policy) -> str:
    """Returns what its curve is called."""
    return TITLES[policy.loss] + (" of a learned reward" if policy.learned else "")


def compared(own: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """HIGHER or LOWER where the interval of the difference over the seeds leaves out 0 (Student's t), else NOT_APART.
    Of one seed there is no interval, and the sign decides.
    """
    mean, error = mean_and_error(_differences(own, theirs))
    if error is not None and abs(mean) <= student.ppf((1 + LEVEL) / 2, len(own) - 1) * error:
        return Verdict.NOT_APART
    return Verdict.HIGHER if mean > 0 else Verdict.LOWER


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; no error of one."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]
