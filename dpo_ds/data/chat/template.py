"""Chat templates: the built-in one, the one that the user names, and the date that a template writes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from dpo_ds.config.inputs import JINJA
from dpo_ds.errors import ConfigError, ModelError, first_line, shorten

# For a tokenizer without a template. Role lines as in Tulu 2 (arXiv 2311.10702), EOS after each assistant turn:
#   <|user|>\nHello\n<|assistant|>\nHi</s>\n
# Tools come first as JSON, one a line, under <|tools|>; an assistant's calls follow its text as JSON, one a line. A
# call's id is not written: it is a random name, which nobody should learn to guess.
DEFAULT_CHAT_TEMPLATE = """\
{%- if tools %}{{- '<|tools|>\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}{{- dict((call | items) | rejectattr(0, 'equalto', 'id')) | tojson }}
{%- endfor %}
{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

TEMPLATE, BUILT_IN = "the chat template", "the built-in one"  # among what a checkpoint remembers
DATE = "the date that the chat template writes"  # among what checkpoints, caches and samples remember
CLOCK = "strftime_now"  # transformers' function for templates that write today's date


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
        problem = f"no chat template to use: {first_line(error)}; name one with --data.chat_template"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}") from error


def set_date(tokenizer: Any, *recorded: Mapping[str, Any] | None) -> None:
    """Fixes the day that a template with today's date writes: the first that a checkpoint, a cache or a sample recorded
    under DATE, so that what was begun yesterday goes on as it began; else today, one day for the whole run.
    """
    known = [values[DATE] for values in recorded if values is not None and isinstance(values.get(DATE), str)]
    tokenizer.day_of_template = known[0] if known else date.today().isoformat()


def date_of(tokenizer: Any) -> str | None:
    """Returns the day, as 2026-11-26, that the template writes; None for a template that writes none."""
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    if not any(CLOCK in text for text in texts):
        return None
    return getattr(tokenizer, "day_of_template", None) or date.today().isoformat()


def dated(tokenizer: Any) -> dict[str, str]:
    """Returns what checkpoints, caches and samples record of the day: nothing for a template that writes none."""
    day = date_of(tokenizer)
    return {} if day is None else {DATE: day}


def set_clock(tokenizer: Any, template: str) -> None:
    """Gives the template, before it is rendered, the run's day at midnight in place of transformers' own clock.

    transformers hands values to a template as plain data alone, so the function is set in the compiled template, which
    it keeps.
    """
    day = date_of(tokenizer)
    if day is not None:
        when = datetime.fromisoformat(day)
        _compile_jinja_template(template).globals[CLOCK] = when.strftime
