"""What the experiment found: reward and KL of every policy over the seeds, DPO against SFT at equal KL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from launch_scripts.recipes.sentiment.plan import REINFORCED, Policy

PICTURE, RESULTS = "frontier.png", "results.json"
TITLES = {
    "dpo": "DPO", "ipo": "IPO", "orpo": "ORPO", "preferred": "SFT on preferred", "ppo": "PPO", "rloo": "RLOO",
    "online_dpo": "online DPO",
}  # fmt: skip
COMPARED = ("preferred", *REINFORCED)  # with DPO, at their KL


@dataclass(frozen=True)
class Row:
    """kl (nats a completion) and reward of a policy, one of each a seed; None: the reference."""

    policy: Policy | None
    kl: list[float]
    reward: list[float]

    @property
    def title(self) -> str:
        if self.policy is None:
            return "π_ref"
        beta, rate = self.policy.beta, self.policy.learning_rate
        return f"{series(self.policy)}, {f'learning rate {rate:g}' if beta is None else f'β {beta:g}'}"


@dataclass(frozen=True)
class EqualKL:
    """A policy against DPO at its KL, one of each a seed. dpo: read off the line through π_ref and DPO's points in the
    order of KL; beyond the last of them that one's reward. difference: dpo - reward.
    """

    title: str
    kl: list[float]
    reward: list[float]
    dpo: list[float]

    @property
    def difference(self) -> list[float]:
        return [ours - theirs for ours, theirs in zip(self.dpo, self.reward, strict=True)]


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
            return Row(policy, *([samples[key]["mean"] for samples in found] for key in ("kl", "reward")))

        return cls([row(policy) for policy in [None, *policies]])

    def at_equal_kl(self) -> list[EqualKL]:
        """SFT on the preferred completions, at every learning rate, and what draws for itself."""
        line = [row for row in self.rows if row.policy is None or row.policy.loss == "dpo"]
        others = [row for row in self.rows if row.policy is not None and row.policy.loss in COMPARED]
        return [EqualKL(row.title, row.kl, row.reward, _read_off(line, row.kl)) for row in others]

    def table(self) -> str:
        """Markdown; ± is a standard error over the seeds."""
        lines = ["| policy | KL(π ‖ π_ref), nats | reward |", "| --- | ---: | ---: |"]
        lines += [f"| {row.title} | {shown(row.kl, 2)} | {shown(row.reward, 3)} |" for row in self.rows]
        return "\n".join(lines)

    def equal_kl_table(self) -> str:
        lines = ["| at the KL of | KL, nats | its reward | DPO's reward | difference |", "| --- |" + " ---: |" * 4]
        for at in self.at_equal_kl():
            values = [shown(at.kl, 2), *(shown(of, 3) for of in (at.reward, at.dpo, at.difference))]
            lines.append(f"| {' | '.join([at.title, *values])} |")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """RESULTS and PICTURE."""
        from dpo_ds.commands.evaluate import plots  # matplotlib takes a second

        equal = [asdict(at) | {"difference": at.difference} for at in self.at_equal_kl()]
        rows = [asdict(row) | {"title": row.title} for row in self.rows]
        text = json.dumps({"rows": rows, "at_equal_kl": equal}, indent=1, ensure_ascii=False)
        (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
        plots.frontier_png([_point(row) for row in self.rows], folder / PICTURE, "mean reward, p(positive)")


def series(policy: Policy) -> str:
    """Returns what its curve is called."""
    return TITLES[policy.loss] + (" of a learned reward" if policy.learned else "")


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; no error of one."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def shown(values: Sequence[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _read_off(line: Sequence[Row], kl: Sequence[float]) -> list[float]:
    rewards = []
    for seed, at in enumerate(kl):
        points = sorted((row.kl[seed], row.reward[seed]) for row in line)
        rewards.append(float(np.interp(at, *zip(*points, strict=True))))
    return rewards


def _point(row: Row) -> dict:
    (kl, kl_se), (reward, reward_se) = mean_and_error(row.kl), mean_and_error(row.reward)
    point = {"name": "reference", "kl": kl, "kl_se": kl_se, "reward": reward, "reward_se": reward_se}
    if row.policy is not None:
        point |= {"name": row.title, "series": series(row.policy), "beta": row.policy.beta}
    return point
