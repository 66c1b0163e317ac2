"""Follows one metric over a run's evaluations: which checkpoint is the best one, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    run; 0 for any number. rows: the content of the data that is evaluated on.
    """

    metric: str
    keeps: bool
    patience: int
    rows: str = ""
    value: float | None = None
    step: int = 0
    worse: int = 0

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

    def observe(self, step: int, evaluation: dict[str, float]) -> bool:
        """Takes an evaluation in; tells whether the checkpoint of this step is now the one to keep. All ranks enter."""
        found = collectives.from_rank_0(evaluation[self.metric])  # no rank may decide otherwise by a last bit
        sign = -1 if better(self.metric) == "lower" else 1
        is_better = not math.isnan(found) and (self.value is None or sign * found > sign * self.value)
        if is_better:
            self.value, self.step = found, step
        self.worse = 0 if is_better else self.worse + 1
        return is_better and self.keeps

    def state(self) -> dict:
        found = {"value": self.value, "step": self.step, "worse": self.worse}
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
        folder = writer.folder / step_folder(state["step"])
        if self.keeps and not collectives.from_rank_0(open_folder(folder)[0] is not None):
            return [f"{folder}: the checkpoint with the best {self.metric} is not there; the search for it begins anew"]
        self.value, self.step, self.worse = state["value"], state["step"], state["worse"]
        writer.best = self.step if self.keeps else 0
        return []


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
