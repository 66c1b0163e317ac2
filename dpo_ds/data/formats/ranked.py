"""Rows with any number of completions of one prompt, and what is known of them: scores, ranks, or two lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

from dpo_ds.data.formats.conversation import Conversation
from dpo_ds.data.formats.joining import joined, with_system
from dpo_ds.data.rows import BadRow, Messages, Row, as_message, as_text, shorten, wrong_type

HH_ANSWER = "\n\nAssistant:"
COMPLETIONS = ("completions", "answers")  # the second in Nectar
TEXT = ("response", "answer", "text", "completion", "content")  # of a completion that is an object (UltraFeedback)
SCORES = ("scores", "overall_score", "score")  # the more the better: of all in a list, else of each in its object
RANKS = ("ranks", "rank")  # 1 is the best


def is_ranked(row: Row) -> bool:
    """Tells whether a row has a list of completions and no side of a pair; answers of questions have no rank."""
    if "chosen" in row or "rejected" in row:
        return False
    answers = row.get("answers")
    has_ranks = isinstance(answers, list) and any(isinstance(item, dict) and "rank" in item for item in answers)
    return has_ranks or isinstance(row.get("completions"), list)


def has_several(row: Row) -> bool:
    """Tells whether a side is a list of completions; a list of messages is one."""
    return any(_is_several(row.get(side)) for side in ("chosen", "rejected"))


def several(row: Row, pair: bool) -> Conversation:
    """prompt, chosen, rejected, of which one or both are lists: each chosen one is better than each rejected one."""
    prompt = _prompt(row, "prompt")
    chosen, *rejected = (_side(row, prompt, side) for side in ("chosen", "rejected")[: 1 + pair])
    if not pair:
        return Conversation.of(prompt, chosen[0], tools=row.tools())
    completions = (*chosen, *rejected[0])
    firsts, others = range(len(chosen)), range(len(chosen), len(completions))
    return Conversation(prompt, completions, tuple((i, j) for i in firsts for j in others), row.tools())


def ranked(row: Row, pair: bool, margin_column: str | None = None) -> Conversation:
    """prompt (or instruction) and completions with scores or ranks: a list of them beside, or in each completion
    (UltraFeedback's overall_score, Nectar's answers with rank). Each is better than all that are worse; supervised
    training takes the best.
    """
    name = row.first_of(*COMPLETIONS)
    given = row[name]
    if not isinstance(given, list) or not given:
        raise wrong_type(name, given, "a list of completions")
    prompt, lead = _prompt(row, row.first_of("prompt", "instruction")), ""
    if isinstance(prompt, str) and HH_ANSWER in prompt:  # Nectar's ends in a space, which is the answer's
        start, marker, lead = prompt.rpartition(HH_ANSWER)
        prompt = start + marker
    of_each = [item if isinstance(item, dict) and "role" not in item else {"text": item} for item in given]
    completions = []
    for i, item in enumerate(of_each):
        text = next((item[key] for key in TEXT if item.get(key) is not None), None)
        completions.append(_completion(f"{name}[{i}]", text, prompt, lead))
    known, field, sign = _values(row, name, of_each)
    if not pair:
        return Conversation.of(prompt, completions[max(range(len(known)), key=lambda i: sign * known[i])])
    places = range(len(known))
    better = tuple((i, j) for i, j in permutations(places, 2) if sign * (known[i] - known[j]) > 0)
    ties = len(known) * (len(known) - 1) // 2 - len(better)
    if not better:
        problem = f"{name!r} has {len(known)} completions, all with {field} {shorten(known[0])}; none is better"
        raise BadRow("all completions equally good", problem)
    margins = None
    if margin_column is not None:
        if margin_column != field:
            raise wrong_type(margin_column, row.get(margin_column), f"{field!r}, whose differences are the margins")
        margins = tuple(abs(known[i] - known[j]) for i, j in better)
    return Conversation(prompt, tuple(completions), better, row.tools(), margins=margins, ties=ties)


def _values(row: Row, name: str, of_each: Sequence[dict[str, Any]]) -> tuple[list[float], str, int]:
    """Returns a number a completion, the field it stands in, and 1 where more is better, -1 where less is."""
    for field in (*SCORES, *RANKS):
        if field in row and row.get(field) is not None:
            values = row[field]
            if not isinstance(values, list):
                raise wrong_type(field, values, f"a list of numbers, one for each of {name!r}")
            if len(values) != len(of_each):
                problem = f"{field!r} has {len(values)} numbers for {len(of_each)} completions"
                raise BadRow(f"{field} of another count", f"{problem}; it must have one for each")
        elif any(field in item for item in of_each):
            values = [item.get(field) for item in of_each]
        else:
            continue
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                problem = f"{field!r} of {name}[{i}] is {shorten(value)}; every completion needs a number"
                raise BadRow(f"{field} missing", problem)
        return [float(value) for value in values], field, -1 if field in RANKS else 1
    problem = f"{name!r} has {len(of_each)} completions and nothing that ranks them"
    raise BadRow("no scores", f"{problem}; it needs one of {', '.join((*SCORES, *RANKS))}")


def _is_several(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, str | list) for item in value)


def _prompt(row: Row, name: str) -> str | Messages:
    if name == "instruction":
        return with_system(row, name, [{"role": "user", "content": row.text(name)}])
    return row.text(name) if row.is_text(name) else with_system(row, name, row.messages(name))


def _side(row: Row, prompt: str | Messages, side: str) -> list[str | Messages]:
    value = row[side]
    if not _is_several(value):
        return [_completion(side, value, prompt)]
    if not value:
        raise BadRow(f"empty {side}", f"{side!r} is an empty list; it needs a completion")
    return [_completion(f"{side}[{i}]", item, prompt) for i, item in enumerate(value)]


def _completion(name: str, value: Any, prompt: str | Messages, lead: str = "") -> str | Messages:
    """Returns a completion of the prompt's kind: text, or turns; beside a list as prompt, a string is one turn."""
    if isinstance(prompt, str):
        return lead + as_text(name, value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": as_text(name, value)}]
    items = value if isinstance(value, list) else [value]
    turns = [as_message(f"{name}[{i}]", item) for i, item in enumerate(items)]
    return joined(prompt, name, turns)[len(prompt) :]
