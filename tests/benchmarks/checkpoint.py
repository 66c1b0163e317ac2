"""What a checkpoint costs: the time that two ranks stand still, against dd writing and fsyncing as many bytes there.

`python -m tests.benchmarks.checkpoint [FOLDER]`; they alternate, so that all see the same disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from dpo_ds.demo.tiny import random_model, tiny_config
from tests.forkserver import fork_server
from tests.tiny import VOCAB

LAUNCHES, ROUNDS = 1, 8


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, fork_server() as forks:
        work = Path(scratch)
        model = random_model(tiny_config("llama", VOCAB, hidden=1024, layers=3, intermediate_size=4096))
        model.save_pretrained(work / "model")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rounds = []
        for launch in range(LAUNCHES):
            argv = [work / "model", work / f"out-{launch}", work / "seconds.json", ROUNDS]
            codes, output = forks.run(argv, 2, work / "logs", module="tests.workers.save_time", timeout=900)
            assert codes == [0, 0], output
            rounds += json.loads((work / "seconds.json").read_text())
        print(f"{parameters / 1e6:.0f}M parameters, {rounds[0]['bytes'] / 1e6:.0f} MB, {len(rounds)} rounds")
        for seconds in rounds:
            print(", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "bytes"), flush=True)
    for kind in ("waiting", "beside"):
        ratios = sorted(seconds[kind] / seconds["dd"] for seconds in rounds)
        print(f"{kind}: blocks {median(seconds[kind] for seconds in rounds):.2f} s, ", end="")
        print(f"{median(ratios):.2f} times dd ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    slowed = median(seconds["update while writing"] / seconds["update"] for seconds in rounds)
    print(f"an update beside the writing takes {slowed:.2f} times an undisturbed one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir(), help="where on the disk that is measured")
    main(parser.parse_args().folder)
