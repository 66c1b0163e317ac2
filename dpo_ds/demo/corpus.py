"""Product reviews written by a small grammar, and preference pairs in which chosen is better by a rule that is known.

An instruction makes four demands: review this product, with this sentiment, mention this feature, and do not repeat
yourself. The chosen review meets all four, the rejected one breaks exactly one of them. `score` checks the demands on
any text, so what a model learned can be measured against the truth and not only against held-out pairs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

BRANDS = ("Kestrel", "Orbit", "Maple", "Nova", "Harbor", "Pico")
THINGS = ("headphones", "kettle", "backpack", "lamp", "keyboard", "tent", "blender", "camera")
PRODUCTS = tuple(f"{brand} {thing}" for brand, thing in product(BRANDS, THINGS))
FEATURES = ("price", "design", "weight", "warranty", "packaging", "manual", "colour", "finish")
PRAISE = ("great", "lovely", "superb", "pleasing")
BLAME = ("awful", "poor", "dreadful", "annoying")
SENTIMENTS = {"positive": PRAISE, "negative": BLAME}
ADVICE = {"positive": ("I recommend it", "Buy it", "I love it"), "negative": ("I regret it", "Avoid it", "I hate it")}
MOOD_WORDS = {  # what betrays a review's sentiment
    "positive": frozenset(PRAISE) | {"recommend", "buy", "love"},
    "negative": frozenset(BLAME) | {"regret", "avoid", "hate"},
}

INSTRUCTIONS = (
    "Write a {sentiment} review of the {product} that mentions the {feature}.",
    "Review the {product}. Be {sentiment} and mention the {feature}.",
    "Mention the {feature} in a {sentiment} review of the {product}.",
)
OPENINGS = ("The {product} is {mood}.", "I find the {product} {mood}.", "What a {mood} thing the {product} is.")
DETAILS = ("Its {feature} is {mood}.", "The {feature} seems {mood} to me.", "You will notice the {mood} {feature}.")
CLOSINGS = ("{advice}.", "{advice}, honestly.", "In short: {advice}.")
DEMANDS = ("product", "sentiment", "feature", "no repetition")  # the ways in which a review can fail


@dataclass(frozen=True)
class Demand:
    """Holds what an instruction asks for."""

    product: str
    sentiment: str
    feature: str

    @classmethod
    def parse(cls, prompt: str) -> Demand:
        """The demand that an instruction of this grammar states.

        Raises:
            ValueError: the text is not such an instruction.
        """
        found = [_named(names, prompt) for names in (PRODUCTS, SENTIMENTS, FEATURES)]
        if any(len(names) != 1 for names in found):
            raise ValueError(f"{prompt!r} is no instruction of the demo's grammar")
        return cls(*(names[0] for names in found))


ALL_DEMANDS = tuple(Demand(*parts) for parts in product(PRODUCTS, SENTIMENTS, FEATURES))
HELD_OUT = frozenset(random.Random(0).sample(ALL_DEMANDS, len(ALL_DEMANDS) // 8))  # never asked for in training rows


def met(prompt: str, completion: str) -> dict[str, bool]:
    """Which of DEMANDS a completion meets: it names the product, its mood words are all of the sentiment asked for (and
    there is one), it mentions the feature, and it has sentences of which none comes twice."""
    demand = Demand.parse(prompt)
    words = set(re.findall(r"\w+", completion.lower()))
    sentences = [sentence.strip() for sentence in completion.split(".") if sentence.strip()]
    moods = [sentiment for sentiment, markers in MOOD_WORDS.items() if words & markers]
    answers = (
        demand.product in completion,
        moods == [demand.sentiment],
        demand.feature in words,
        0 < len(sentences) == len(set(sentences)),
    )
    return dict(zip(DEMANDS, answers, strict=True))


def score(prompt: str, completion: str) -> float:
    """The share of DEMANDS that the completion meets: 1.0 for every chosen review, 0.75 for every rejected one."""
    answers = met(prompt, completion)
    return sum(answers.values()) / len(answers)


def preference_rows(count: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """`count` rows of prompt, chosen, rejected (explicit format); completions begin with the blank after the prompt.

    Training rows never ask for a demand of the held-out ones, whatever the seeds.
    """
    rng = random.Random(f"{seed} {held_out}")
    demands = [demand for demand in ALL_DEMANDS if (demand in HELD_OUT) == held_out]
    for _ in range(count):
        demand = rng.choice(demands)
        prompt = rng.choice(INSTRUCTIONS).format(**vars(demand)) + "\nReview:"
        rejected = _broken(demand, rng.choice(DEMANDS), rng)
        yield {"prompt": prompt, "chosen": _text(_sentences(demand, rng)), "rejected": _text(rejected)}


def written_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows of prompt and completion by writers who break one demand in every second review."""
    rng = random.Random(f"{seed} written")
    for row in preference_rows(count, seed):
        yield {"prompt": row["prompt"], "completion": row[rng.choice(["chosen", "rejected"])]}


def prompt_rows(count: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Instructions alone, each once."""
    seen = set()
    for row in preference_rows(100 * count, seed, held_out):
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield {"prompt": row["prompt"]}
        if len(seen) == count:
            return


def scores(prompts: list[str], completions: list[str]) -> list[float]:
    """`score` of every completion: what --sample.score and --evaluate.score take as dpo_ds.demo.corpus:scores."""
    return [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def _sentences(demand: Demand, rng: random.Random) -> list[str]:
    """A review that meets the demand: an opening, a detail, a closing."""
    mood = rng.sample(SENTIMENTS[demand.sentiment], 2)
    return [
        rng.choice(OPENINGS).format(product=demand.product, mood=mood[0]),
        rng.choice(DETAILS).format(feature=demand.feature, mood=mood[1]),
        rng.choice(CLOSINGS).format(advice=rng.choice(ADVICE[demand.sentiment])),
    ]


def _broken(demand: Demand, broken: str, rng: random.Random) -> list[str]:
    """A review that breaks the named demand and no other."""
    if broken == "no repetition":
        opening, detail, _ = _sentences(demand, rng)
        return [opening, detail, rng.choice([opening, detail])]
    choices = {"product": PRODUCTS, "sentiment": tuple(SENTIMENTS), "feature": FEATURES}[broken]
    other = rng.choice([value for value in choices if value != getattr(demand, broken)])
    return _sentences(replace(demand, **{broken: other}), rng)


def _text(sentences: list[str]) -> str:
    return " " + " ".join(sentences)


def _named(names: Iterable[str], text: str) -> list[str]:
    return [name for name in names if re.search(rf"\b{name}\b", text)]
