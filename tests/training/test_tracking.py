"""metrics.jsonl and STATUS.json on a disk that is full."""

import errno
import json

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
    tracker._jsonl = FullDisk(tracker._jsonl, room=20)  # half of the next line
    tracker.step({"step": 2} | LINE)
    tracker.step({"step": 3} | LINE)
    tracker._jsonl.room = 1000
    tracker.step({"step": 4} | LINE)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    told = [line for line in capsys.readouterr().out.splitlines() if "lost" in line]
    assert told == ["metrics of step 2 are lost (No space left on device); training goes on"]


def test_a_status_that_cannot_be_written_is_told_and_no_fault(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    write_status(tmp_path, "stopped", "USR1 received", 4, 75)
    assert "STATUS.json could not be written (No space left on device): {'state': 'stopped'" in capsys.readouterr().err
