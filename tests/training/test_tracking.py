"""metrics.jsonl, TensorBoard's file and STATUS.json on a disk that is full, or removed by somebody."""

import errno
import json
import shutil

import pytest

from dpo_ds.training.output_dir import write_status
from dpo_ds.training.tracking import Tracker

LINE = {"loss": 0.5, "pairs_per_second": 1.0}


class FullDisk:
    """Takes `room` bytes more, then as much of a line as fits, as a disk does."""

    def __init__(self, stream, room: int):
        self.stream, self.room = stream, room

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.stream.write(data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    tracker = Tracker(tmp_path, 0, 10)
    tracker.step({"step": 1} | LINE)
    lines, _ = tracker._logs
    lines._file = FullDisk(lines._file, room=20)  # half of the next line
    tracker.step({"step": 2} | LINE)
    tracker.step({"step": 3} | LINE)
    lines._file.room = 1000
    tracker.step({"step": 4} | LINE)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    told = [line for line in capsys.readouterr().out.splitlines() if "loses" in line]
    assert told == ["metrics.jsonl loses lines from step 2 on (No space left on device); training goes on"]


def remove(folder):
    """Takes a folder away at once: TensorBoard's thread may write a file into it while its files are removed."""
    away = folder.rename(folder.with_name(f"{folder.name} removed"))
    shutil.rmtree(away, ignore_errors=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, mid-line
@pytest.mark.parametrize("gone", ["tensorboard", "metrics.jsonl", "both", "the folder itself"])
def test_logs_that_somebody_removes_cost_lines_and_not_the_run(tmp_path, capsys, gone):
    """What follows is in new files, where there is a folder for them."""
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(folder, 0, 10)
    tracker.step({"step": 1} | LINE)
    if gone == "the folder itself":
        remove(folder)
    if gone in ("tensorboard", "both"):
        remove(folder / "tensorboard")
    if gone in ("metrics.jsonl", "both"):
        (folder / "metrics.jsonl").unlink()
    for step in range(2, 6):
        tracker.step({"step": step} | LINE)
    tracker.close()
    told = [line for line in capsys.readouterr().out.splitlines() if "loses" in line]
    both = ["metrics.jsonl", "tensorboard/"]
    logs = {"tensorboard": both[1:], "metrics.jsonl": both[:1]}.get(gone, both)
    assert [line.split(" loses lines from step 2 on (")[0] for line in told] == logs
    if gone != "the folder itself":
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == ([1, 2, 3, 4, 5] if gone == "tensorboard" else [2, 3, 4, 5])
        assert any(path.stat().st_size > 100 for path in (folder / "tensorboard").iterdir())


def test_metrics_that_lead_elsewhere_are_followed(tmp_path, capsys):
    """Somebody's editor has put another file in the place."""
    tracker = Tracker(tmp_path, 0, 10)
    tracker.step({"step": 1} | LINE)
    other = tmp_path / "edited"
    other.write_text((tmp_path / "metrics.jsonl").read_text())
    other.replace(tmp_path / "metrics.jsonl")
    tracker.step({"step": 2} | LINE)
    tracker.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_status_that_cannot_be_written_is_told_and_no_fault(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    write_status(tmp_path, "stopped", "USR1 received", 4, 75)
    assert "STATUS.json could not be written (No space left on device): {'state': 'stopped'" in capsys.readouterr().err
