"""Where in a conversation's text an assistant's turn stands, whatever the template does with turns.

Spans are found in the one text that is trained. Usually the text before a turn, and with it, are beginnings of the
whole. Templates that treat the last turn or those before the last question otherwise (Qwen 3, gpt-oss) give others:
then the whole is rendered again with other words in one turn, and what differs is that turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dpo_ds.data.chat.template import set_clock, template_of
from dpo_ds.data.rows import BadRow, Messages, shorten

OTHER = ("@an answer@", "#other words#")  # stand for a turn's words; they begin and end unlike each other
QUESTION = {"role": "user", "content": "@a question@"}  # before an answer that nothing stands before
MARKER = r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]{1,40}\]"  # <|im_end|>, </s>, [INST]: one mark, whether a token or not
LONGEST = 43  # characters that MARKER matches


class Turn(NamedTuple):
    """Places a turn. start: behind the header, where a model would begin. words: the end of what the turn says. end:
    behind its end-of-turn mark. is_asked: all up to `start` is what generation would write.
    """

    start: int
    words: int
    end: int
    is_asked: bool


class Conversation:
    """Messages under a tokenizer's template. `text` is the whole; its turns are asked for in their order."""

    def __init__(self, tokenizer: Any, tools: list | None, messages: Messages):
        self.tokenizer, self.tools, self.messages = tokenizer, tools, messages
        self.template = template_of(tokenizer, tools)
        set_clock(tokenizer, self.template)
        self._form: Callable[[Messages], Messages] = list
        self._texts: dict[tuple, tuple[Messages, str]] = {}  # the messages too, as their ids are the key
        self.text = self.render(messages)

    @cached_property
    def marks(self) -> tuple[re.Pattern, int]:
        """A pattern of what is one mark, which are the tokenizer's own special tokens and what looks like one, and the
        most characters that it matches."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        others = sorted((token for token in special if not re.fullmatch(MARKER, token)), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, others), MARKER])), max([LONGEST, *map(len, others)])

    def render(self, messages: Messages, **options: bool) -> str:
        """Returns the template's text; raises whatever a template raises.

        A template may want a call's arguments as JSON text (DeepSeek V3), or a message's text as a list of parts
        (LLaVA). The first form that it shows is then that of the whole conversation.
        """
        if not messages:
            return ""
        key = (*map(id, messages), *options)
        if key not in self._texts:
            self._texts[key] = messages, self._in_a_form_that_is_shown(messages, options)
        return self._texts[key][1]

    def _in_a_form_that_is_shown(self, messages: Messages, options: dict[str, bool]) -> str:
        failure, text = None, ""
        try:
            text = self._apply(self._form(messages), options)
        except Exception as error:
            failure = error
        if failure is None and _shows(text, messages):
            return text
        for form in (_with_arguments_as_text, _with_parts):
            formed = form(messages)
            if formed == messages:
                continue
            try:
                other = self._apply(formed, options)
            except Exception:  # what the template says of the usual form is what is raised
                continue
            if _shows(other, messages):
                self._form = form
                return other
        if failure is not None:
            raise failure
        return text

    def _apply(self, messages: Messages, options: dict[str, bool]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, self.tools, chat_template=self.template, tokenize=False, **options
        )

    def part(self, messages: Messages, **options: bool) -> str | None:
        """Returns the text of a conversation that need not be whole; None where the template cannot show such a one."""
        try:
            return self.render(messages, **options)
        except Exception:  # a template is a program and may fail on a part in any way; on the whole, `render` raises
            return None

    def prompt_of(self, before: Messages) -> str | None:
        """Returns the text up to where a model would begin to answer `before`.

        Templates give no generation prompt to a conversation without messages: what stands before an answer then,
        without what an answer to a question has in front of its words behind the generation prompt.
        """
        if before:
            return self.part(before, add_generation_prompt=True)
        answer = _answer(OTHER[0])
        asked, answered = self.part([QUESTION], add_generation_prompt=True) or "", self.part([QUESTION, answer]) or ""
        if OTHER[0] not in (alone := self.part([answer]) or ""):
            return self._header_for_generation([QUESTION]) or None
        lead = answered.removeprefix(asked).partition(OTHER[0])[0] if answered.startswith(asked) else ""
        return alone.partition(OTHER[0])[0].removesuffix(lead)

    def turn(self, i: int, after: int) -> Turn:
        """Finds assistant turn `i`, which begins at character `after` or later.

        Raises:
            BadRow: the template does not show it, or shows it so that it cannot be told from what surrounds it.
        """
        text, is_last = self.text, i == len(self.messages) - 1
        prompt = self.prompt_of(self.messages[:i])
        prompt = prompt if prompt is not None and text.startswith(prompt) else None
        shown = text if is_last else self.part(self.messages[: i + 1])
        if prompt is None or shown is None or not text.startswith(shown) or len(shown) <= len(prompt):
            return self._turn_by_what_differs(i, after, None if prompt is None else len(prompt))
        content = self.messages[i]["content"]
        content = content if content in shown[len(prompt) :] else content.strip()
        words = shown.rfind(content, len(prompt)) + len(content) if content and content in shown[len(prompt) :] else 0
        end = max(len(shown.rstrip()), words, len(prompt))
        if not is_last and (self.messages[i].get("tool_calls") or not shown[words:].strip()):
            if not self._behind(OTHER[0], [*self.messages[:i], _answer(OTHER[0])]).strip():
                end += self._mark(i, end)  # which this template writes between turns alone
        return Turn(len(prompt), max(words, len(prompt)), end, is_asked=True)

    def _turn_by_what_differs(self, i: int, after: int, start: int | None) -> Turn:
        is_asked = start is not None
        others = list(filter(None, map(self.part, self._with_other_words(self.messages, i))))
        start = self._start(i, after, others) if start is None else start
        words = self._end_of_words(i, start, others)
        if words <= start:
            message, without = self.messages[i], self.part([*self.messages[:i], *self.messages[i + 1 :]])
            stands = any(text.replace(words, "", 1) == self.text for text in others for words in OTHER)
            stands = stands or len(without or self.text) < len(self.text)
            if message["content"].strip() or message.get("tool_calls") or not stands:
                raise left_out(message)
            words = start  # it says nothing, and its mark is trained
        turn = Turn(start, words, words + self._mark(i, words), is_asked)
        if self.messages[i].get("tool_calls") and self.messages[i]["content"].strip():
            self._require_one_place(i, turn)
        return turn

    def _require_one_place(self, i: int, turn: Turn) -> None:
        """BadRow where the text of a turn with calls stands apart from them, as behind their results (Gemma 4)."""
        reworded = [self.messages[i] | {"content": words} for words in OTHER]
        others = (self.part([*self.messages[:i], other, *self.messages[i + 1 :]]) for other in reworded)
        texts = [self.text, *filter(None, others)]
        begins, ends = self._common_beginning(texts), len(self.text) - self._common_end(texts)
        if begins < ends and (begins < turn.start or ends > turn.end):
            problem = f"the chat template writes the text {shorten(self.messages[i]['content'])} apart from its calls"
            raise BadRow("a turn in two places", problem)

    def require_alone(self, i: int, turn: Turn) -> None:
        """BadRow where what another says stands in what is taken for turn `i`."""
        said = self.text[turn.start : turn.end]
        for j, message in enumerate(self.messages):
            words = message["content"].strip()
            if j == i or message["role"] == "assistant" or not words or words not in said:
                continue
            texts = [self.text, *filter(None, map(self.part, self._with_other_words(self.messages, j)))]
            begins, ends = self._common_beginning(texts), len(self.text) - self._common_end(texts)
            if len(texts) > 1 and max(begins, turn.start) < min(ends, turn.end):
                problem = f"the chat template writes {shorten(words)}, which the {message['role']} says, within the"
                raise BadRow("a turn around another", f"{problem} answer {shorten(self.messages[i]['content'])}")

    def beginning_of(self, i: int) -> int:
        """Returns where message `i` begins, which is not the assistant's; its header may stand before."""
        before = self.part(self.messages[:i])
        if before is not None and self.text.startswith(before):
            return len(before)
        others = filter(None, map(self.part, self._with_other_words(self.messages, i)))
        return self._common_beginning([self.text, *others])

    def _before(self, i: int) -> Messages:
        """Returns the messages before turn `i`, with a question where there is none, as some templates want one."""
        before = self.messages[:i]
        return before if any(message["role"] == "user" for message in before) else [*before, QUESTION]

    def _with_other_words(self, messages: Messages, i: int) -> Iterator[Messages]:
        """Yields the messages with other words in turn `i`, and nothing else in it."""
        kept = {key: messages[i][key] for key in ("name", "tool_call_id") if key in messages[i]}
        for words in OTHER:
            yield [*messages[:i], {"role": messages[i]["role"], "content": words, **kept}, *messages[i + 1 :]]

    def _start(self, i: int, after: int, others: Sequence[str]) -> int:
        """Returns where turn `i` begins: behind what generation writes behind the turn before, where that stands here;
        else behind the header for generation; else where it becomes another text with other words.
        """
        before, lowest, header = self.messages[:i], after, ""
        prompt = self.part(before, add_generation_prompt=True) or ""
        if i:
            texts = [self.text, *filter(None, map(self.part, self._with_other_words(self.messages, i - 1)))]
            if len(texts) > 1:
                lowest = max(after, len(self.text) - self._common_end(texts))
            others_asked = self._with_other_words(before, i - 1)
            asked = [self.part(messages, add_generation_prompt=True) for messages in others_asked]
            if None not in asked:
                header = prompt[len(prompt) - self._common_end([prompt, *asked]) :]
                standing = self._as_it_stands(header, lowest)
                if standing:
                    return lowest + standing
        alone = [self.part([*before, _answer(words)]) or "" for words in OTHER]
        alone = [text for text in alone if text.startswith(self.text[:lowest])]
        differs = max(lowest, self._common_beginning([self.text, *(others or alone)]))
        header = self._header_for_generation(self._before(i))
        at = self.text.rfind(header, lowest, differs) if header else -1
        return at + len(header) if at >= 0 else differs

    def _as_it_stands(self, header: str, at: int) -> int:
        """Returns how many characters of the header for generation the text has at a place: the whole, or all before an
        element that generation opens and closes (<think></think>) and the text fills."""
        if self.text.startswith(header, at):
            return len(header)
        common = self._common_beginning([header, self.text[at : at + len(header)]])
        opened = re.search(r"<([^<>/\s]+)>\s*$", header[:common])
        return opened.start() if opened and f"</{opened[1]}>" in header[common:] else 0

    def _end_of_words(self, i: int, start: int, others: Sequence[str]) -> int:
        """Returns where what turn `i` says ends: what follows is the same whatever it says."""
        calls = self.messages[i].get("tool_calls")
        if not calls and others:
            return len(self.text) - self._common_end([self.text, *others])
        before = self.messages[:i]
        alone, answers = self.part(self.messages[: i + 1]), [self.part([*before, _answer(words)]) for words in OTHER]
        if alone is not None and None not in answers:
            begins = self.prompt_of(before)
            if begins is None or not alone.startswith(begins):
                begins = alone[: self._common_beginning([alone, *answers])]
            mark = self._common_end([alone, *answers])
            said = alone[len(begins) : len(alone) - mark]
            said = said if self.text.find(said, start) >= 0 else said.rstrip()
            at = self.text.find(said, start)
            if said.strip() and not self.text[start:at].strip():
                return at + len(said)
            # Before other turns it says less than as the last one, but its calls close in the same way.
            called = [self._with_other_calls(i, words) for words in OTHER] if calls else []
            closing = [self.part([*before, message]) for message in called]
            whole = [self.part([*before, message, *self.messages[i + 1 :]]) for message in called]
            if calls and None not in closing + whole:
                end = len(self.text) - self._common_end([self.text, *whole])
                return end + max(0, self._common_end([alone, *closing]) - mark)
        problem = "the chat template shows a turn otherwise in the whole conversation than as its last; which part of"
        problem += f" the text the turn {shorten(self.messages[i]['content'])} is cannot be told"
        raise BadRow("turn not found in the chat template's text", problem)

    def _with_other_calls(self, i: int, words: str) -> dict[str, Any]:
        def other(arguments: Any) -> Any:
            return json.dumps({words: words}) if isinstance(arguments, str) else {words: words}

        message = self.messages[i]
        return message | {"tool_calls": [_with_arguments(call, other) for call in message["tool_calls"]]}

    def _mark(self, i: int, words: int) -> int:
        """Returns how many characters the end-of-turn mark behind turn `i` has: what follows the turn, and would follow
        it whoever speaks next, without what begins the next turn."""
        rest = self.text[words:]
        if i == len(self.messages) - 1:
            return len(rest.rstrip())
        before, answer = self._before(i), _answer(OTHER[0])
        last = self._behind(OTHER[0], [*before, answer])
        mark = rest[: self._common_beginning([rest, last])].rstrip()
        if mark:
            return len(mark)
        for role in ("assistant", "user", "system", "tool"):
            other = {"role": role, "content": OTHER[1]}
            behind = self._behind(OTHER[0], [*before, answer, other]) if role != self.messages[i + 1]["role"] else ""
            if OTHER[1] in behind:
                mark = rest[: self._common_beginning([rest, behind])]
                return len(self._without_the_next_header(mark, before).rstrip())
        return 0

    def _behind(self, words: str, messages: Messages) -> str:
        return (self.part(messages) or "").partition(words)[2]

    def _without_the_next_header(self, mark: str, before: Messages) -> str:
        """Cuts off the end of `mark` where it begins a header, which the template writes for generation."""
        header = self._header_for_generation(before)
        longest = next((n for n in range(len(mark) - 1, 0, -1) if header.startswith(mark[-n:])), 0)
        return mark[: len(mark) - longest]

    def _header_for_generation(self, before: Messages) -> str:
        """Returns what the template adds to `before` for an answer to come; "" where it does not merely add."""
        asked, without = self.part(before, add_generation_prompt=True), self.part(before)
        return asked[len(without) :] if asked and without and asked.startswith(without) else ""

    def _common_beginning(self, texts: Sequence[str]) -> int:
        """Returns how many characters all texts begin with; a mark counts whole or not at all."""
        length = _how_many(min(map(len, texts)), lambda n: all(text.startswith(texts[0][:n]) for text in texts))
        split = [mark.start() for text in texts if (mark := self._mark_around(length, text))]
        return min(split, default=length)

    def _common_end(self, texts: Sequence[str]) -> int:
        shortest, first = min(map(len, texts)), texts[0]
        length = _how_many(shortest, lambda n: all(text.endswith(first[len(first) - n :]) for text in texts))
        split = [len(text) - mark.end() for text in texts if (mark := self._mark_around(len(text) - length, text))]
        return min(split, default=length)

    def _mark_around(self, at: int, text: str) -> re.Match | None:
        pattern, longest = self.marks
        found = pattern.finditer(text, max(0, at - longest), at + longest)
        return next((mark for mark in found if mark.start() < at < mark.end()), None)


def _how_many(most: int, holds: Callable[[int], bool]) -> int:
    """Returns the greatest n up to `most` for which something holds that holds for all smaller n."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least


def _shows(text: str, messages: Messages) -> bool:
    """Tells whether a text has the users' words (else anybody's), and nothing as Python would print it."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or []]
    arguments = [call["arguments"] for call in calls if isinstance(call.get("arguments"), dict)]
    if any(given and str(given) in text for given in arguments) or "{'type': 'text', 'text': " in text:
        return False
    users = [message for message in messages if message["role"] == "user"]
    heard = [message["content"].strip() in text for message in users or messages]
    return all(heard) if users else any(heard)


def _with_arguments_as_text(messages: Messages) -> Messages:
    return [
        message | {"tool_calls": [_with_arguments(call, _as_json) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_parts(messages: Messages) -> Messages:
    return [message | {"content": [_part(message["content"])]} for message in messages]


def _part(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def _with_arguments(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = call.get("function", call)
    changed = function | {"arguments": change(function.get("arguments"))}
    return call | {"function": changed} if "function" in call else changed


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def called(message: dict[str, Any]) -> list[str]:
    """Returns the names that a turn calls."""
    names = [call.get("function", call).get("name") for call in message.get("tool_calls") or []]
    return [name for name in names if isinstance(name, str)]


def left_out(message: dict[str, Any]) -> BadRow:
    calls = called(message)
    if message["content"].strip():
        what = f"the turn {shorten(message['content'])}"
    else:
        what = f"a turn that calls {', '.join(calls)}" if calls else "a turn without text"
    return BadRow("turn not shown by the chat template", f"the chat template leaves out {what}")


def _answer(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}
