"""Shows a run to its user, on rank 0: metrics.jsonl, TensorBoard, the progress bar, lines worth telling."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from dpo_ds.training.output_dir import keep_metrics_until

WINDOW = 20  # steps whose mean is judged
FALL = 0.1  # of the chosen completions' log-prob where the run began
LINE_SECONDS = 10


PLAIN_LINE_SECONDS = 10


class Tracker:
    """Writes each object to metrics.jsonl (flushed at once) and TensorBoard, and keeps the terminal up to date.

    `resumed_step`: lines beyond it are cut first; 0 starts an empty file.
    """

    def __init__(self, output_dir: Path, resumed_step: int, total_steps: int, watch: ChosenFalls | None = None):
        from torch.utils.tensorboard import SummaryWriter

        path = output_dir / "metrics.jsonl"
        keep_metrics_until(path, resumed_step)
        self._jsonl = path.open("ab", buffering=0)
        self._told = False
        self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1)
        self._total, self._watch = total_steps, watch
        self._first = resumed_step
        self._started = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total_steps, initial=resumed_step, unit="step", dynamic_ncols=True) if _is_terminal() else None
        )

    def step(self, line: dict) -> None:
        """One update's metrics."""
        self._record(line)
        if self._watch is not None and (text := self._watch.observe(line)):
            self.say(text)
        shown = {"loss": line["loss"], "accuracy": line.get("rewards/accuracies"), "pairs/s": line["pairs_per_second"]}
        text = " ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now, step = time.monotonic(), line["step"]
        if step in (self._first + 1, self._total) or now - self._last_line >= PLAIN_LINE_SECONDS:
            left = (now - self._started) / (step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  left {_clock(left)}")
            self._last_line = now

    def evaluation(self, line: dict) -> None:
        """One evaluation's metrics, keys prefixed eval_."""
        self._record(line)
        names = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
        text = "  ".join(f"{short} {line[name]:.4f}" for name, short in names.items() if name in line)
        self.say(f"step {line['step']}/{self._total}  evaluation: {text}")

    def say(self, text: str) -> None:
        """A line for the user, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self._jsonl.close()
        self._tensorboard.close()
        if self._bar is not None:
            self._bar.close()

    def _record(self, line: dict) -> None:
        """A full disk costs lines, told once, and never the run; no line stays half-written."""
        data, end = (json.dumps(line) + "\n").encode(), self._jsonl.seek(0, os.SEEK_END)
        try:
            if self._jsonl.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, value in line.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, line["step"])
        except OSError as error:
            if self._jsonl.tell() < end + len(data):
                self._jsonl.truncate(end)
            if not self._told:
                self._told = True
                self.say(f"metrics of step {line['step']} are lost ({error.strerror}); training goes on")


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
    """total: `unit`s to do; the speed is told in `counted`. Rank 0's own share, which is every rank's up to a shard."""

    def __init__(self, total: int, talks: bool, unit: str, counted: str):
        self.count, self.done = 0, 0
        self._unit, self._counted = unit, counted
        self._started = self._last_line = time.monotonic()
        self._total, self._talks = total, talks
        self._bar = None
        if talks and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True)

    def add(self, count: int, done: int) -> None:
        self.count, self.done = self.count + count, self.done + done
        if self._bar is not None:
            self._bar.update(done)
        elif self._talks and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._started
            left = tqdm.format_interval(seconds / self.done * (self._total - self.done))
            share, speed = self.done / self._total, self.count / seconds
            print(f"dpo-ds: {share:.0%}  {speed:.3g} {self._counted}/s a rank  left {left}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._talks and self.count:
            seconds = time.monotonic() - self._started
            line = f"{self.count} {self._counted}, {self.done} {self._unit}s in {seconds:.1f} s on rank 0"
            print(f"dpo-ds: {line}", flush=True)


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
