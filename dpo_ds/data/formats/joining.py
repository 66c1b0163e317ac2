"""How a row's prompt, its system turn and its sides come together, where some of them say the same once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpo_ds.data.rows import REASONING, BadRow, Messages, Row, shorten, without_nulls

SYSTEM = ("system", "system_prompt")


def with_system(row: Row, name: str, turns: Messages) -> Messages:
    """Puts the system turn that a column of its own gives before the turns of the field `name`."""
    system = row.optional_text(row.first_of(*SYSTEM))
    if not system:
        return turns
    if turns and is_system(turns[0]):
        if _words(turns[0]["content"]) == _words(system):
            return turns
        raise BadRow("two system turns", f"'system' is given and {name!r} begins with another system turn")
    return [{"role": "system", "content": system}, *turns]


def with_prompt_text(prompt: str, side: str, turns: Messages) -> Messages:
    """Returns a side's turns with a user's turn `prompt`, behind the system's, where they hold no question."""
    asked = [message["content"] for message in before_the_answer(turns) if message["role"] == "user"]
    if not asked:
        system, others = _split_system(turns)
        return [*system, {"role": "user", "content": prompt}, *others]
    if not any(_words(prompt) == _words(text) for text in asked):
        raise contradiction(prompt, side, turns, asked[0])
    return turns


def joined(prompt: Messages, side: str, turns: Messages) -> Messages:
    """Returns the conversation of a prompt and a side, which may repeat the prompt: all of it, its last turns alone, or
    with a system turn in front. Repeated turns need not be equal literally: white space, ids and names may differ.

    Raises:
        BadRow: the side asks anew what the prompt ends in, or has another system turn.
    """
    (system, asked), (other_system, said) = _split_system(prompt), _split_system(turns)
    if system and other_system and not _alike(system, other_system):
        raise contradiction(system[0]["content"], side, turns, other_system[0]["content"])
    head = system or other_system
    if repeated := _overlap(asked, said):
        return [*head, *asked, *said[repeated:]]
    if not said or not asked:
        return [*head, *asked, *said]
    starts_anew = said[0]["role"] != "assistant"
    if starts_anew and any(_alike(asked, said[at : at + len(asked)]) for at in range(len(said) - len(asked) + 1)):
        return [*head, *said]
    asks_anew = starts_anew and (asked[-1]["role"] != "assistant" or _alike(asked[:1], said[:1]))
    if asks_anew or (other_system and not system and asked[-1]["role"] == "user"):
        raise contradiction(asked[-1]["content"], side, turns, turns[0]["content"])
    return [*head, *asked, *_continuing(asked[-1], said)]


def end_of_prompt(prompt: Messages, whole: Messages) -> int:
    """Returns how many of the turns that `joined` gave are the prompt's, a system turn in front included."""
    asked = _split_system(prompt)[1]
    first = len(_split_system(whole)[0])
    ends = range(first + len(asked), len(whole) + 1)
    return next(end for end in ends if _alike(asked, whole[end - len(asked) : end]))


def _continuing(last: dict[str, Any], said: Messages) -> Messages:
    """Returns what is said without the words of the open turn `last`, with which an answer that is whole begins."""
    begun = last["content"].rstrip() if last["role"] == "assistant" and not last.get("tool_calls") else ""
    if not begun or said[0]["role"] != "assistant" or not said[0]["content"].startswith(begun):
        return said
    given = last["content"] if said[0]["content"].startswith(last["content"]) else begun
    return [said[0] | {"content": said[0]["content"].removeprefix(given)}, *said[1:]]


def repeats(prompt: Messages, turns: Messages) -> bool:
    """Tells whether turns say all of the prompt once more, with or without a system turn."""
    asked, said = _split_system(prompt)[1], _split_system(turns)[1]
    return bool(asked) and _alike(asked, said[: len(asked)])


def common_turns(chosen: Messages, rejected: Messages) -> int:
    """Returns how many turns both sides begin with, whatever ids and other metadata they carry; one at least is left of
    each. Reasoning that differs is a difference."""
    split = 0
    while split < min(len(chosen), len(rejected)) - 1 and _same(chosen[split], rejected[split], str):
        if any(chosen[split].get(key) != rejected[split].get(key) for key in REASONING):
            break
        split += 1
    return split


def before_the_answer(turns: Messages) -> Messages:
    """Returns all up to the last assistant turn."""
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=len(turns))
    return turns[:last]


def require_answer(side: str, answer: str | Messages) -> None:
    if isinstance(answer, list):
        turns = [message for message in answer if message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(message["role"] for message in answer) or "no message"
            raise BadRow("no assistant turn", f"{side!r} has no assistant turn ({roles}); nothing could be trained on")
        empty = not turns[-1]["content"].strip() and not turns[-1].get("tool_calls")
    else:
        empty = not answer.strip()
    if empty:
        raise BadRow(f"empty {side}", f"{side!r} is empty ({shorten(answer)}); a completion needs text")


def contradiction(prompt: str, side: str, turns: Messages, beginning: str) -> BadRow:
    require_answer(side, turns)  # a side without one is the greater mistake
    problem = f"'prompt' is {shorten(prompt)}, but {side!r} begins with {shorten(beginning)}"
    return BadRow("prompt contradicts", f"{problem}; mend one, or leave one out with --data.ignore_columns '[prompt]'")


def is_system(message: dict[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def _split_system(turns: Messages) -> tuple[Messages, Messages]:
    first = next((i for i, message in enumerate(turns) if not is_system(message)), len(turns))
    return turns[:first], turns[first:]


def _overlap(asked: Messages, said: Messages) -> int:
    """Returns how many of the first turns said are the last ones asked. A question is among them, or more follows them:
    an answer alone that says what the prompt ends in goes on from it."""
    if said and said[0]["role"] == "assistant":
        return int(len(said) > 1 and _alike(asked[-1:], said[:1]))
    lengths = range(min(len(asked), len(said)), 0, -1)
    return next((length for length in lengths if _alike(asked[-length:], said[:length])), 0)


def _alike(one: Sequence[dict], other: Sequence[dict]) -> bool:
    return len(one) == len(other) and all(_same(a, b, _words) for a, b in zip(one, other, strict=True))


def _same(one: dict[str, Any], other: dict[str, Any], read: Callable[[str], Any]) -> bool:
    if one["role"] != other["role"] or read(one["content"]) != read(other["content"]):
        return False
    return _calls(one) == _calls(other)


def _words(text: str) -> list[str]:
    return text.split()


def _calls(message: dict[str, Any]) -> list:
    """Returns what an assistant calls: names and arguments, without nulls; ids are random, a type may be left out."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or []]
    return [(function.get("name"), without_nulls(function.get("arguments"))) for function in functions]
