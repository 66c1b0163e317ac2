"""The demo: the whole pipeline on a corpus of its own, sft -> sample -> precompute -> train -> evaluate, each command
started as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from itertools import chain
from pathlib import Path

from dpo_ds.demo import corpus, job, report

REVIEWS, PROMPTS, HELD_OUT = 1500, 600, 200
VOCABULARY, HIDDEN, LAYERS = 512, 128, 2
SCORE = "dpo_ds.demo.corpus:scores"
BETAS = (0.5, 0.1)
DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero3_cpu.json"
MARKER = ".dpo_ds_demo"  # a folder that holds it was made by the demo and may be emptied by the next
LENGTHS = {"data.max_length": 128, "data.max_prompt_length": 64}
SFT = {"train.global_batch_size": 16, "train.max_steps": 400, "train.learning_rate": 3e-3, "train.warmup_steps": 10}
DPO = {"train.global_batch_size": 32, "train.max_steps": 60, "train.learning_rate": 2e-4, "train.warmup_steps": 10}
MICRO_BATCH = {"train.micro_batch_tokens": 2048}
DRAWS = {"max_new_tokens": 48, "batch_size": 256}


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
    if not ds_config.is_file():
        raise job.JobFailed(f"{ds_config} is no file; run from a checkout or give --deepspeed_config")
    os.environ["DS_ACCELERATOR"] = "cpu"  # before transformers imports deepspeed, which else looks for devices aloud
    _empty(folder)
    prepare(folder)
    sft, samples, cache, evaluation = (folder / name for name in ("sft", "samples", "cache", "evaluation"))
    sharded, whole = {"deepspeed.config": ds_config}, {"deepspeed.config": "none"}
    reviews = {"model.path": folder / "base", "data.train": folder / "reviews.jsonl"}
    job.run("sft", reviews | LENGTHS | sharded | SFT | MICRO_BATCH, sft)

    model, short = {"model.path": sft / "final"}, {"data.max_prompt_length": LENGTHS["data.max_prompt_length"]}
    draws = {f"sample.{key}": value for key, value in DRAWS.items()}
    wanted = {"sample.prompts": folder / "prompts.jsonl", "sample.n": 4, "sample.score": SCORE}
    job.run("sample", model | short | whole | wanted | draws, samples)

    pairs = model | LENGTHS | {"data.train": samples / "pairs", "data.eval": folder / "held_out.jsonl"}
    job.run("precompute", pairs | whole, cache)
    cached = {"reference.kind": "cached", "reference.cache": cache}
    for beta in BETAS:
        settings = {"loss.beta": beta, "train.eval_every": 20}
        job.run("train", pairs | cached | settings | sharded | DPO | MICRO_BATCH, folder / f"dpo-{beta}")

    policies = [{"path": str(folder / f"dpo-{b}" / "final"), "name": f"DPO, beta {b}", "beta": b} for b in BETAS]
    asked = {"evaluate.policy": json.dumps(policies), "evaluate.against": sft / "final", "evaluate.score": SCORE}
    texts = {"evaluate.prompts": folder / "held_out_prompts.jsonl", "data.eval": folder / "held_out.jsonl"}
    draws = {f"evaluate.{key}": value for key, value in DRAWS.items()}
    job.run("evaluate", asked | texts | LENGTHS | whole | draws, evaluation)

    print(f"\n{report.table(evaluation)}\n")
    print("  reward: share of an instruction's four demands that a review meets; instructions never seen in training")
    print("  KL: how far, in nats a review, the policy has gone from the SFT model for it\n")
    print(report.before_and_after(evaluation, count=3))
    print(f"frontier: {evaluation / 'report' / 'frontier.png'}   report: {evaluation / 'report' / 'report.html'}")
    print(f"model: {folder / f'dpo-{BETAS[-1]}' / 'final'}   TensorBoard: {folder}")


def prepare(folder: Path) -> None:
    """The corpus' files and the folder of the untrained model."""
    from transformers.utils import logging

    from dpo_ds.demo import tiny  # torch and transformers come in here

    logging.disable_progress_bar()
    rows = list(corpus.written_rows(REVIEWS))
    corpus.write_jsonl(folder / "reviews.jsonl", rows)
    corpus.write_jsonl(folder / "prompts.jsonl", corpus.prompt_rows(PROMPTS, seed=1))
    corpus.write_jsonl(folder / "held_out.jsonl", corpus.preference_rows(HELD_OUT, held_out=True))
    corpus.write_jsonl(folder / "held_out_prompts.jsonl", corpus.prompt_rows(HELD_OUT, held_out=True))
    tokenizer = tiny.train_tokenizer(chain.from_iterable(row.values() for row in rows), VOCABULARY)
    model = tiny.tiny_llama(tokenizer, hidden=HIDDEN, layers=LAYERS)
    tiny.save_tiny_model(folder / "base", tokenizer, model)
    print(f"{folder / 'reviews.jsonl'}: {REVIEWS} reviews, every second one flawed. One of them:")
    print("\n".join(f"  {key:<11}{value!r}" for key, value in rows[0].items()))
    print(f"{folder / 'base'}: a Llama of {model.num_parameters():,} random weights, a BPE of {len(tokenizer)} tokens")


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
