"""The reviews: of movies where those are at hand, generated ones elsewhere; cut into prompt and completion."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dpo_ds.demo.corpus import Demand, preference_rows

MOVIES = {"rt-polarity.pos": True, "rt-polarity.neg": False}  # Pang and Lee 2005: one lower-case sentence a line
GENERATED = 3000
PREFIX = (2, 8)  # words of a prompt: arXiv 2305.18290, appendix C.1, takes as many tokens
HELD_OUT = 0.1  # of the reviews


class Review(NamedTuple):
    text: str
    positive: bool


def reviews(folder: Path) -> list[Review]:
    """The movie reviews of a folder that has them, else generated ones; says which."""
    if all((folder / name).is_file() for name in MOVIES):
        print(f"reviews: {', '.join(MOVIES)} in {folder}")
        return movie_reviews(folder)
    print(f"reviews: generated, because {folder} does not hold {' and '.join(MOVIES)} (set DPO_DS_DATA)")
    return generated_reviews()


def movie_reviews(folder: Path) -> list[Review]:
    """All with a word to go on with after the shortest prompt."""
    lines = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in MOVIES}
    reviews = [Review(line.strip(), MOVIES[name]) for name, texts in lines.items() for line in texts]
    return [review for review in reviews if len(review.text.split()) > PREFIX[0]]


def generated_reviews(count: int = GENERATED) -> list[Review]:
    """By the demo's grammar, with the sentiment that their instruction asked for; the instruction is left out."""
    return [
        Review(row["chosen"].strip(), Demand.parse(row["prompt"]).sentiment == "positive")
        for row in preference_rows(count)
    ]


def write_splits(folder: Path, reviews: Iterable[Review], train_prompts: int, held_out_prompts: int) -> None:
    """train.jsonl and held_out.jsonl, rows of prompt, completion and positive, in an order drawn at random, and
    train_prompts.jsonl and held_out_prompts.jsonl with the first so many (or fewer) different prompts of each; none
    of the latter is in train.jsonl.
    """
    rng = random.Random(0)
    rows = []
    for review in reviews:
        words = review.text.split(" ")
        cut = min(rng.randint(*PREFIX), len(words) - 1)
        prompt, completion = " ".join(words[:cut]), " " + " ".join(words[cut:])
        rows.append({"prompt": prompt, "completion": completion, "positive": review.positive})
    rng.shuffle(rows)
    held_out = round(HELD_OUT * len(rows))
    known: set[str] = set()
    splits = {"train": (rows[held_out:], train_prompts), "held_out": (rows[:held_out], held_out_prompts)}
    for name, (own, wanted) in splits.items():
        _write(folder / f"{name}.jsonl", own)
        prompts = list(dict.fromkeys(row["prompt"] for row in own if row["prompt"] not in known))
        known.update(prompts)
        _write(folder / f"{name}_prompts.jsonl", [{"prompt": prompt} for prompt in prompts[:wanted]])


def texts(path: Path) -> tuple[list[str], list[bool]]:
    """The reviews of a split and whether they are positive."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] + row["completion"] for row in rows], [row["positive"] for row in rows]


def _write(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
