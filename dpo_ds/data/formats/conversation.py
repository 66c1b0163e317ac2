"""A prompt with what is said to it, before any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ds.data.rows import Messages


@dataclass(frozen=True)
class Conversation:
    """Text (all str) or chat (all message lists).

    comparisons: places of the better and the worse completion; none in supervised data. prompts_differ: the sides part
    before the last answer, so the completions hold more than that answer. margins: of each comparison, how much better
    the better one is, where that was asked for. labels: which completions are desirable, where a row says so. ties: how
    many two completions are equally good.
    """

    prompt: str | Messages
    completions: tuple[str | Messages, ...]
    comparisons: tuple[tuple[int, int], ...] = ()
    tools: list | None = None
    prompts_differ: bool = False
    margins: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    ties: int = 0

    @classmethod
    def of(
        cls, prompt: str | Messages, chosen: str | Messages, rejected: str | Messages | None = None,
        tools: list | None = None, prompts_differ: bool = False,
    ) -> Conversation:  # fmt: skip
        """A pair, or without a rejected side a supervised row."""
        if rejected is None:
            return cls(prompt, (chosen,), (), tools, prompts_differ)
        return cls(prompt, (chosen, rejected), ((0, 1),), tools, prompts_differ)

    @property
    def chosen(self) -> str | Messages:
        return self.completions[0]

    @property
    def rejected(self) -> str | Messages | None:
        return self.completions[1] if len(self.completions) > 1 else None
