"""Names what evaluations measure, and which way is better: what checkpoint.best and train.stop_after_worse go by."""

from __future__ import annotations

from typing import Literal

from dpo_ds.config.section import did_you_mean
from dpo_ds.errors import shorten

LOSS = "eval_loss"
OF_ROWS = (LOSS,)
OF_LABELS = (LOSS, "eval_rewards/accuracies")  # a side that the data lacks has no rewards
OF_PAIRS = (
    LOSS, "eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen", "eval_rewards/rejected",
    "eval_logps/chosen", "eval_logps/rejected",
)  # fmt: skip
OF_SCORES = (*OF_PAIRS[:5], "eval_rewards/brier", "eval_rewards/calibration_error")
LOWER_IS_BETTER = (
    LOSS, "eval_rewards/rejected", "eval_logps/rejected", "eval_rewards/brier", "eval_rewards/calibration_error",
)  # fmt: skip

Better = Literal["lower", "higher"]


def better(metric: str) -> Better:
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def check_followed(best: str | None, stop_after_worse: int, has_data: bool, metrics: tuple[str, ...]) -> None:
    """Raises ValueError where checkpoint.best or train.stop_after_worse goes by what no evaluation tells.

    metrics: those of this run's evaluations.
    """
    if best is not None and best not in metrics:
        nearest = did_you_mean(best, metrics)
        raise ValueError(f"checkpoint.best {shorten(best)}: no metric that evaluations here could go by; {nearest}")
    given = f"checkpoint.best {best}" if best is not None else f"train.stop_after_worse {stop_after_worse}"
    if (best is not None or stop_after_worse) and not has_data:
        raise ValueError(f"{given} goes by evaluations, which need rows; give some as data.eval")
