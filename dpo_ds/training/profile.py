"""Records a few steps of rank 0 with torch's profiler: a trace to look at and a table of where the time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TRACE = "rank-0.pt.trace.json.gz"  # TensorBoard's plugin looks for this ending; Chrome and Perfetto open it, too
ROWS = 12


class StepProfile:
    """Records the steps first..last into `folder` and tells where the time went; nothing where `steps` is None."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, say: Callable[[str], None]):
        self.folder, self.steps, self._say = folder, steps, say
        self._profile: profile | None = None
        self._started, self._count = 0.0, 0

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Opens for one step; the recording begins and ends with it where it is the first or the last of them."""
        if self.steps is not None and self._profile is None and self.steps[0] <= step <= self.steps[1]:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()
            self._started = time.perf_counter()
        yield
        if self._profile is not None:
            self._count += 1
            if step == self.steps[1]:
                self.finish()

    def finish(self) -> None:
        """Ends the recording, if there is one, and writes it; to be called when training ends, too."""
        if self._profile is None:
            if self.steps is not None and not self._count:
                self._say(f"train.profile_steps {list(self.steps)}: the run had none of these steps")
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        recorded, self._profile = self._profile, None
        recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / TRACE))
        for line in table(recorded, self._count, seconds):
            self._say(line)
        self._say(f"the trace is {self.folder / TRACE}, for Perfetto, chrome://tracing or TensorBoard")


def table(recorded: profile, steps: int, seconds: float) -> list[str]:
    """Returns lines: the wall time of a step, and what the device (a CPU, where there is no other) did most in it."""
    averages = recorded.key_averages()
    on_device = sum(event.self_device_time_total for event in averages) > 0
    if on_device:  # an operator has its kernels' time once more
        averages = [event for event in averages if event.device_type != DeviceType.CPU]
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = sorted(averages, key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)  # microseconds
    device = "GPU" if on_device else "CPU"
    wall = 1e3 * seconds / steps
    lines = [f"{steps} steps of {wall:.1f} ms, in which the {device} worked {total / 1e3 / steps:.1f} ms:"]
    for event in events[:ROWS]:
        spent = getattr(event, name)
        lines.append(
            f"{spent / 1e3 / steps:9.2f} ms {spent / total:6.1%} {event.count / steps:8.0f} calls  {event.key[:80]}"
        )
    return lines
