"""Which of two completions is better, by scores or by a judge who is asked in both orders; baselines from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.data.chat import render_prompt
from dpo_ds.data.formats import BadRow, Conversation, Row, detect, read, shorten
from dpo_ds.data.sources import open_source
from dpo_ds.errors import ConfigError, DataError, UserError
from dpo_ds.scoring import FUNCTION, checked, load_function


@dataclass(frozen=True)
class Judge:
    """A user's function(prompts, first, second) -> how far first is preferred to second, each in [0, 1]."""

    spec: str
    function: Callable[[list[str], list[str], list[str]], Any]

    def __call__(self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
        """[rows, 2] float64: the preference for ours where it came first, and where it came second.

        Raises:
            UserError: the function raises, or an answer is no number in [0, 1].
        """
        return np.stack([self._ask(prompts, ours, theirs), 1 - self._ask(prompts, theirs, ours)], axis=1)

    def _ask(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        if not prompts:
            return np.zeros(0)
        try:
            answer = self.function(list(prompts), list(first), list(second))
        except Exception as error:  # somebody else's code fails in any way
            raise UserError(
                f"{self.spec} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        preferences = checked(answer, self.spec, first)
        outside = np.flatnonzero((preferences < 0) | (preferences > 1))
        if len(outside):
            row = outside[0]
            problem = f"returned {preferences[row]:g} for row {row}, completion {shorten(first[row])}"
            raise UserError(f"{self.spec} {problem}; a preference for the first is a number from 0 to 1")
        return preferences


def load_judge(spec: str, key: str = "evaluate.judge") -> Judge:
    """ConfigError where `--KEY SPEC` names no function that is there."""
    named = FUNCTION.fullmatch(spec)
    if named is None:
        raise ConfigError(f"--{key} {spec}: expected module:function")
    return Judge(spec, load_function(*named.groups(), f"--{key} {spec}"))


def by_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our score is above theirs, 1/2 where they are equal, 0 where it is below."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def read_baseline(path: str, prompts: Sequence[str], columns: dict[str, str], tokenizer: Any) -> list[list[str]]:
    """For each prompt the completions that the file has of it: `completion`, or the `chosen` of pairs.

    Raises:
        DataError: a file or row that cannot be read, or prompts that it has no completion of.
    """
    found: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    name = "auto"
    for location, values in open_source(path, "eval").rows():
        try:
            if isinstance(values, BadRow):
                raise values
            row = Row(values, columns)
            name = detect(row, CHOSEN_ONLY) if name == "auto" else name
            sides = PAIR if row.get("rejected") is not None else CHOSEN_ONLY  # they decide where an HH prompt ends
            prompt, completion = _texts(read(row, name, sides), tokenizer)
        except BadRow as error:
            raise DataError(f"--evaluate.baseline {location}: {error}") from None
        if prompt in found:
            found[prompt].append(completion)
    lacking = [prompt for prompt in prompts if not found[prompt]]
    if lacking:
        which = f"the first is {shorten(lacking[0])}"
        raise DataError(
            f"--evaluate.baseline {path}: has no completion of {len(lacking)} of the {len(prompts)} prompts, {which}; "
            "prompts are compared as text"
        )
    return [found[prompt] for prompt in prompts]


def _texts(conversation: Conversation, tokenizer: Any) -> tuple[str, str]:
    """Prompt and completion; of messages the prompt as the model reads it and the content of the last one."""
    if isinstance(conversation.prompt, str):
        return conversation.prompt, conversation.chosen
    prompt = render_prompt(tokenizer, conversation.prompt, conversation.tools)
    return prompt, conversation.chosen[-1]["content"]
