"""Scores of completions; which of two is better, by them or by a judge asked in both orders; baselines from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.cluster.foreign import Limit, guarded
from dpo_ds.commands.evaluate.measure import over_ranks
from dpo_ds.commands.evaluate.results import Measured, Outcome
from dpo_ds.data.chat.render import render_prompt
from dpo_ds.data.formats import Conversation, completion, detect, read
from dpo_ds.data.reading import usable
from dpo_ds.data.rows import BadRow, Location, Row, shorten
from dpo_ds.data.sources import open_source
from dpo_ds.errors import ConfigError, DataError, UserError
from dpo_ds.models.scoring import FUNCTION, Scorer, checked, load_function


@dataclass(frozen=True)
class Judge:
    """A user's function(prompts, first, second) -> how far first is preferred to second, each in [0, 1]."""

    spec: str
    function: Callable[[list[str], list[str], list[str]], Any]
    limit: Limit

    def __call__(self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
        """[rows, 2] float64: the preference for ours where it came first, and where it came second.

        Raises:
            UserError: the function raises or does not return (foreign.guarded), or an answer is no number in [0, 1].
        """
        return np.stack([self._ask(prompts, ours, theirs), 1 - self._ask(prompts, theirs, ours)], axis=1)

    def _ask(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        if not prompts:
            return np.zeros(0)
        with guarded(self.spec, self.limit):
            answer = self.function(list(prompts), list(first), list(second))
        preferences = checked(answer, self.spec, first, self.limit)
        outside = np.flatnonzero((preferences < 0) | (preferences > 1))
        if len(outside):
            row = outside[0]
            problem = f"returned {preferences[row]:g} for row {row}, completion {shorten(first[row])}"
            raise UserError(f"{self.spec} {problem}; a preference for the first is a number from 0 to 1")
        return preferences


def load_judge(spec: str, seconds: float, key: str = "evaluate.judge") -> Judge:
    """ConfigError where `--KEY SPEC` names no function that is there."""
    named = FUNCTION.fullmatch(spec)
    if named is None:
        raise ConfigError(f"--{key} {spec}: expected module:function")
    limit = Limit(seconds, "evaluate.score_timeout")
    return Judge(spec, load_function(*named.groups(), f"--{key} {spec}", limit), limit)


def by_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our score is above theirs, 1/2 where they are equal, 0 where it is below."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def give_scores(outcome: Outcome, scorer: Scorer | None) -> None:
    """Fills in the scores of all texts. All ranks enter.

    Equal texts of a prompt are scored once, whoever wrote them: in two batches last bits would make a tie a win.
    """
    models = [model for model in outcome.rows if model.texts is not None]
    if scorer is None or not models:
        return
    keys = {model.name: list(zip(*_columns(outcome, model), strict=True)) for model in models}
    distinct = list(dict.fromkeys(key for own in keys.values() for key in own))

    def score(rows: np.ndarray) -> np.ndarray:
        return scorer([distinct[row][0] for row in rows], [distinct[row][1] for row in rows])

    scores = dict(zip(distinct, over_ranks(len(distinct), score), strict=True))
    for model in models:
        model.scores = np.array([scores[key] for key in keys[model.name]]).reshape(len(model.texts), -1)


def give_preferences(outcome: Outcome, judge: Judge | None) -> None:
    """Fills in who is preferred to the rival, by the judge or else by scores. All ranks enter."""
    rival = outcome.rival
    if rival is None or rival.texts is None:
        return
    for model in outcome.rows:
        if model is rival or model.texts is None:
            continue
        if judge is None:
            model.preferred = by_scores(model.scores, rival.scores)
            continue
        columns = _columns(outcome, model, rival)

        def ask(rows: np.ndarray, columns=columns) -> np.ndarray:
            return judge(*([column[row] for row in rows] for column in columns))

        model.in_orders = over_ranks(len(columns[0]), ask).reshape(len(model.texts), -1, 2)
        model.preferred = model.in_orders.mean(2)


def _columns(outcome: Outcome, *models: Measured) -> list[list[str]]:
    """Each completion's prompt, then its text by each of the models, all [prompts x n]."""
    prompts = [prompt.text for prompt, own in zip(outcome.prompts, models[0].texts, strict=True) for _ in own]
    return [prompts, *([text for row in model.texts for text in row] for model in models)]


def read_baseline(path: str, prompts: Sequence[str], columns: dict[str, str], tokenizer: Any) -> list[list[str]]:
    """For each prompt the completions that the file has of it: `completion`, or the `chosen` of pairs.

    Raises:
        DataError: a file or row that cannot be read, a file of several models' completions, or prompts that it has
            no completion of.
    """
    found: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    name, models = "auto", set()

    def parse(row: Row) -> tuple[str, str]:
        nonlocal name
        name = detect(row, CHOSEN_ONLY) if name == "auto" else name
        texts = _texts(_read(row, name), tokenizer)
        if name == "completion" and "model" in row.values:  # as in the completions.parquet of an evaluation
            models.add(shorten(row.values["model"]))
            if len(models) > 1:
                raise BadRow(
                    "several models", f"the column 'model' has {' and '.join(sorted(models))}, and a baseline is one "
                    "model's; give a file with that model's rows alone",
                )  # fmt: skip
        return texts

    def refuse(location: Location, error: BadRow) -> None:
        raise DataError(f"--evaluate.baseline {location}: {error}") from None

    for _, (prompt, text) in usable(open_source(path, "eval").rows(), columns, parse, refuse):
        if prompt in found:
            found[prompt].append(text)
    lacking = [prompt for prompt in prompts if not found[prompt]]
    if lacking:
        which = f"the first is {shorten(lacking[0])}"
        raise DataError(
            f"--evaluate.baseline {path}: has no completion of {len(lacking)} of the {len(prompts)} prompts, {which}; "
            "prompts are compared as text"
        )
    return [found[prompt] for prompt in prompts]


def _read(row: Row, name: str) -> Conversation:
    if name == "completion" and row.is_text("prompt"):
        return completion(row, pair=False)  # an empty one counts: a model may end at once
    sides = PAIR if row.get("rejected") is not None else CHOSEN_ONLY  # they decide where an HH prompt ends
    return read(row, name, sides)


def _texts(conversation: Conversation, tokenizer: Any) -> tuple[str, str]:
    """Prompt and completion; of messages the prompt as the model reads it and the content of the last one."""
    if isinstance(conversation.prompt, str):
        return conversation.prompt, conversation.chosen
    prompt = render_prompt(tokenizer, conversation.prompt, conversation.tools)
    return prompt, conversation.chosen[-1]["content"]
