"""Message lists -> text, and where in that text the assistant speaks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from dpo_ds.cluster.foreign import time_limit
from dpo_ds.data.chat.turns import LONGEST, MARKER, Conversation, Turn, called, left_out
from dpo_ds.data.rows import REASONING, TRAINED, BadRow, Messages, as_text, shorten
from dpo_ds.errors import ModelError, first_line

TEMPLATE_SECONDS = 60.0  # for one conversation, which takes a millisecond
RENDERED = "the chat template's text"
CONVERSATION, GENERATION = "conversation", "generation"  # data.prompt_rendering


@dataclass(frozen=True)
class Rendered:
    """A prompt with one completion, which begins at character `prompt_end`.

    trained: the character spans of the completion's assistant turns, each with its end-of-turn mark.
    ends_in_answer: the last message is the assistant's, and trained.
    sampled: the prompt as generation would write it, where that is another text; None where it is the same.
    left_out: what the completion's trained turns say and the template does not show, the first of it.
    """

    text: str
    prompt_end: int
    trained: list[tuple[int, int]]
    ends_in_answer: bool
    sampled: str | None = None
    left_out: str | None = None


class _Whole(NamedTuple):
    """A conversation's text. first: the first turn, where an assistant's. left_out: a trained turn's, each."""

    rendered: Rendered
    first: Turn | None
    left_out: list[str | None]


def render(
    tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None, prompt_rendering: str = CONVERSATION
) -> Rendered:
    """Returns the text of a prompt that a completion follows; an assistant turn at the prompt's end is continued.

    White space after the last EOS that the template writes is left off. prompt_rendering "generation" puts the prompt
    as generation writes it in the place of the template's own, and behind it the first answer, whole.

    Raises:
        BadRow: the template refuses the conversation, fails on it or leaves an assistant turn out.
        ModelError: the template is no Jinja or does not come to an end.
    """
    with _within_time(tokenizer):
        prompt = _asked(prompt, completion)
        whole = _render(tokenizer, prompt, completion, tools)
        rendered = whole.rendered
        if whole.first is None:
            return rendered
        asked = rendered.text[: rendered.prompt_end]
        if not whole.first.is_asked:
            asked = _prompt(tokenizer, prompt, tools)
            rendered = replace(rendered, sampled=None if rendered.text[: rendered.prompt_end] == asked else asked)
        if prompt_rendering == GENERATION and (rendered.sampled is not None or len(completion) > 1):
            return _as_sampled(tokenizer, prompt, completion, tools, whole, asked)
        return rendered


def render_prompt(tokenizer: Any, prompt: Messages, tools: list | None) -> str:
    """The text up to where the assistant's answer begins, or where its last turn ends; raises as `render` does."""
    with _within_time(tokenizer):
        return as_text(RENDERED, _prompt(tokenizer, _asked(prompt, [{"role": "assistant"}]), tools))


def _render(tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None) -> _Whole:
    first, messages, continued = len(prompt), [*prompt, *completion], None
    if completion[0]["role"] == "assistant" and _is_open(prompt):
        first, continued = first - 1, prompt[-1]["content"]
        joined = completion[0] | {"content": continued + completion[0]["content"]}
        messages = [*prompt[:-1], joined, *completion[1:]]
    shown = [{key: value for key, value in message.items() if key != TRAINED} for message in messages]
    with _naming_the_template(tokenizer):
        conversation = Conversation(tokenizer, tools, shown)
    text = as_text(RENDERED, conversation.text)  # names and tool calls may hold what is no Unicode
    turns, trained, missing, end = {}, [], [], 0
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        turn = conversation.turn(i, after=end)
        said = text[max(end, turn.start - LONGEST) : turn.end]  # with a <think> that the header opens
        end, hidden = turn.end, _left_out(messages[i], said)
        if hidden in called(messages[i]) and not messages[i]["content"].strip():
            raise left_out(messages[i])
        if i == first and continued is not None:
            asked = conversation.part(prompt, continue_final_message=True)
            start = _behind(text, turn, continued, messages[i]["content"], asked)
            turn = turn._replace(start=start, words=max(start, turn.words), is_asked=False)
        turns[i] = turn
        if messages[i].get(TRAINED, True):
            trained.append((turn.start, turn.end))
            missing.append(hidden)
            conversation.require_alone(i, turn)
    if text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    ends_in_answer = messages[-1]["role"] == "assistant" and messages[-1].get(TRAINED, True)
    begins = turns.get(first)
    prompt_end = begins.start if begins else conversation.beginning_of(first)
    of_all = next(filter(None, missing), None)
    return _Whole(Rendered(text, prompt_end, trained, ends_in_answer, left_out=of_all), begins, missing)


def _is_open(prompt: Messages) -> bool:
    """Tells whether a prompt ends in an assistant's turn, which an answer continues."""
    return bool(prompt) and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")


def _asked(prompt: Messages, completion: Messages) -> Messages:
    """Returns the prompt without a last turn that an answer would continue and that says nothing."""
    says_nothing = _is_open(prompt) and not prompt[-1]["content"].strip() and len(prompt[-1]) == 2
    return prompt[:-1] if says_nothing and completion[0]["role"] == "assistant" else prompt


def _behind(text: str, turn: Turn, beginning: str, content: str, asked: str | None) -> int:
    """Returns where a turn goes on behind `beginning`, of the content that it has in all: behind the prompt as asked,
    where the text begins so; else behind its words, which a template may strip in front and head with an empty thought.
    """
    if asked is not None and text.startswith(asked) and turn.start <= len(asked) <= turn.end:
        return len(asked)
    beginning = beginning.lstrip()
    at = max(text.find(content.strip(), turn.start, turn.end), text.find(beginning, turn.start, turn.end))
    if at < 0:
        problem = f"the chat template changes the prompt's last turn {shorten(beginning)}, so nothing can go on from it"
        raise BadRow("turn not shown by the chat template", problem)
    return at + len(beginning)


def _left_out(message: dict[str, Any], shown: str) -> str | None:
    """Returns what of a turn the template does not show, or shows otherwise: its words, or the name that it calls."""
    words = [message["content"], *(message[key] for key in REASONING if isinstance(message.get(key), str))]
    return next((text for text in [*words, *called(message)] if text.strip() not in shown), None)


def _as_sampled(
    tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None, whole: _Whole, asked: str
) -> Rendered:
    """Returns the completion behind the prompt as generation writes it. Of the first answer all is there that the model
    would have said: what the template writes of it where nothing follows; and where it writes another prompt even then,
    also what it cuts in front (reasoning), without what the prompt already opens (<think>)."""
    rendered, first, answer = whole.rendered, whole.first, completion[0]
    alone, begins, _ = _render(tokenizer, prompt, completion[:1], tools) if len(completion) > 1 else whole
    if alone.text.startswith(asked):
        has_words = begins.words > begins.start and not answer.get("tool_calls")
        said = alone.text[len(asked) : begins.words if has_words else begins.end]
        said += rendered.text[first.words : first.end] if has_words else ""  # the mark that turns have in the middle
    else:
        said = _with_what_is_cut(answer, rendered.text[rendered.prompt_end : first.end], asked)
    moved = len(asked) + len(said) - first.end
    spans, missing = [(a + moved, b + moved) for a, b in rendered.trained], list(whole.left_out)
    if answer.get(TRAINED, True):
        spans[0], missing[0] = (len(asked), len(asked) + len(said)), _left_out(answer, asked + said)
    return replace(
        rendered,
        text=asked + said + rendered.text[first.end :],
        prompt_end=len(asked),
        trained=spans,
        sampled=asked if rendered.text[: rendered.prompt_end] != asked else None,
        left_out=next(filter(None, missing), None),
    )


def _with_what_is_cut(answer: dict[str, Any], said: str, asked: str) -> str:
    """Returns an answer's text with the reasoning that a template leaves out in front of it."""
    opened = re.search(r"<([^<>/\s]+)>$", asked.rstrip())
    thought = next((answer[key] for key in REASONING if isinstance(answer.get(key), str)), None)
    if cut := _cut(answer["content"], said):
        said = cut + said.lstrip()
    elif opened and thought and thought.strip() not in said:
        return f"{thought.strip()}\n</{opened[1]}>\n\n{said.lstrip()}"
    if opened and said.lstrip().startswith(opened[0]):
        said = said.lstrip().removeprefix(opened[0])
        said = said.lstrip("\n") if asked.endswith("\n") else said
    return said


def _cut(content: str, shown: str) -> str:
    """Returns what stands before the end of `content` that a text begins with, behind a mark; all where it is cut."""
    if content.strip() in shown:
        return ""
    kept = [content[mark.end() :].lstrip() for mark in re.finditer(MARKER, content)]
    return next((content[: len(content) - len(rest)] for rest in kept if shown.lstrip().startswith(rest.rstrip())), "")


def _prompt(tokenizer: Any, prompt: Messages, tools: list | None) -> str:
    with _naming_the_template(tokenizer):
        conversation = Conversation(tokenizer, tools, [])
        if _is_open(prompt):
            return conversation.render(prompt, continue_final_message=True)
        if prompt:
            return conversation.render(prompt, add_generation_prompt=True)
        return conversation.prompt_of([]) or ""


def _within_time(tokenizer: Any) -> contextlib.AbstractContextManager:
    def late() -> ModelError:
        problem = f"the chat template did not come to an end within {TEMPLATE_SECONDS:g} s on a conversation"
        return ModelError(f"{tokenizer.name_or_path}: {problem}; mend it in the tokenizer's folder")

    return time_limit(TEMPLATE_SECONDS, late)


@contextlib.contextmanager
def _naming_the_template(tokenizer: Any) -> Iterator[None]:
    """Raises what the template raises as BadRow or ModelError."""
    try:
        yield
    except ModelError:
        raise
    except TemplateSyntaxError as error:
        problem = f"the chat template is not valid at its line {error.lineno}: {error.message}"
        remedy = "mend it in the tokenizer's folder, or set another with --data.chat_template"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}; {remedy}") from error
    except TemplateError as error:
        problem = f"the chat template refuses the conversation: {first_line(error)}"
        raise BadRow("refused by the chat template", problem) from error
    except Exception as error:  # a template is a program that comes with the model: it can fail in any way
        problem = f"the chat template fails on the conversation: {type(error).__name__}: {first_line(error)}"
        raise BadRow("chat template failed", problem) from error
