"""The demo: a corpus, a tokenizer and a tiny Llama, then `sft` and `train` on them, started as a user starts them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from itertools import chain
from pathlib import Path

from dpo_ds.demo import corpus, job, report

TRAIN_PAIRS, HELD_OUT_PAIRS = 1500, 200
VOCABULARY, HIDDEN, LAYERS = 512, 128, 2
DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero3_cpu.json"
MARKER = ".dpo_ds_demo"  # a folder that holds it was made by the demo and may be emptied by the next
COMMON = {"data.max_length": 128, "data.max_prompt_length": 64, "train.micro_batch_tokens": 2048}
SFT = {"train.global_batch_size": 16, "train.max_steps": 400, "train.learning_rate": 3e-3, "train.warmup_steps": 10}
DPO = {"train.global_batch_size": 32, "train.max_steps": 94, "train.learning_rate": 2e-4, "train.warmup_steps": 10}
LIVE = {"reference.kind": "live", "loss.name": "dpo", "loss.beta": 0.1, "train.eval_every": 20}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.demo", description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    parser.add_argument("--deepspeed_config", type=Path, default=DS_CONFIG, help="a DeepSpeed JSON file")
    given = parser.parse_args(argv)
    began = time.monotonic()
    try:
        demo(given.to, given.deepspeed_config)
    except job.JobFailed as failure:
        print(f"\ndemo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo interrupted; its ranks are ended", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"\nThe demo took {time.monotonic() - began:.0f} s.")
    return 0


def demo(folder: Path, ds_config: Path) -> None:
    """Everything, into `folder`, which is emptied first.

    Raises:
        job.JobFailed: something is missing, or a command did not reach its end.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise job.JobFailed("matplotlib, which draws the curves, is not installed; run `make install`")
    if not ds_config.is_file():
        raise job.JobFailed(f"{ds_config} is no file; run from a checkout or give --deepspeed_config")
    os.environ["DS_ACCELERATOR"] = "cpu"  # before transformers imports deepspeed, which else looks for devices aloud
    _empty(folder)
    train, held_out, base = prepare(folder)
    sft, dpo, png = folder / "sft", folder / "dpo", folder / "curves.png"
    data = COMMON | {"data.train": train, "data.eval": held_out, "deepspeed.config": ds_config}
    job.run("sft", {"model.path": base} | data | SFT, sft)
    job.run("train", {"model.path": sft / "final"} | LIVE | data | DPO, dpo)
    report.draw(dpo, png)
    print(f"\n{report.table(sft, dpo)}\n")
    print("  before: step 1; DPO's policy is its reference there, so its loss is ln 2 and no margin is above 0")
    print(f"  after:  the last evaluation, on {HELD_OUT_PAIRS} pairs whose instructions training never saw")
    print(f"\ncurves: {png}   model: {dpo / 'final'}   TensorBoard: {dpo / 'tensorboard'}")


def prepare(folder: Path) -> tuple[Path, Path, Path]:
    """The corpus' two files and the folder of the untrained model."""
    from dpo_ds.demo import tiny  # torch and transformers come in here

    train, held_out, base = folder / "train.jsonl", folder / "held_out.jsonl", folder / "base"
    rows = list(corpus.preference_rows(TRAIN_PAIRS))
    corpus.write_jsonl(train, rows)
    corpus.write_jsonl(held_out, corpus.preference_rows(HELD_OUT_PAIRS, held_out=True))
    tokenizer = tiny.train_tokenizer(chain.from_iterable(row.values() for row in rows), VOCABULARY)
    model = tiny.tiny_llama(tokenizer, hidden=HIDDEN, layers=LAYERS)
    tiny.save_tiny_model(base, tokenizer, model)
    print(f"{train}: {TRAIN_PAIRS} pairs; {held_out}: {HELD_OUT_PAIRS} pairs. One of them:")
    print("\n".join(f"  {key:<9}{value!r}" for key, value in rows[0].items()))
    print(f"{base}: a Llama of {model.num_parameters():,} random weights and a BPE of {len(tokenizer)} tokens")
    return train, held_out, base


def _empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise job.JobFailed(f"{folder} is not empty and was not made by the demo; give another folder with --to")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that the job's ranks end too
    sys.exit(main())
