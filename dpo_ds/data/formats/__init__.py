"""Raw rows -> conversations: a prompt and what each side goes on with, as text or as message lists.

Text is used verbatim; message lists go through a chat template later. A new format is one `fits`, one `read` and its
entry in `FORMATS`. Rows of a supervised data set (`sides` without "rejected") need no rejected completion.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from dpo_ds.data.formats.conversation import Conversation
from dpo_ds.data.formats.joining import (
    SYSTEM,
    before_the_answer,
    common_turns,
    end_of_prompt,
    joined,
    repeats,
    require_answer,
    with_prompt_text,
    with_system,
)
from dpo_ds.data.formats.ranked import (
    COMPLETIONS,
    HH_ANSWER,
    RANKS,
    SCORES,
    has_several,
    is_ranked,
    ranked,
    several,
)
from dpo_ds.data.rows import BadRow, Messages, Row, as_message, as_text, shorten, wrong_type
from dpo_ds.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """`fields`: all that it reads of a row."""

    fields: tuple[str, ...]
    fits: Callable[[Row], bool]
    read: Callable[[Row, bool], Conversation]  # the bool: is a rejected side wanted?


def explicit(row: Row, pair: bool) -> Conversation:
    """prompt, chosen, rejected: three strings, or message lists (and tools, system); beside a list as prompt, a string
    is the assistant's turn. A side may be a list of such completions.
    """
    if has_several(row):
        return several(row, pair)
    if row.is_text("prompt"):
        return Conversation.of(row.text("prompt"), row.text("chosen"), row.text("rejected") if pair else None)
    prompt, tools = with_system(row, "prompt", row.messages("prompt")), row.tools()
    names = PAIR_FIELDS if pair else ("chosen",)
    if isinstance(row.get("chosen"), str):
        return Conversation.of(prompt, *(_answer(row, side) for side in names), tools=tools)
    whole = [joined(prompt, side, row.messages(side)) for side in names]
    if any(turns[: len(prompt)] != prompt for turns in whole):  # a side says more in front, such as a system turn
        return _of_whole(whole[0], whole[1] if pair else None, tools)
    return Conversation.of(prompt, *(turns[len(prompt) :] for turns in whole), tools=tools)


def implicit(row: Row, pair: bool) -> Conversation:
    """Whole conversations in chosen and rejected: the messages they begin with together are the prompt.

    Without a rejected side the prompt ends before chosen's last assistant turn. A column `prompt`, text or messages,
    comes first in a side that has only the answer; otherwise the side must say the same.
    """
    chosen = _whole(row, "chosen")
    if not pair and row.get("rejected") is None:
        return _of_whole(chosen, None, row.tools())
    conversation = _of_whole(chosen, _whole(row, "rejected"), row.tools())
    return conversation if pair else Conversation.of(conversation.prompt, conversation.chosen, None, row.tools())


def hh(row: Row, pair: bool) -> Conversation:
    """Transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al. 2022, arXiv 2204.05862), used verbatim.

    The prompt is the longest common beginning that ends in "\\n\\nAssistant:"; without a rejected side it ends at
    chosen's last "\\n\\nAssistant:".
    """
    chosen = _transcript("chosen", row.text("chosen"))
    if not pair and row.get("rejected") is None:
        split = chosen.rfind(HH_ANSWER) + len(HH_ANSWER)
        return Conversation.of(chosen[:split], chosen[split:])
    rejected = row.text("rejected")
    if pair:
        _transcript("rejected", rejected)
    split = os.path.commonprefix([chosen, rejected]).rfind(HH_ANSWER)
    if split < 0:
        raise BadRow("no common prompt", f"'chosen' and 'rejected' share no beginning that ends in {HH_ANSWER!r}")
    differ = max(chosen.rfind(HH_ANSWER), rejected.rfind(HH_ANSWER)) > split
    split += len(HH_ANSWER)
    return Conversation.of(chosen[:split], chosen[split:], rejected[split:] if pair else None, prompts_differ=differ)


def sharegpt(row: Row, pair: bool) -> Conversation:
    """conversations [{from, value}], chosen and rejected {from, value}; system and tools on some.

    Supervised rows may lack chosen: then every assistant turn is trained on.
    """
    turns = with_system(row, "conversations", row.messages("conversations"))
    if not pair and row.get("chosen") is None:
        prompt, chosen = _split_at_first_answer("conversations", turns)
        return Conversation.of(prompt, chosen, tools=row.tools())
    chosen = [as_message("chosen", row["chosen"])]
    return Conversation.of(turns, chosen, [as_message("rejected", row["rejected"])] if pair else None, row.tools())


def alpaca(row: Row, pair: bool) -> Conversation:
    """instruction, chosen, rejected; input or context, system, history [[user, assistant], ...] on some.

    The user says instruction, newline, input. Supervised rows may have their answer as output or response.
    """
    prompt = []
    history = row.get("history") or []
    for i, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise wrong_type(f"history[{i}]", turn, "a list [user, assistant]")
        user, assistant = (as_text(f"history[{i}][{j}]", text) for j, text in enumerate(turn))
        prompt += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    extra = row.optional_text(row.first_of("input", "context"))
    prompt.append({"role": "user", "content": row.text("instruction") + ("\n" + extra if extra else "")})
    return _answered(row, pair, with_system(row, "history", prompt))


def orca(row: Row, pair: bool) -> Conversation:
    """question or input, chosen, rejected; system or system_prompt on some (Intel/orca_dpo_pairs and its relatives).

    Supervised rows may have their answer as response or output.
    """
    prompt = [{"role": "user", "content": row.text(row.first_of("question", "input"))}]
    return _answered(row, pair, with_system(row, "question", prompt))


def completion(row: Row, pair: bool) -> Conversation:
    """Supervised: prompt and completion (or response, output): two strings, or message lists; beside a list as prompt,
    a string is the assistant's turn. One with label false is not to be imitated.
    """
    if not pair and row.get("label") is False:
        raise BadRow("label false", "'label' is false: an undesirable completion, which sft would learn to write")
    name = row.first_of(*ANSWERS)
    if row.is_text("prompt"):
        return Conversation.of(row.text("prompt"), row.text(name))
    prompt = with_system(row, "prompt", row.messages("prompt"))
    if isinstance(row.get(name), str):
        return Conversation.of(prompt, _answer(row, name), tools=row.tools())
    whole = joined(prompt, name, row.messages(name))
    split = end_of_prompt(prompt, whole)
    return Conversation.of(whole[:split], whole[split:], tools=row.tools())


def unpaired(row: Row, pair: bool) -> Conversation:
    """prompt, completion, and label: true where the completion is desirable, false where it is not."""
    label = row["label"]
    if not isinstance(label, bool):
        raise BadRow("label is no boolean", f"'label' is {shorten(label)}; it must be true or false")
    return replace(completion(row, pair), labels=(label,))


def text(row: Row, pair: bool) -> Conversation:
    """Supervised: one text, all of it trained on."""
    return Conversation.of("", row.text("text"))


def messages(row: Row, pair: bool) -> Conversation:
    """Supervised: one conversation; every assistant turn is trained on, what precedes the first is the prompt. A column
    `prompt` says its question once more (UltraChat)."""
    turns = _whole(row, "messages")
    prompt, chosen = _split_at_first_answer("messages", turns)
    return Conversation.of(prompt, chosen, tools=row.tools())


def _is_explicit(row: Row) -> bool:
    if "prompt" not in row or "completion" in row or is_ranked(row):
        return False
    if has_several(row):
        return True
    if "chosen" not in row and (_is_answered(row) or "messages" in row):
        return False
    return not (isinstance(row.get("chosen"), list) and not _has_prompt_messages(row))


def _has_prompt_messages(row: Row) -> bool:
    """Is the prompt a message list that chosen does not repeat? Some sets keep it beside whole conversations."""
    return isinstance(row.get("prompt"), list) and not repeats(row.messages("prompt"), row.messages("chosen"))


def _is_hh(row: Row) -> bool:
    return isinstance(row.get("chosen"), str) and HH_ANSWER in row.get("chosen")


def _is_answered(row: Row) -> bool:
    return any(name in row for name in ANSWERS)


def _is_orca(row: Row) -> bool:
    asked = ("question" in row or "input" in row) and "prompt" not in row
    return asked and (isinstance(row.get("chosen"), str) or ("chosen" not in row and _is_answered(row)))


PAIR_FIELDS = ("chosen", "rejected")
ANSWERS = ("completion", "response", "output")
# In the order of detection: the first that fits a row's fields reads it.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(("conversations", *SYSTEM, "tools", *PAIR_FIELDS), lambda row: "conversations" in row, sharegpt),
    "alpaca": Format(
        ("instruction", "input", "context", *SYSTEM, "history", "tools", *ANSWERS, *PAIR_FIELDS),
        lambda row: "instruction" in row and not is_ranked(row),
        alpaca,
    ),
    "explicit": Format(("prompt", *SYSTEM, "tools", *PAIR_FIELDS), _is_explicit, explicit),
    "implicit": Format(
        ("prompt", *SYSTEM, "tools", *PAIR_FIELDS), lambda row: isinstance(row.get("chosen"), list), implicit
    ),
    "hh": Format(PAIR_FIELDS, _is_hh, hh),
    "orca": Format(("question", "input", *SYSTEM, "tools", *ANSWERS, *PAIR_FIELDS), _is_orca, orca),
    "ranked": Format(
        ("prompt", "instruction", *COMPLETIONS, *SCORES, *RANKS, *SYSTEM, "tools"), is_ranked, ranked
    ),
    "unpaired": Format(
        ("prompt", *ANSWERS, "label", *SYSTEM, "tools"),
        lambda row: "prompt" in row and "label" in row and _is_answered(row),
        unpaired,
    ),
}
SUPERVISED = {
    "completion": Format(
        ("prompt", *ANSWERS, *SYSTEM, "tools"), lambda row: "prompt" in row and _is_answered(row), completion
    ),
    "messages": Format(("prompt", "messages", *SYSTEM, "tools"), lambda row: "messages" in row, messages),
    "text": Format(("text",), lambda row: "text" in row, text),
}
# Public sets whose rows are no pairs: the fields that tell them, and what makes pairs of them.
NO_PAIRS = {
    "HelpSteer": (
        ("prompt", "response", "helpfulness"),
        "make pairs of the best and the worst response to each prompt, or train on 'response' with dpo-ds sft",
    ),
    "HelpSteer3": (
        ("context", "response1", "response2", "overall_preference"),
        "write rows of prompt (context), chosen (response1 where overall_preference is below 0) and rejected",
    ),
    "SHP": (
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "write rows of prompt (history), chosen (human_ref_A where labels is 1, else human_ref_B) and rejected",
    ),
}
FIELDS = frozenset(field for known in (FORMATS | SUPERVISED).values() for field in known.fields)


def formats(sides: tuple[str, ...]) -> dict[str, Format]:
    if "rejected" in sides:
        return FORMATS
    return {name: known for name, known in FORMATS.items() if name != "unpaired"} | SUPERVISED


def check_name(name: str, sides: tuple[str, ...]) -> None:
    """ConfigError for a data.format that is neither "auto" nor known; it names the nearest."""
    known = ["auto", *formats(sides)]
    if name not in known:
        raise ConfigError(f"data.format is {name!r}: {_nearest(name, known)}")


def check_columns(columns: Mapping[str, str]) -> None:
    """ConfigError for a data.columns that renames a field which no format reads."""
    for name in columns:
        if name not in FIELDS:
            raise ConfigError(
                f"data.columns takes {name!r} from {columns[name]!r}, but no format reads {name!r}: "
                f"{_nearest(name, sorted(FIELDS))}"
            )


def check_renamed(columns: Mapping[str, str], there: Collection[str]) -> None:
    """Raises ConfigError where data.columns takes a field from a column that no row has, while rows have the field."""
    for name, theirs in columns.items():
        if theirs not in there and name in there:
            problem = f"data.columns takes {name!r} from {theirs!r}, a column that no row has, though {name!r} is there"
            raise ConfigError(f"{problem}: {_nearest(theirs, sorted(there))}")


def detect(row: Row, sides: tuple[str, ...]) -> str:
    """The name of the format that a row's fields show, or a BadRow that lists what is there."""
    for name, candidate in formats(sides).items():
        if candidate.fits(row):
            return name
    for name, (fields, remedy) in NO_PAIRS.items():
        if all(field in row for field in fields):
            raise BadRow("no pair", f"a row of {name} ({', '.join(fields)}) holds no pair; {remedy}")
    if "chosen" in row or "rejected" in row:
        row.text("chosen")  # absent, null or a number is the clearer mistake
    there, known = ", ".join(map(repr, row.values)) or "(none)", ", ".join(formats(sides))
    problem = f"its fields {there} fit no known format ({known}); rename them with data.columns"
    raise BadRow("no known format", problem)


def read(row: Row, name: str, sides: tuple[str, ...], margin_column: str | None = None) -> Conversation:
    """The conversation of a row in the format `name`; BadRow where a field, a completion or the pair is not usable."""
    pair = "rejected" in sides
    if name == "ranked":
        conversation = ranked(row, pair, margin_column)
    else:
        conversation = formats(sides)[name].read(row, pair)
        if margin_column is not None:
            margin = row.margin(margin_column)
            conversation = replace(conversation, margins=(margin,) * len(conversation.comparisons))
    is_group = len(conversation.completions) > 2
    for i, answer in enumerate(conversation.completions):
        name = f"completions[{i}]" if is_group else "completion" if conversation.labels else PAIR_FIELDS[i]
        require_answer(name, answer)
    if conversation.comparisons and all(answer == conversation.chosen for answer in conversation.completions):
        if is_group:
            problem = f"all {len(conversation.completions)} completions are equal ({shorten(conversation.chosen)})"
            raise BadRow("all completions equal", problem)
        raise BadRow(
            "chosen equals rejected",
            f"'chosen' equals 'rejected' ({shorten(conversation.chosen)}); a pair needs two different completions",
        )
    return conversation


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"


def _transcript(side: str, text: str) -> str:
    start, marker, answer = text.rpartition(HH_ANSWER)
    if not marker:
        raise BadRow("no assistant turn", f"{side!r} ({shorten(text)}) has no {HH_ANSWER!r}; an HH transcript needs it")
    if not answer.strip():
        problem = f"{side!r} is empty after its last {HH_ANSWER!r} (it ends in {text[-40:]!r}); a completion needs text"
        raise BadRow(f"empty {side}", problem)
    return text


def _split_at_first_answer(name: str, turns: Messages) -> tuple[Messages, Messages]:
    require_answer(name, turns)
    split = next(i for i, message in enumerate(turns) if message["role"] == "assistant")
    return turns[:split], turns[split:]


def _of_whole(chosen: Messages, rejected: Messages | None, tools: list | None) -> Conversation:
    """Returns two whole conversations as their common prompt and what each goes on with; of one alone, the last answer.
    """
    if rejected is None:
        require_answer("chosen", chosen)
        split = len(before_the_answer(chosen))
        return Conversation.of(chosen[:split], chosen[split:], tools=tools)
    split = common_turns(chosen, rejected)
    prompt, chosen, rejected = chosen[:split], chosen[split:], rejected[split:]
    differ = any(message["role"] == "user" for message in chosen + rejected)
    return Conversation.of(prompt, chosen, rejected, tools, differ)


def _answer(row: Row, side: str) -> Messages:
    return [{"role": "assistant", "content": row.text(side)}]


def _answered(row: Row, pair: bool, prompt: Messages) -> Conversation:
    """Returns the prompt with answers that are text: of a pair both, else the one that there is."""
    sides = PAIR_FIELDS if pair else (row.first_of("chosen", *ANSWERS),)
    return Conversation.of(prompt, *(_answer(row, side) for side in sides), tools=row.tools())


def _whole(row: Row, side: str) -> Messages:
    """Returns a side's conversation with the row's prompt and system turn; BadRow where the prompt says otherwise."""
    turns, prompt = row.messages(side), row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        turns = with_prompt_text(row.text("prompt"), side, turns)
    elif prompt and not isinstance(prompt, str):
        turns = joined(row.messages("prompt"), side, turns)
    return with_system(row, side, turns)
