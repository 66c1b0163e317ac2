"""Follows one metric over a run's evaluations: which checkpoint is the best one, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dpo_ds.checkpoint.manifest import open_folder, step_folder
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives
from dpo_ds.config import SftConfig
from dpo_ds.config.evaluation import LOSS, better
from dpo_ds.data import GroupDataset
from dpo_ds.errors import TrainingError

COURSE = "course"  # in a checkpoint


@dataclass
class Course:
    """Holds the best value of `metric` so far, its step, and how many evaluations in a row came after it.

    keeps: the best checkpoint is kept, and exported. patience: evaluations in a row without a better value that end the
    run; 0 for any number. rows: the content of the data that is evaluated on. kept: the values of the steps whose
    checkpoints were to be kept as the best; a save may fail, and then a later step is measured by the one before.
    """

    metric: str
    keeps: bool
    patience: int
    rows: str = ""
    value: float | None = None
    step: int = 0
    worse: int = 0
    kept: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: SftConfig, rows: GroupDataset | None) -> Course | None:
        """Returns what checkpoint.best and train.stop_after_worse ask for; None where neither does. rows: of data.eval.
        All ranks enter.
        """
        best, patience = run.checkpoint.best, run.train.stop_after_worse
        if best is None and not patience:
            return None
        content = collectives.from_rank_0(rows.content() if collectives.rank() == 0 else None)
        return cls(best or LOSS, best is not None, patience, content)

    @property
    def has_seen_enough(self) -> bool:
        return 0 < self.patience <= self.worse

    @property
    def reason(self) -> str:
        """Why the run ends early."""
        text = f"train.stop_after_worse {self.patience}: {self.worse} evaluations in a row without a "
        if self.value is None:
            return f"{text}{self.metric} that is a number"
        return f"{text}better {self.metric} than {self.value:.6g} of step {self.step}"

    def observe(self, step: int, evaluation: dict[str, float], best: int) -> bool:
        """Takes an evaluation in; tells whether the checkpoint of this step is now the one to keep. All ranks enter.

        best: the step whose checkpoint is the one to keep so far, 0 for none.
        """
        found = collectives.from_rank_0(evaluation[self.metric])  # no rank may decide otherwise by a last bit
        if self._is_better(found, self.value):
            self.value, self.step, self.worse = found, step, 0
        else:
            self.worse += 1
        keeps = self.keeps and self._is_better(found, self.kept.get(best))
        if keeps:
            self.kept[step] = found
        return keeps

    def _is_better(self, found: float, before: float | None) -> bool:
        sign = -1 if better(self.metric) == "lower" else 1
        return not math.isnan(found) and (before is None or sign * found > sign * before)

    def note(self, best: int) -> list[str]:
        """Returns a line where the checkpoint of `best`, 0 for none, is not that of the best step of the whole run."""
        if not self.keeps or best == self.step:
            return []
        instead = f"of step {best}, {self.kept[best]:.6g}" if best else "the last step"
        what = f"{self.value:.6g} of step {self.step}"
        return [f"checkpoint.best {self.metric}: {what}; a checkpoint of it was not saved, and final/ is {instead}"]

    def state(self) -> dict:
        found = {"value": self.value, "step": self.step, "worse": self.worse, "kept": self.kept}
        return {"metric": self.metric, "rows": self.rows} | found

    def load_state(self, state: dict | None, writer: CheckpointWriter) -> list[str]:
        """Goes on from what a checkpoint holds, or anew where that followed another metric, other rows, or nothing;
        returns lines for the user. All ranks enter.
        """
        if state is None or state["metric"] != self.metric or state["value"] is None:
            return []
        if state.get("rows", self.rows) != self.rows:
            before = f"{state['value']:.6g} of step {state['step']}"
            return [f"data.eval holds other rows than before: {self.metric} {before} does not count, it begins anew"]
        self.value, self.step, self.worse = state["value"], state["step"], state["worse"]
        if not self.keeps:
            return []
        folders = {step: writer.folder / step_folder(step) for step in sorted(state["kept"], reverse=True)}
        is_there = collectives.from_rank_0({step: open_folder(path)[0] is not None for step, path in folders.items()})
        self.kept = {step: value for step, value in state["kept"].items() if is_there[step]}
        writer.best = max(self.kept, default=0)  # each was better than those before
        if writer.best == self.step:
            return []
        folder = writer.folder / step_folder(self.step)
        return [f"{folder}: the checkpoint with the best {self.metric} is not there; another one is sought"]


def return_to_best(policy, writer: CheckpointWriter) -> None:
    """Loads the weights of the checkpoint that was best. All ranks enter, after the last update.

    Raises:
        TrainingError: on every rank, its files are not what was written.
    """
    from dpo_ds.checkpoint import shards

    folder = writer.folder / step_folder(writer.best)
    checkpoint, problem = collectives.from_rank_0(open_folder(folder))
    if checkpoint is not None:
        damage = checkpoint.damage(collectives.rank(), collectives.world_size())
        damaged = sorted(name for names in collectives.gather_objects(damage) for name in names)
        problem = f"{', '.join(damaged)} differs from what was written (SHA-256)" if damaged else ""
    if problem:
        remedy = f"dpo-ds export {writer.folder / step_folder(writer.newest)} exports the last step"
        raise TrainingError(f"{folder}: {problem}, so final/ cannot be the best step; {remedy}")
    shards.load(policy.engine, checkpoint)
