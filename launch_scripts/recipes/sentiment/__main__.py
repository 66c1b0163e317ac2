"""Reward against KL of DPO and others: the controlled sentiment of arXiv 2305.18290 (figure 2, left), small.

One reference policy; then for every seed pairs of its own samples, labelled by a classifier, a training run a policy,
and one evaluation of them all. Start in the root of a checkout: `python -m launch_scripts.recipes.sentiment`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch_scripts.recipes.sentiment import corpus, report
from launch_scripts.recipes.sentiment.outcome import Outcome
from launch_scripts.recipes.sentiment.plan import FULL, HERE, SMALL, Plan
from launch_scripts.recipes.sentiment.runner import Runner, StepFailed

REVIEWS = Path(os.environ.get("DPO_DS_DATA") or "../shared/data")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch_scripts.recipes.sentiment", description=__doc__)
    parser.add_argument("--to", type=Path, help="folder to fill, runs/sentiment if not given; run again to go on")
    parser.add_argument("--small", action="store_true", help="on generated reviews, in some minutes")
    parser.add_argument("--reviews", type=Path, default=REVIEWS, help="folder of rt-polarity.pos and rt-polarity.neg")
    parser.add_argument("--jobs", type=int, default=2, help="commands side by side")
    parser.add_argument("--seeds", type=int, nargs="+", help="of sampling and training; 0, 1, ... if not given")
    given = parser.parse_args(argv)
    for module in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            parser.error(f"{module} is not installed; run `make install`")
    if not HERE.is_dir():
        parser.error(f"there is no {HERE} here; start in the root of a checkout")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the commands, too
    size, started = SMALL if given.small else FULL, time.monotonic()
    reviews = corpus.generated_reviews() if given.small else corpus.reviews(given.reviews)
    folder = given.to or Path("runs/sentiment-small" if given.small else "runs/sentiment")
    try:
        experiment(Plan(folder, size, given.seeds or range(size.seeds)), reviews, given.jobs)
    except StepFailed as failure:
        print(f"\nsentiment failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsentiment interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"this run took {time.monotonic() - started:.0f} s")
    return 0


def experiment(plan: Plan, reviews: Sequence[corpus.Review], jobs: int) -> None:
    """Everything, into plan.folder; what is there already from the same settings stays.

    Raises:
        StepFailed: a command did not reach its end.
    """
    environment = {
        "DS_ACCELERATOR": "cpu",
        "SENTIMENT_DATA": str(plan.data),
        "DPO_DS_CACHE": str(plan.folder / "cache"),
    }
    os.environ |= environment
    prepare(plan, reviews)
    print("\n$ export " + " ".join(f"{key}={value}" for key, value in environment.items()), flush=True)
    seconds = Runner(plan.folder / "steps", jobs).run(list(plan.steps()))
    found = Outcome.read(plan.evaluations(), plan.size.policies)
    report.write(found, plan.folder)
    print(f"\n{report.markdown(found)}\n")
    print("   ".join(str(plan.folder / name) for name in (report.PICTURE, report.REPORT, report.RESULTS)))
    print(f"{len(seconds)} commands, {sum(seconds.values()):.0f} s one after the other")


def prepare(plan: Plan, reviews: Sequence[corpus.Review]) -> None:
    """Reviews in splits, a tokenizer and a model of random weights."""
    from dpo_ds.demo import tiny  # torch and transformers come in here
    from launch_scripts.recipes.sentiment import reward

    size, data, base = plan.size, plan.data, plan.data / "base"
    data.mkdir(parents=True, exist_ok=True)
    corpus.write_splits(data, reviews, size.prompts, size.held_out)
    tokenizer = tiny.train_tokenizer(corpus.texts(data / "train.jsonl")[0], size.vocabulary)
    model = tiny.tiny_llama(tokenizer, hidden=size.hidden, layers=size.layers)
    tiny.save_tiny_model(base, tokenizer, model)
    print(f"{data}: {len(reviews):,} reviews; the classifier is right about {reward.accuracy():.1%} of those held out")
    print(f"{base}: a Llama of {model.num_parameters():,} random weights and a BPE of {len(tokenizer)} tokens")


if __name__ == "__main__":
    sys.exit(main())
