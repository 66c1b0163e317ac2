"""Every character that an assistant says is trained once, with its end-of-turn mark, and nothing of anybody else's: a
dozen kinds of templates, which say themselves what that is, and conversations of every kind.
"""

from __future__ import annotations

import time
from datetime import date

import pytest
from jinja2.exceptions import TemplateError

from dpo_ds.data.chat.render import render, render_prompt
from dpo_ds.data.chat.template import DATE, date_of, set_date
from dpo_ds.data.rows import TRAINED, BadRow
from tests.data.chat.templates import CALLS, CLOSE, OPEN, TEMPLATES
from tests.data_helpers import EOS, tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *names, **keys):
    calls = [{"type": "function", "function": {"name": n, "arguments": {"x": 1, "unit": "m"}}} for n in names]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **keys}


def tool(content):
    return {"role": "tool", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
THOUGHT = "<think>\nlet me see\n</think>\n\n"

CONVERSATIONS = {  # (prompt, completion)
    "one turn": ([user("hi")], [assistant("hello")]),
    "system": ([SYSTEM, user("hi")], [assistant("hello")]),
    "several rounds": ([user("a")], [assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")]),
    "equal texts": ([user("a")], [assistant("a"), user("a"), assistant("a"), user("a"), assistant("a")]),
    "texts of a letter of marks": ([user("s")], [assistant("s"), user("e"), assistant("e"), user("n"), assistant("m")]),
    "rounds in the prompt": ([user("a"), assistant("b"), user("c")], [assistant("d"), user("e"), assistant("f")]),
    "system and rounds": ([SYSTEM, user("a")], [assistant("b"), user("c"), assistant("d")]),
    "reasoning": ([user("a")], [assistant(THOUGHT + "b")]),
    "reasoning in each round": (
        [user("a")],
        [assistant(THOUGHT + "b"), user("c"), assistant(THOUGHT + "b"), user("d"), assistant(THOUGHT + "e")],
    ),
    "a call without text": ([user("a")], [assistant("", "f"), tool("7"), assistant("it is 7")]),
    "a call behind text": ([user("a")], [assistant("I look", "f"), tool("7"), assistant("it is 7")]),
    "the answer repeats the tool": ([user("a")], [assistant("", "f"), tool("seven"), assistant("seven")]),
    "two calls": ([user("a")], [assistant("", "f", "g"), tool("7"), tool("8"), assistant("15")]),
    "calls in two rounds": (
        [user("a")],
        [assistant("", "f"), tool("7"), assistant("7"), user("b"), assistant("", "g"), tool("8"), assistant("8")],
    ),
    "a call after a call": (
        [user("a")], [assistant("", "f"), tool("7"), assistant("", "g"), tool("8"), assistant("15")],
    ),
    "reasoning and calls, then a question": (
        [user("a")],
        [assistant(THOUGHT, "f"), tool("7"), assistant(THOUGHT + "7"), user("b"), assistant(THOUGHT + "c")],
    ),
    "ends in a call": ([user("a")], [assistant("", "f")]),
    "ends in a result": ([user("a")], [assistant("b", "f"), tool("7")]),
    "ends in a question": ([user("a")], [assistant("b"), user("c")]),
    "white space": ([user(" a ")], [assistant(" b\n"), user("c "), assistant("  d ")]),
    "the assistant begins": ([], [assistant("hello"), user("a"), assistant("b")]),
    "a turn without text": ([user("a")], [assistant(""), user("b"), assistant("c")]),
    "marks in the text": ([user("<b>")], [assistant("<i>x</i>"), user("</b>"), assistant("[INST] <|im_end|")]),
}  # fmt: skip


def plain(kind: str):
    return tokenizer(template=TEMPLATES[kind].replace(OPEN, "").replace(CLOSE, ""))


def marked(template: str, messages: list) -> tuple[str, list[tuple[int, int]]]:
    """The text of a template and what it says itself is to be trained."""
    tok = tokenizer(template=template)
    parts = tok.apply_chat_template(messages, tokenize=False).split(OPEN)
    text, spans = parts[0], []
    for part in parts[1:]:
        said, rest = part.split(CLOSE)
        spans.append((len(text), len(text) + len(said)))
        text += said + rest
    return text, spans


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_all_that_the_assistant_says_is_trained_and_nothing_else(kind, name):
    prompt, completion = CONVERSATIONS[name]
    try:
        text, spans = marked(TEMPLATES[kind], prompt + completion)
    except TemplateError as refusal:
        with pytest.raises(BadRow, match=str(refusal)):
            render(plain(kind), prompt, completion, None)
        return
    rendered = render(plain(kind), prompt, completion, None)
    assert text.startswith(rendered.text) and not text[len(rendered.text) :].strip()
    asked = sum(message["role"] == "assistant" for message in prompt)
    expected = [text[begin:end] for begin, end in spans[asked:]]
    assert [rendered.text[begin:end] for begin, end in rendered.trained] == expected
    assert [begin for begin, _ in rendered.trained] == [begin for begin, _ in spans[asked:]]
    assert rendered.prompt_end == rendered.trained[0][0]


def test_a_turn_that_is_not_to_be_trained():
    completion = [assistant("b", **{TRAINED: False}), user("c"), assistant("d")]
    rendered = render(plain("chatml"), [], completion, None)
    assert [rendered.text[a:b] for a, b in rendered.trained] == ["d<|im_end|>"]
    assert rendered.text[rendered.prompt_end :].startswith("b<|im_end|>")
    assert EOS not in rendered.text and TRAINED not in rendered.text


R1 = "generation opens the reasoning, answers are cut at its end (DeepSeek-R1)"
NEMOTRON = "generation opens the reasoning, which only the last turn shows (Nemotron)"
MISTRAL = "the system's text stands in the last question (Mistral 0.3)"


@pytest.mark.parametrize(
    ("kind", "prompt", "trained_as_conversation", "asked"),
    [
        (R1, [user("a")], "\n\nb</s>", "<s><|User|>a<|Assistant|><think>\n"),
        (NEMOTRON, [user("a")], None, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (MISTRAL, [SYSTEM, user("a")], " " + THOUGHT + "b</s>", "<s>[INST] be brief\n\na[/INST]"),
        ("chatml", [user("a")], None, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_prompt_that_generation_writes_otherwise(kind, prompt, trained_as_conversation, asked):
    """data.prompt_rendering generation trains on what would be sampled: its prompt, and all of the answer behind it."""
    tok, answer = plain(kind), assistant(THOUGHT + "b")
    as_trained = render(tok, prompt, [answer], None)
    assert as_trained.sampled == (asked if trained_as_conversation else None)
    assert render_prompt(tok, prompt, None) == asked
    if trained_as_conversation:
        assert as_trained.text[as_trained.prompt_end :] == trained_as_conversation
    assert as_trained.left_out == (answer["content"] if kind == R1 else None)
    as_sampled = render(tok, prompt, [answer, user("c"), assistant("d")], None, "generation")
    assert as_sampled.text[: as_sampled.prompt_end] == asked
    first, second = (as_sampled.text[a:b] for a, b in as_sampled.trained)
    if kind == R1:
        assert first == "let me see\n</think>\n\nb</s>" and as_sampled.left_out is None
    assert second.strip().startswith("d")


def test_generation_puts_the_first_answer_whole_before_what_follows():
    """Reasoning that a template drops once a question follows, or that stands in a key of its own, is what was said."""
    follows = [user("c"), assistant("d")]
    kind = "reasoning of earlier turns is dropped, results of tools are the user's (Qwen 3)"
    as_sampled = render(plain(kind), [user("a")], [assistant(THOUGHT + "b"), *follows], None, "generation")
    assert as_sampled.sampled is None and as_sampled.left_out is None
    assert [as_sampled.text[a:b] for a, b in as_sampled.trained] == [
        THOUGHT + "b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>",
    ]  # fmt: skip
    assert as_sampled.text[as_sampled.trained[0][1] :].startswith("\n<|im_start|>user\nc<|im_end|>")
    answer = assistant("b", reasoning_content="let me see")
    assert render(plain(R1), [user("a")], [answer], None).left_out == "let me see"
    for completion in ([answer], [answer, *follows]):
        as_sampled = render(plain(R1), [user("a")], completion, None, "generation")
        assert as_sampled.text[slice(*as_sampled.trained[0])] == "let me see\n</think>\n\nb</s>"
        assert as_sampled.left_out is None
    called = render(plain(R1), [user("a")], [assistant(THOUGHT + "b", "f"), tool("7")], None, "generation")
    said = called.text[slice(*called.trained[0])]
    assert said.startswith("let me see\n</think>\n\nb\n<tool_call>") and said.endswith("</tool_call></s>")
    completion = [assistant(THOUGHT + "b", "f"), tool("7"), *follows]
    called = render(plain(kind), [user("a")], completion, None, "generation")
    said = called.text[slice(*called.trained[0])]
    assert said.startswith(THOUGHT + "b\n<tool_call>") and said.count("</tool_call>") == 1
    assert said.endswith("<|im_end|>") and called.left_out is None


def test_generation_of_a_first_answer_without_a_word():
    kind = "a line a turn, no header of its own"
    rendered = render(plain(kind), [user("a")], [assistant(""), user("b"), assistant("c")], None, "generation")
    assert [rendered.text[a:b] for a, b in rendered.trained] == ["</s>", "c</s>"]


QWEN35 = "generation closes the reasoning, which turns may fill; a question is wanted (Qwen 3.5)"
GPT_OSS = "channels, other marks in the middle (gpt-oss)"


@pytest.mark.parametrize(
    ("kind", "head"), [(QWEN35, "<think>\n\n</think>\n\n"), (GPT_OSS, "<|channel|>final<|message|>")]
)
def test_a_prompt_is_continued_behind_what_the_template_puts_before_its_words(kind, head):
    tok, prompt = plain(kind), [user("a"), assistant("It is")]
    assert render_prompt(tok, prompt, None).endswith(head + "It is")
    for completion in ([assistant(" so")], [assistant(" so"), user("b"), assistant("c")]):
        rendered = render(tok, prompt, completion, None)
        assert rendered.text[: rendered.prompt_end] == render_prompt(tok, prompt, None) and rendered.sampled is None
        assert rendered.text[slice(*rendered.trained[0])].startswith(" so<|")
    nothing = [user("a"), assistant("")]
    assert render_prompt(tok, nothing, None) == render_prompt(tok, [user("a")], None)
    assert render(tok, nothing, [assistant("b")], None) == render(tok, [user("a")], [assistant("b")], None)


CHATML = plain("chatml").chat_template


@pytest.mark.parametrize("kind", ["chatml", "EOS at the end of everything (Phi-3)"])
def test_a_call_that_the_template_does_not_show_is_said(kind):
    shown = CALLS.replace("%}\n", "%}{{ '\\n' }}")
    tok = tokenizer(template=plain(kind).chat_template.replace(shown, ""))
    follows = [tool("7"), assistant("7")]
    for completion in ([assistant("", "f", "g")], [assistant("", "f", "g"), *follows]):
        with pytest.raises(BadRow, match="the chat template leaves out a turn that calls f, g"):
            render(tok, [user("a")], completion, None)
    assert render(tok, [user("a")], [assistant("I look", "f"), *follows], None).left_out == "f"


def test_arguments_are_given_as_json_text_where_the_template_takes_no_other():
    """DeepSeek V3 concatenates them; a template that prints them would print Python's quotes."""
    concatenated = CHATML.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    printed = CHATML.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
    call, expected = assistant("é", "f"), render(plain("chatml"), [user("a")], [assistant("é", "f")], None)
    assert concatenated != CHATML != printed
    for template in (concatenated, printed):
        tok = tokenizer(template=template)
        assert render(tok, [user("a")], [call], None) == expected
        with_results = [user("a"), call, tool("7")]
        assert render_prompt(tok, with_results, None) == render_prompt(plain("chatml"), with_results, None)


def test_texts_are_given_as_parts_where_the_template_shows_no_others():
    """LLaVA and Idefics look for parts of type text, and find none in the letters of a text."""
    shown = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    template = CHATML.replace("{{ m.content }}", shown)
    prompt, completion = [SYSTEM, user("What is it?")], [assistant("A cat."), user("Sure?"), assistant("Yes.")]
    expected = render(plain("chatml"), prompt, completion, None)
    assert template != CHATML and render(tokenizer(template=template), prompt, completion, None) == expected


GEMMA4 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|turn>model\n"
    "{% for c in m.tool_calls or [] %}<|tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}<tool_call|>"
    "{% endfor %}{% set ns = namespace(results='') %}"
    "{% for n in messages[loop.index:] %}{% if n.role == 'tool' %}"
    "{% set ns.results = ns.results + '<|tool_response>' + n.content + '<tool_response|>' %}{% endif %}{% endfor %}"
    "{{ ns.results if m.tool_calls }}{{ m.content }}<turn|>\n"
    "{% elif m.role == 'user' %}<|turn>user\n{{ m.content }}<turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
).replace("%}\n", "%}{{ '\\n' }}")


def test_a_turn_whose_text_stands_behind_the_results_of_its_calls_is_a_bad_row():
    completion = [assistant("I look", "f"), tool("seven"), assistant("it is 7")]
    with pytest.raises(BadRow) as refused:
        render(tokenizer(template=GEMMA4), [user("a")], completion, None)
    assert refused.value.reason in ("a turn in two places", "a turn around another")


def test_many_rounds_and_many_special_tokens_take_no_long_time():
    """Marks were searched in the whole of every text once, which took a minute."""
    tok, rendered = plain("reasoning of earlier turns is dropped, results of tools are the user's (Qwen 3)"), []
    tok.add_special_tokens({"additional_special_tokens": [f"<SPECIAL_{i}>" for i in range(1000)]})
    apply = tok.apply_chat_template
    tok.apply_chat_template = lambda *given, **options: rendered.append(1) or apply(*given, **options)
    rounds = [[assistant("", "f"), tool("7"), assistant("seven"), user("and?")] for _ in range(15)]
    completion = [turn for turns in rounds for turn in turns][:-1]
    started = time.process_time()
    spans = render(tok, [user("a")], completion, None).trained
    assert len(spans) == 30 and len(rendered) < 16 * len(spans) and time.process_time() - started < 10


@pytest.mark.parametrize("kind", ["chatml", R1, "no mark at a turn's end (GLM)", MISTRAL])
def test_a_prompt_that_ends_in_the_assistants_turn_is_continued(kind):
    tok, prompt = plain(kind), [user("a"), assistant("It is")]
    rendered = render(tok, prompt, [assistant(" so")], None)
    assert rendered.text[: rendered.prompt_end].endswith("It is")
    assert render_prompt(tok, prompt, None) == rendered.text[: rendered.prompt_end] and rendered.sampled is None
    whole, _ = marked(TEMPLATES[kind], [user("a"), assistant("It is so")])
    assert rendered.text == whole.rstrip() or whole.startswith(rendered.text)
    assert [rendered.text[a:b].startswith(" so") for a, b in rendered.trained] == [True]


def test_the_date_of_a_template_is_the_one_that_is_recorded():
    tok = plain("a date, and one call a turn (Llama 3.1)")
    set_date(tok, {}, {DATE: "2024-02-29"})
    assert date_of(tok) == "2024-02-29" and "Today: 29 Feb 2024\n" in render_prompt(tok, [user("a")], None)
    set_date(tok)
    assert date_of(tok) == date.today().isoformat()
    assert date_of(plain("chatml")) is None


def test_the_mark_behind_a_calls_line_end_is_trained():
    """White space between call and mark, under a generation prompt that is no beginning (Nemotron 3)."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}"
        "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{{ '\\n' }}{% endfor %}"
        "<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n<think>\\n' }}{% endif %}"
    )
    completion = [assistant("", "f"), tool("7"), assistant("x")]
    rendered = render(tokenizer(template=template), [user("q")], completion, None)
    first, last = (rendered.text[begin:end] for begin, end in rendered.trained)
    assert first.endswith("</tool_call>\n<|im_end|>") and last.endswith("x<|im_end|>")
