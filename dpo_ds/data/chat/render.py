"""Message lists -> text, and where in that text the assistant speaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from dpo_ds.cluster.foreign import time_limit
from dpo_ds.config.inputs import JINJA
from dpo_ds.data.rows import BadRow, Messages, as_text, shorten
from dpo_ds.errors import ConfigError, ModelError

# For a tokenizer without a template. Role lines as in Tulu 2 (arXiv 2311.10702), EOS after each assistant turn:
#   <|user|>\nHello\n<|assistant|>\nHi</s>\n
# Tools come first as JSON, one a line, under <|tools|>; an assistant's calls follow its text as JSON, one a line.
DEFAULT_CHAT_TEMPLATE = """\
{%- if tools %}{{- '<|tools|>\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}{{- call | tojson }}
{%- endfor %}
{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

TEMPLATE, BUILT_IN = "the chat template", "the built-in one"  # among what a checkpoint remembers
TEMPLATE_SECONDS = 60.0  # for one conversation, which takes a millisecond
RENDERED = "the chat template's text"
SENTINEL = "@@the answer@@"  # stands for an assistant's text, to learn what the template puts around it


@dataclass(frozen=True)
class Rendered:
    """A prompt with one completion, which begins at character `prompt_end`.

    trained: the character spans of the completion's assistant turns, each with its end-of-turn mark.
    ends_in_answer: the last message is the assistant's.
    """

    text: str
    prompt_end: int
    trained: list[tuple[int, int]]
    ends_in_answer: bool


def set_template(tokenizer: Any, given: str | None) -> None:
    """Sets data.chat_template, a template's text or the name of one of the tokenizer's; None leaves the tokenizer's.

    Raises:
        ConfigError: the tokenizer has none of that name, or the text is no valid Jinja.
    """
    if given is None:
        return
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if not any(mark in given for mark in JINJA):
        if given not in named:
            has = f"templates named {', '.join(sorted(named))}" if named else "no chat template"
            problem = f"no such file, and {tokenizer.name_or_path} has {has}"
            raise ConfigError(f"--data.chat_template {shorten(given)}: {problem}; give a file or a template's text")
        given = named[given]
    try:
        _compile_jinja_template(given)
    except TemplateSyntaxError as error:
        problem = f"not valid at its line {error.lineno}: {error.message}"
        raise ConfigError(f"--data.chat_template {shorten(given)}: {problem}") from error
    tokenizer.chat_template = given


def settle_template(tokenizer: Any, has_messages: bool) -> list[str]:
    """Gives a tokenizer that has no template the built-in one where rows go through it, so that it is exported with
    the tokenizer; returns the line that says so.
    """
    if tokenizer.chat_template or not has_messages:
        return []
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    name = tokenizer.name_or_path
    return [f"{name}: has no chat template, so messages go through the built-in one; --data.chat_template sets another"]


def template_of(tokenizer: Any, tools: list | None = None) -> str:
    """ModelError where the tokenizer has several templates and none of them is the default."""
    if not tokenizer.chat_template:
        return DEFAULT_CHAT_TEMPLATE
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        problem = f"no chat template to use: {_first_line(error)}; name one with --data.chat_template"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}") from error


def render(tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None) -> Rendered:
    """BadRow where the template refuses the conversation, fails on it or leaves an assistant turn out; ModelError
    where the template is no Jinja or does not come to an end.

    White space after the last EOS that the template writes is left off.
    """
    with _within_time(tokenizer):
        return _render(tokenizer, prompt, completion, tools)


def _render(tokenizer: Any, prompt: Messages, completion: Messages, tools: list | None) -> Rendered:
    chat = _Chat(tokenizer, tools)
    messages = prompt + completion
    with _naming_the_template(tokenizer):
        text = chat.text(messages)
    as_text(RENDERED, text)  # names and tool calls may hold what is no Unicode
    trained, end = [], 0
    for i in range(len(prompt), len(messages)):
        if messages[i]["role"] == "assistant":
            start, end = chat.turn(text, messages, i, after=end)
            trained.append((start, end))
    if completion[0]["role"] == "assistant":
        prompt_end = trained[0][0]
    else:
        before = chat.part(prompt)
        prompt_end = len(before) if before is not None and text.startswith(before) else 0
    if text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    return Rendered(text, prompt_end, trained, completion[-1]["role"] == "assistant")


def render_prompt(tokenizer: Any, prompt: Messages, tools: list | None) -> str:
    """The text up to where the assistant's answer begins; raises as `render` does."""
    chat = _Chat(tokenizer, tools)
    with _within_time(tokenizer), _naming_the_template(tokenizer):
        if not prompt:  # templates give no generation prompt to a conversation without messages
            return chat.around([])[0] or ""
        text = chat.text(prompt, generation_prompt=True)
    return as_text(RENDERED, text)


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
    except TemplateSyntaxError as error:
        problem = f"the chat template is not valid at its line {error.lineno}: {error.message}"
        remedy = "mend it in the tokenizer's folder, or set another with --data.chat_template"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}; {remedy}") from error
    except TemplateError as error:
        problem = f"the chat template refuses the conversation: {_first_line(error)}"
        raise BadRow("refused by the chat template", problem) from error
    except Exception as error:  # a template is a program that comes with the model: it can fail in any way
        problem = f"the chat template fails on the conversation: {type(error).__name__}: {_first_line(error)}"
        raise BadRow("chat template failed", problem) from error


class _Chat:
    def __init__(self, tokenizer: Any, tools: list | None):
        self.tokenizer = tokenizer
        self.tools = tools
        self.template = template_of(tokenizer, tools)

    def text(self, messages: Messages, generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        return self.tokenizer.apply_chat_template(
            messages, self.tools, chat_template=self.template, add_generation_prompt=generation_prompt, tokenize=False
        )

    def part(self, messages: Messages, generation_prompt: bool = False) -> str | None:
        """The text of a conversation that need not be whole; None where the template cannot show such a part."""
        try:
            return self.text(messages, generation_prompt)
        except Exception:  # a template is a program and may fail on a part in any way; on the whole, `text` raises
            return None

    def around(self, before: Messages) -> tuple[str | None, str]:
        """Returns what the template writes up to the text of an assistant turn that follows `before`, and behind that
        text.
        """
        text = self.part([*before, {"role": "assistant", "content": SENTINEL}]) or ""
        head, found, mark = text.partition(SENTINEL)
        return (head, mark) if found else (None, "")

    def turn(self, text: str, messages: Messages, i: int, after: int) -> tuple[int, int]:
        """The characters of assistant turn `i`, from where generation would begin to its end-of-turn mark.

        Usually the text up to the turn, and with the turn, are beginnings of the whole. Some templates show earlier
        turns otherwise (they drop <think> blocks): then the message's content is looked for behind its header.
        """
        # Templates give no generation prompt to a conversation without messages.
        head = self.part(messages[:i], generation_prompt=True) if i else self.around([])[0]
        head = head if head is not None and text.startswith(head) else None
        tail = text if i == len(messages) - 1 else self.part(messages[: i + 1])
        content = messages[i]["content"]
        if head is not None and tail is not None and text.startswith(tail) and len(head) < len(tail):
            end = max(len(tail.rstrip()), tail.rfind(content) + len(content) if content else 0)
            return len(head), max(end, len(head))
        before, mark = self.around(messages[:i])
        before, mark = before or "", mark.rstrip()
        start = len(head) if head is not None else max(after, len(before) if text.startswith(before) else 0)
        for shown in (content, content.strip(), content.rpartition("</think>")[2].strip()):
            found = text.find(shown, start) if shown else -1
            if found >= 0:
                end = found + len(shown)
                end += len(mark) if text.startswith(mark, end) else 0
                return start if head is not None else found, end
        raise BadRow("turn not shown by the chat template", f"the chat template leaves out the turn {shorten(content)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
