"""Holds what was measured, and makes evaluation.json, completions.parquet and the report of it on rank 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ds.checkpoint.manifest import versions
from dpo_ds.cluster import shared_files
from dpo_ds.commands.evaluate import report
from dpo_ds.commands.evaluate.statistics import distribution, mean_of, mean_of_pairs, win_rate
from dpo_ds.config import ROWS, EvaluateConfig, to_plain
from dpo_ds.data.prompts import Prompt
from dpo_ds.models.generation import Completion
from dpo_ds.training.output_dir import METRICS, read_metrics

REFERENCE, BASELINE = ROWS
MOST = 0.9  # of the completions should end by themselves
SHOWN = 8  # prompts in the report's table of completions


@dataclass
class Measured:
    """Holds what was measured of one model, filled in one by one; None: not asked for.

    pair_logps, pair_reference [pairs, 2]: chosen and rejected. completions, texts: [prompts][n]. logps,
    reference_logps, scores, preferred [prompts, n]; in_orders [prompts, n, 2]: a judge's preference where ours came
    first, and second. All logps are sums over a completion's tokens.
    """

    name: str
    path: str
    beta: float
    completions: list[list[Completion]] | None = None
    texts: list[list[str]] | None = None
    pair_logps: np.ndarray | None = None
    pair_reference: np.ndarray | None = None
    logps: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    scores: np.ndarray | None = None
    preferred: np.ndarray | None = None
    in_orders: np.ndarray | None = None

    @property
    def rewards(self) -> np.ndarray:
        """Implicit ones of the pairs, [pairs, 2]: β (log π - log π_ref), without a reference β log π."""
        return self.beta * (self.pair_logps - (0 if self.pair_reference is None else self.pair_reference))

    @property
    def log_ratios(self) -> np.ndarray:  # [prompts, n]
        return self.logps - self.reference_logps


@dataclass
class Outcome:
    """Holds all models of a run. The rival is what win rates are against: the baseline, else the reference.

    pair_prompts [pairs]: numbers, the same for pairs of one prompt.
    """

    run: EvaluateConfig
    prompts: Sequence[Prompt]
    pair_prompts: np.ndarray
    policies: Sequence[Measured]
    reference: Measured | None
    baseline: Measured | None
    notes: Sequence[str]
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self):
        for model in self.rows:
            if model.completions is not None:
                model.texts = [[completion.text for completion in row] for row in model.completions]

    @property
    def rows(self) -> list[Measured]:
        return [model for model in (self.reference, self.baseline, *self.policies) if model is not None]

    @property
    def rival(self) -> Measured | None:
        return self.baseline or self.reference

    @property
    def completions_path(self) -> Path:
        return Path(self.run.output_dir) / "completions.parquet"

    def write_completions(self) -> None:
        """One row a completion; columns that a row has no value for are null."""
        columns: dict[str, list] = {}
        for model in self.rows:
            for row, texts in enumerate(model.texts or []):
                for draw, text in enumerate(texts):
                    for name, value in self._completion(model, row, draw, text).items():
                        columns.setdefault(name, []).append(value)
        if not columns:
            self.completions_path.unlink(missing_ok=True)
            return
        numbers = {"tokens": pa.int32(), "row": pa.int32(), "draw": pa.int32(), "finished": pa.bool_()}
        texts = dict.fromkeys(("model", "prompt", "completion", "location"), pa.string())
        fields = [(name, (numbers | texts).get(name, pa.float64())) for name in columns]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=pa.schema(fields)), sink)
        shared_files.write_whole(self.completions_path, sink.getvalue())

    def _completion(self, model: Measured, row: int, draw: int, text: str) -> dict:
        drawn = None if model.completions is None else model.completions[row][draw]

        def of(values: np.ndarray | None) -> float | None:
            return None if values is None else float(values[row, draw])

        return {
            "model": model.name,
            "row": row,
            "draw": draw,
            "location": self.prompts[row].location,
            "prompt": self.prompts[row].text,
            "completion": text,
            "tokens": None if drawn is None else len(drawn.ids),
            "finished": None if drawn is None else drawn.finished,
            "logp": of(model.logps),
            "reference_logp": of(model.reference_logps),
            "reward": of(model.scores),
            "preferred": of(model.preferred),
        }

    def write(self, ranks: int, seconds: float) -> Path:
        """evaluation.json, completions.parquet and report/, in place of what an earlier run left; prints the table."""
        folder = Path(self.run.output_dir)
        evaluation = self.evaluation(ranks, seconds)
        self.write_completions()
        shared_files.write_text(folder / "evaluation.json", json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
        print("\n".join([report.text_table(evaluation), *evaluation["notes"][len(self.notes) :]]), flush=True)
        shutil.rmtree(folder / "report", ignore_errors=True)
        (folder / "report").mkdir()
        self._draw(evaluation, folder / "report")
        report.write_html(evaluation, folder / "report", *self._samples())
        return folder / "report" / "report.html"

    def evaluation(self, ranks: int, seconds: float) -> dict:
        """Returns what evaluation.json holds."""
        counts = [f"{len(self.prompts):,} prompts x {self.run.evaluate.n} completions"] if self.prompts else []
        if self.policies[0].pair_logps is not None:
            counts.insert(0, f"{len(self.policies[0].pair_logps):,} pairs")
        policies = [self._row(policy) for policy in self.policies]
        cut = [row["name"] for row in policies if "samples" in row and row["samples"]["finished"] < MOST]
        notes = list(self.notes)
        if cut:
            limit = self.run.evaluate.max_new_tokens
            notes.append(
                f"more than {1 - MOST:.0%} of the completions of {', '.join(cut)} ran into evaluate.max_new_tokens "
                f"{limit}: what is said of them is said of their beginnings"
            )
        reference = None if self.reference is None else self._row(self.reference)
        if reference is not None and "samples" in reference:
            reference["samples"]["kl"] = {"mean": 0.0, "standard_error": 0.0}
        when = f"{datetime.now():%d %B %Y, %H:%M}, {seconds:.0f} s on {ranks} rank{'s' * (ranks > 1)}"
        return {
            "summary": f"{', '.join(counts)}; {when}",
            "policies": policies,
            "reference": reference,
            "baseline": None if self.baseline is None else self._row(self.baseline),
            "notes": notes,
            "config": to_plain(self.run),
            "versions": self.versions,
            "ranks": ranks,
            "seconds": seconds,
        }

    def _row(self, model: Measured) -> dict:
        row = {"name": model.name, "path": model.path, "beta": model.beta}
        if model.pair_logps is not None and model is not self.reference:
            row["pairs"] = pair_measures(model, self.pair_prompts)
        if model.texts is not None:
            row["samples"] = self._sample_measures(model)
        return row

    def _sample_measures(self, model: Measured) -> dict:
        found: dict = {"prompts": len(model.texts), "n": self.run.evaluate.n}
        if model.completions is not None:
            drawn = [completion for row in model.completions for completion in row]
            found["tokens"] = float(np.mean([len(completion.ids) for completion in drawn]))
            found["finished"] = float(np.mean([completion.finished for completion in drawn]))
        if model.reference_logps is not None:
            found["kl"] = mean_of(model.log_ratios)
        if model.scores is not None:
            found["reward"] = mean_of(model.scores) | distribution(model.scores)
        if model.preferred is not None:
            found["win_rate"] = win_rate(model.preferred, self.run.evaluate.bootstrap, self.run.evaluate.seed)
            found["win_rate"]["against"] = self.rival.path
        if model.in_orders is not None:
            first, second = model.in_orders[..., 0], model.in_orders[..., 1]
            found["win_rate"]["first_position"] = float((0.5 + (first - second) / 2).mean())
            found["win_rate"]["orders_disagree"] = float(((first - 0.5) * (second - 0.5) < 0).mean())
        return found

    def points(self, evaluation: dict) -> list[dict]:
        """For the frontier: every row with a KL and a reward."""
        points = []
        for row in [evaluation["reference"], *evaluation["policies"]]:
            samples = (row or {}).get("samples", {})
            if "kl" in samples and "reward" in samples:
                kl, reward = samples["kl"], samples["reward"]
                errors = {"kl_se": kl["standard_error"], "reward_se": reward["standard_error"]}
                points.append({"name": row["name"], "kl": kl["mean"], "reward": reward["mean"], **errors})
        return points

    def _draw(self, evaluation: dict, folder: Path) -> None:
        from dpo_ds.commands.evaluate import plots  # matplotlib takes a second

        points = self.points(evaluation)
        if points:
            plots.frontier_png(points, folder / "frontier.png")
        margins = {p.name: p.rewards[:, 0] - p.rewards[:, 1] for p in self.policies if p.pair_logps is not None}
        if margins:
            plots.histogram_png(margins, folder / "margins.png", "reward of chosen minus rejected", zero=True)
        scores = {model.name: model.scores for model in self.rows if model.scores is not None}
        if scores:
            plots.histogram_png(scores, folder / "rewards.png", "reward")
        runs = {policy.name: training_metrics(Path(policy.path)) for policy in self.policies}
        runs = {name: lines for name, lines in runs.items() if lines}
        if runs:
            plots.curves_png(runs, folder / "curves.png")

    def _samples(self) -> tuple[list[str], list[tuple[str, list[tuple[str, float | None]]]]]:
        """The report's table: names, and of some prompts, evenly spread, everyone's first completion and its score."""
        models = [model for model in self.rows if model.texts is not None]
        spread = np.unique(np.linspace(0, len(self.prompts) - 1, SHOWN).astype(int)) if self.prompts else []
        rows = [
            (
                self.prompts[row].text,
                [(m.texts[row][0], None if m.scores is None else float(m.scores[row, 0])) for m in models],
            )
            for row in spread
        ]
        return [model.name for model in models], rows


def pair_measures(model: Measured, prompts: np.ndarray) -> dict:
    """Implicit rewards of the pairs, under the names that training logs them by; prompts [pairs]: each pair's."""
    rewards = model.rewards
    margins = rewards[:, 0] - rewards[:, 1]
    values = {
        "rewards/accuracies": margins > 0,
        "rewards/margins": margins,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "logps/chosen": model.pair_logps[:, 0],
        "logps/rejected": model.pair_logps[:, 1],
    }
    measures = {name: mean_of_pairs(of, prompts) for name, of in values.items()}
    measures["rewards/margins"] |= distribution(margins)
    return {"pairs": len(rewards), **measures}


def training_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl of the run whose final/ `path` is; none if there is no such file."""
    return read_metrics(path.parent / METRICS) if path.is_dir() else []
