"""Message lists -> text, and where in that text the assistant speaks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from dpo_ds.cluster.foreign import time_limit
from dpo_ds.data.chat.template import first_line
from dpo_ds.data.chat.turns import Conversation
from dpo_ds.data.rows import REASONING, TRAINED, BadRow, Messages, as_text, shorten
from dpo_ds.errors import ModelError

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
    cut: what the template leaves out at the beginning of the first answer.
    """

    text: str
    prompt_end: int
    trained: list[tuple[int, int]]
    ends_in_answer: bool
    sampled: str | None = None
    left_out: str | None = None
    cut: str = ""


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
        rendered, is_asked = _render(tokenizer, prompt, completion, tools)
        if is_asked or completion[0]["role"] != "assistant":
            return rendered
        asked = _prompt(tokenizer, prompt, tools)
        if rendered.text[: rendered.prompt_end] == asked:
            return rendered
        rendered = replace(rendered, sampled=asked)
        return _as_sampled(rendered) if prompt_rendering == GENERATION else rendered


def render_prompt(tokenizer: Any, prompt: Messages, tools: list | None) -> str:
    """The text up to where the assistant's answer begins, or where its last turn ends; raises as `render` does."""
    with _within_time(tokenizer):
        return as_text(RENDERED, _prompt(tokenizer, prompt, tools))


def _render(tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None) -> tuple[Rendered, bool]:
    """Returns also whether the prompt is known to be as generation writes it."""
    first, messages, is_asked = len(prompt), [*prompt, *completion], False
    continued = prompt[-1]["content"] if completion[0]["role"] == "assistant" and _is_open(prompt) else None
    if continued is not None:
        first -= 1
        joined = completion[0] | {"content": continued + completion[0]["content"]}
        messages = [*prompt[:-1], joined, *completion[1:]]
    shown = [{key: value for key, value in message.items() if key != TRAINED} for message in messages]
    with _naming_the_template(tokenizer):
        conversation = Conversation(tokenizer, tools, shown)
    text = as_text(RENDERED, conversation.text)  # names and tool calls may hold what is no Unicode
    trained, end, prompt_end, left_out, cut = [], 0, None, None, ""
    for i in range(first, len(messages)):
        if messages[i]["role"] == "assistant":
            turn, before = conversation.turn(i, after=end), end
            start, end = turn.start, turn.end
            if i == first:
                is_asked = turn.is_asked and continued is None
                start = start if continued is None else _behind(text, start, continued)
                prompt_end, cut = start, _cut(messages[i]["content"], text[start : turn.words])
            if messages[i].get(TRAINED, True):
                trained.append((start, end))
                left_out = left_out or _left_out(messages[i], text[before:end])
    if prompt_end is None:  # the completion begins with another's turn
        before = conversation.part(shown[:first])
        prompt_end = len(before) if before is not None and text.startswith(before) else 0
    if text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    ends_in_answer = messages[-1]["role"] == "assistant" and messages[-1].get(TRAINED, True)
    return Rendered(text, prompt_end, trained, ends_in_answer, left_out=left_out, cut=cut), is_asked


def _is_open(prompt: Messages) -> bool:
    """Tells whether a prompt ends in an assistant's turn, which an answer continues."""
    return bool(prompt) and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")


def _behind(text: str, start: int, beginning: str) -> int:
    """Returns where the turn that begins at `start` goes on behind `beginning`, which a template may strip in front."""
    at = text.find(beginning.lstrip(), start)
    if at < 0 or text[start:at].strip():
        problem = f"the chat template changes the prompt's last turn {shorten(beginning)}, so nothing can go on from it"
        raise BadRow("turn not shown by the chat template", problem)
    return at + len(beginning.lstrip())


def _cut(content: str, shown: str) -> str:
    """Returns what stands in front of the end of `content` that a template shows."""
    content, shown = content.rstrip(), shown.strip()
    return content[: len(content) - len(shown)] if shown and content.endswith(shown) else ""


def _left_out(message: dict[str, Any], shown: str) -> str | None:
    """Returns the words of a turn that the template does not show, or shows otherwise."""
    words = [message["content"], *(message[key] for key in REASONING if isinstance(message.get(key), str))]
    return next((text for text in words if text.strip() not in shown), None)


def _as_sampled(rendered: Rendered) -> Rendered:
    """Returns the completion behind the prompt as generation writes it. Of the first answer all is there, also what the
    template would cut (reasoning), without what the prompt already opens (<think>)."""
    asked, said = rendered.sampled, rendered.text[rendered.prompt_end :]
    if rendered.cut:
        said = rendered.cut + said.lstrip()
    opened = re.search(r"<[^<>/\s]+>$", asked.rstrip())
    if opened and said.lstrip().startswith(opened[0]):
        said = said.lstrip().removeprefix(opened[0])
        said = said.lstrip("\n") if asked.endswith("\n") else said
    moved = len(asked) + len(said) - len(rendered.text)
    trained = [(len(asked) if a == rendered.prompt_end else a + moved, b + moved) for a, b in rendered.trained]
    left_out = None if rendered.cut else rendered.left_out
    return replace(rendered, text=asked + said, prompt_end=len(asked), trained=trained, left_out=left_out, cut="")


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
