"""What the user sees of a run, on rank 0: metrics.jsonl, TensorBoard, the progress bar, STATUS.json."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from dpo_ds.training.diagnostics import ChosenFalls

PLAIN_LINE_SECONDS = 10


class Tracker:
    """Writes each object to metrics.jsonl (flushed at once) and TensorBoard, and keeps the terminal up to date.

    `resumed_step`: lines beyond it are cut first; 0 starts an empty file.
    """

    def __init__(self, output_dir: Path, resumed_step: int, total_steps: int, watch: ChosenFalls | None = None):
        from torch.utils.tensorboard import SummaryWriter

        path = output_dir / "metrics.jsonl"
        _keep_until(path, resumed_step)
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


def write_status(output_dir: Path, state: str, reason: str = "", step: int = 0, exit_code: int | None = None) -> None:
    """STATUS.json, replaced in one move: scripts read it where a launcher swallows exit codes."""
    status = {"state": state, "reason": reason, "step": step, "exit_code": exit_code}
    temporary = output_dir / "STATUS.json.tmp"
    try:
        temporary.write_text(json.dumps(status) + "\n", encoding="utf-8")
        os.replace(temporary, output_dir / "STATUS.json")
    except OSError as error:  # the exit code must still say how the run ended
        print(f"dpo-ds: STATUS.json could not be written ({error.strerror}): {status}", file=sys.stderr, flush=True)


def _keep_until(path: Path, step: int) -> None:
    """Cuts what was logged beyond `step`, a half-written last line included."""
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # the process died while writing this line
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
