"""Shows a run to its user, on rank 0: metrics.jsonl, samples.jsonl, TensorBoard and other trackers, the progress bar,
lines worth telling.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from dpo_ds.cluster import rendezvous
from dpo_ds.cluster.signals import Stopped
from dpo_ds.config import Section, TrackingSection, flatten, to_plain
from dpo_ds.errors import shorten
from dpo_ds.training.output_dir import METRICS, SAMPLES, as_line, keep_metrics_until
from dpo_ds.training.samples import Sample
from dpo_ds.training.trackers.remote import RemoteTracker

WINDOW = 20  # steps whose mean is judged
SHOWN = 60  # characters of a prompt's end on the terminal
FALL = 0.1  # of the chosen completions' log-prob where the run began
LINE_SECONDS = 10
TENSORBOARD = "tensorboard"
BOARD_ALONE = TrackingSection()


PLAIN_LINE_SECONDS = 10


class Shown(NamedTuple):
    """Says what a line on the terminal tells: short names of metrics, in order, of a step and of an evaluation."""

    step: dict[str, str]
    evaluation: dict[str, str]


OF_PAIRS = Shown(
    {"loss": "loss", "accuracy": "rewards/accuracies", "pairs/s": "pairs_per_second"},
    {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"},
)


class Tracker:
    """Writes each object to metrics.jsonl (flushed at once) and to who else is to have it, and keeps the terminal up to
    date. It is closed by leaving it.

    `resumed_step`: lines beyond it are cut first; 0 starts an empty file. config: flat, for trackers that show it.
    """

    def __init__(
        self, output_dir: Path, resumed_step: int, total_steps: int, watch: ChosenFalls | None = None,
        section: TrackingSection = BOARD_ALONE, config: Mapping[str, Any] = MappingProxyType({}),
        shown: Shown = OF_PAIRS,
    ):  # fmt: skip
        for path in filter(Path.exists, (output_dir / METRICS, output_dir / SAMPLES)):
            keep_metrics_until(path, resumed_step)
        self._bar = None
        self._told: set[str] = set()
        self._total, self._watch, self._shown = total_steps, watch, shown
        self._first = resumed_step
        begin = {
            "project": section.project, "name": section.name or output_dir.resolve().name,
            "folder": str(output_dir.resolve()), "resumes": resumed_step > 0,
        }  # fmt: skip
        others = [name for name in section.to if name != TENSORBOARD]
        self._remotes = [RemoteTracker(name, output_dir, begin, dict(config), self.say) for name in others]
        boards = [_Board(output_dir / TENSORBOARD, resumed_step)] if TENSORBOARD in section.to else []
        self._logs = [_Lines(output_dir / METRICS), *boards, *self._remotes]
        self._galleries = [_Lines(output_dir / SAMPLES), *boards, *self._remotes]
        for remote in self._remotes:
            self._guarded(remote, remote.start, "from the start")
        self._started = self._last_line = time.monotonic()
        if _is_terminal():
            self._bar = tqdm(total=total_steps, initial=resumed_step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(in_a_hurry=kind is not None, has_failed=kind not in (None, Stopped))

    def step(self, line: dict) -> None:
        """One update's metrics."""
        self._record(line)
        if self._watch is not None and (text := self._watch.observe(line)):
            self.say(text)
        shown = self._shown.step.items()
        text = " ".join(f"{short} {line[name]:.4g}" for short, name in shown if name in line)
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
        shown = self._shown.evaluation.items()
        text = "  ".join(f"{short} {line[name]:.4f}" for short, name in shown if name in line)
        self.say(f"step {line['step']}/{self._total}  evaluation: {text}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Shows completions by the policy as it is after `step`, the first of them on the terminal."""
        for log in self._galleries:
            self._guarded(log, partial(log.show, step, samples), f"from step {step} on")
        first = samples[0]
        prompt = f"…{first.prompt[-SHOWN:]}" if len(first.prompt) > SHOWN else first.prompt
        self.say(f"step {step}/{self._total}  sample: {prompt!r} -> {shorten(first.completion, 2 * SHOWN)}")

    def final(self, metrics: dict) -> None:
        """Gives trackers the metrics that the run ends with, under names of their own."""
        line = {"step": self._total, **{f"final/{name}": value for name, value in metrics.items()}}
        for remote in self._remotes:
            remote.add(line)

    def say(self, text: str) -> None:
        """A line for the user, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self, in_a_hurry: bool = False, has_failed: bool = False) -> None:
        """in_a_hurry: the run has been stopped, or has failed; else trackers have some seconds for their last lines."""
        for remote in self._remotes:  # all of them at once
            remote.finish(self._total, has_failed)
        for remote in self._remotes:
            remote.close(in_a_hurry)
        for log in {*self._logs, *self._galleries}.difference(self._remotes):
            self._guarded(log, log.close, "at the end")
        if self._bar is not None:
            self._bar.close()

    def _record(self, line: dict) -> None:
        for log in self._logs:
            self._guarded(log, partial(log.add, line), f"from step {line['step']} on")

    def _guarded(self, log: _Lines | _Board | RemoteTracker, call: Callable[[], str | None], since: str) -> None:
        """A full disk, a file that somebody removes, a server that dies costs lines, told once a log, and never the
        run."""
        try:
            problem = call()
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is not None and log.name not in self._told:
            self._told.add(log.name)
            self.say(f"{log.name} loses lines {since} ({problem}); training goes on")


def settings_of(run: Section, versions: Mapping[str, str], ranks: int) -> dict[str, Any]:
    """Returns what trackers show of a run's config: dotted key -> text, number or nothing."""
    told = {"command": run.command, **flatten(to_plain(run)), "environment.ranks": ranks}
    told |= {f"environment.{package}": version for package, version in versions.items()}
    return {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in told.items()}


GONE = "somebody has removed what was there, and a new one begins"


class _Lines:
    """A file such as metrics.jsonl, made with its first line, a line an object; no line stays half-written."""

    def __init__(self, path: Path):
        self.name, self._path = path.name, path
        self._file: BinaryIO | None = None

    def add(self, line: dict) -> str | None:
        """Returns what went wrong although the line is written."""
        problem = self._reopened()
        data, end = as_line(line), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if self._file.seek(0, os.SEEK_END) > end:
                self._file.truncate(end)
            raise
        return problem

    def show(self, step: int, samples: Sequence[Sample]) -> str | None:
        problems = [self.add({"step": step, **sample._asdict()}) for sample in samples]
        return next(filter(None, problems), None)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _reopened(self) -> str | None:
        """Says so where the name leads to another file, or to none, than the one that is open."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            return None
        own = os.fstat(self._file.fileno())
        with contextlib.suppress(FileNotFoundError):
            there = self._path.stat()
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return None
        file = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = file
        return GONE


class _Board:
    """TensorBoard's file of events."""

    name = "tensorboard/"

    def __init__(self, folder: Path, resumed_step: int):
        self._folder = folder
        self._open(resumed_step + 1)

    def add(self, line: dict) -> str | None:
        """Returns what went wrong although the numbers are written."""
        problem = self._reopened(line["step"])
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])
        return problem

    def show(self, step: int, samples: Sequence[Sample]) -> str | None:
        """Each prompt has a place of its own, whose steps can be gone through."""
        problem = self._reopened(step)
        for number, sample in enumerate(samples, 1):
            text = f"prompt\n\n{_verbatim(sample.prompt)}\n\ncompletion\n\n{_verbatim(sample.completion)}"
            self._writer.add_text(f"samples/{number}", text, step)
        return problem

    def close(self) -> None:
        self._writer.close()

    def _reopened(self, step: int) -> str | None:
        """Says so where somebody has removed the file."""
        if self._path.exists():
            return None
        with contextlib.suppress(OSError):  # it cannot write what it still has
            self._writer.close()
        self._open(step)
        return GONE

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        before = set(self._folder.glob("events.*"))
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step)
        (self._path,) = set(self._folder.glob("events.*")) - before


def _verbatim(text: str) -> str:
    """Returns Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


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
        rendezvous.peers().progress()
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
        if "rewards/chosen" not in line:  # a batch without a desirable completion
            return None
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
