"""What a user should be told about a run that looks healthy by its loss alone."""

from __future__ import annotations

from collections import deque

WINDOW = 20  # steps whose mean is judged
FALL = 0.1  # of the chosen completions' log-prob where the run began


class ChosenFalls:
    """Says once when the chosen completions themselves have become unlikely, as margins may grow by pushing both sides
    down (arXiv 2402.13228, 2404.19733).
    """

    def __init__(self, beta: float, has_reference: bool):
        self._beta, self._has_reference = beta, has_reference
        self._now: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._start: float | None = None  # without a reference: the mean over the first window
        self._said = False

    def observe(self, line: dict) -> str | None:
        """A line for the user, given a step's metrics; None while there is nothing to say."""
        drop = line["rewards/chosen"] / self._beta if self._has_reference else 0.0
        self._now.append((line["logps/chosen"], line["logps/chosen"] - drop))
        if self._said or len(self._now) < WINDOW:
            return None
        chosen, before = (sum(column) / WINDOW for column in zip(*self._now, strict=True))
        if not self._has_reference:
            self._start = chosen if self._start is None else self._start
            before = self._start
        if before - chosen < FALL * abs(before):
            return None
        self._said = True
        than = "under the reference" if self._has_reference else "at the start"
        return (
            f"step {line['step']}: chosen completions have fallen to a log-prob of {chosen:.1f}, {before:.1f} {than}: "
            "the margin grows by pushing both sides down. If samples get worse: --loss.sft_weight 0.1 holds them, so "
            "does a larger loss.beta or a lower train.learning_rate"
        )
