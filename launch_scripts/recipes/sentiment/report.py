"""The experiment's report: a picture, tables in Markdown, and in words which policy has more reward where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from launch_scripts.recipes.sentiment.outcome import (
    LEVEL,
    TITLES,
    EqualKL,
    Outcome,
    Row,
    Verdict,
    mean_and_error,
    series,
)

PICTURE, RESULTS, REPORT = "frontier.png", "results.json", "report.md"
WORDS = {
    Verdict.HIGHER: "higher than {}",
    Verdict.LOWER: "lower than {}",
    Verdict.NOT_APART: "not told apart from {}",
    Verdict.BEYOND: "at more KL than any point of {}, where there is nothing to compare with",
}


def write(outcome: Outcome, folder: Path) -> None:
    """RESULTS, REPORT and PICTURE."""
    from dpo_ds.commands.evaluate import plots  # matplotlib takes a second

    found = {"rows": [asdict(row) | {"title": row.title} for row in outcome.rows]}
    for name in ("at_equal_kl", "learned_at_equal_kl"):
        found[name] = [asdict(at) | {"difference": at.difference} for at in getattr(outcome, name)()]
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT).write_text(f"![reward against KL]({PICTURE})\n\n{markdown(outcome)}\n", encoding="utf-8")
    plots.frontier_png([_point(row) for row in outcome.rows], folder / PICTURE, "mean reward, p(positive)", roots=True)


def markdown(outcome: Outcome) -> str:
    """All policies, then for both comparisons a table and its findings."""
    parts = [table(outcome.rows)]
    comparisons = {
        "Against DPO": outcome.at_equal_kl(),
        "A learned reward against the ground truth, by the same algorithm": outcome.learned_at_equal_kl(),
    }
    for heading, ats in comparisons.items():
        if ats:
            how = "at the same KL, read off the line through π_ref and the other's points"
            parts += [f"{heading}, {how}:", equal_kl_table(ats), f"{_how(len(ats[0].kl))}:", findings(ats)]
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """± is a standard error over the seeds."""
    lines = ["| policy | KL(π ‖ π_ref), nats | reward | tokens | ended |", "| --- |" + " ---: |" * 4]
    for row in rows:
        cells = [row.title, shown(row.kl, 2), shown(row.reward, 3)]
        lines.append(_line(*cells, f"{np.mean(row.tokens):.1f}", f"{np.mean(row.finished):.0%}"))
    return "\n".join(lines)


def equal_kl_table(ats: Sequence[EqualKL]) -> str:
    heading = _line("at the KL of", "KL, nats", "its reward", "the other's", "that less its own")
    lines = [heading, "| --- |" + " ---: |" * 4]
    for at in ats:
        there = [shown(at.there, 3), shown(at.difference, 3)]
        if at.verdict is Verdict.BEYOND:
            there = [f"the last point has {there[0]}", ""]
        lines.append(_line(at.title, shown(at.kl, 2), shown(at.reward, 3), *there))
    return "\n".join(lines)


def findings(ats: Sequence[EqualKL]) -> str:
    """Says what is higher where: a line for each verdict, its policies in the order of KL."""
    lines = []
    for method in dict.fromkeys(at.method for at in ats):
        for verdict, words in WORDS.items():
            members = sorted((np.mean(at.kl), _found(at)) for at in ats if (at.method, at.verdict) == (method, verdict))
            if members:
                lines.append(f"- {words.format(method)}: {'; '.join(found for _, found in members)}")
    return "\n".join(lines)


def shown(values: Sequence[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _found(at: EqualKL) -> str:
    own, there = np.mean(at.reward), np.mean(at.there)
    against = "" if at.verdict is Verdict.BEYOND else f" against {there:.3f}"
    return f"{at.title} ({own:.3f}{against} at {np.mean(at.kl):.2f} nats)"


def _how(seeds: int) -> str:
    if seeds == 1:
        return "Which is higher, by the sign alone, as one seed has no interval"
    return (
        f"Which is higher, where the {LEVEL:.0%} interval of the difference leaves out 0 (Student's t, {seeds} seeds)"
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _point(row: Row) -> dict:
    (kl, kl_se), (reward, reward_se) = mean_and_error(row.kl), mean_and_error(row.reward)
    point = {"name": "reference", "kl": kl, "kl_se": kl_se, "reward": reward, "reward_se": reward_se}
    if row.policy is not None:
        point |= {"name": row.title, "series": series(row.policy), "beta": row.policy.beta}
        point |= {"dashed": TITLES[row.policy.loss]} if row.policy.learned else {}
    return point
