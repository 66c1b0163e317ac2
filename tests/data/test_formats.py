"""Raw rows to conversations: one example of each format worked out by hand, and one row for each mistake."""

from __future__ import annotations

import pytest

from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.data.formats import FORMATS, Conversation, check_columns, check_name, detect, read
from dpo_ds.data.rows import BadRow, Location, Row
from dpo_ds.errors import ConfigError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"name": "add", "parameters": {}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
HELLO = "\n\nHuman: Hello\n\nAssistant:"

EXAMPLES = {
    "explicit text": (
        "explicit",
        {"prompt": "2+2=", "chosen": "4", "rejected": "5", "score": 1},
        Conversation.of("2+2=", "4", "5"),
    ),
    "explicit text, empty prompt": (
        "explicit",
        {"prompt": "", "chosen": "4", "rejected": "5"},
        Conversation.of("", "4", "5"),
    ),
    "explicit messages": (
        "explicit",
        {"prompt": [SYSTEM, user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": [TOOL]},
        Conversation.of([SYSTEM, user("hi")], [assistant("a")], [assistant("b")], [TOOL]),
    ),
    "explicit messages out of Arrow, with nulls": (
        "explicit",
        {
            "prompt": [{**user("hi"), "tool_calls": None}],
            "chosen": [{**assistant(None), "tool_calls": CALL}],
            "rejected": [{**assistant("b"), "tool_calls": None}],
            "tools": '[{"name": "add", "parameters": {}, "strict": null}]',
        },
        Conversation.of([user("hi")], [{**assistant(""), "tool_calls": CALL}], [assistant("b")], [TOOL]),
    ),
    "implicit": (
        "implicit",
        {"chosen": [SYSTEM, user("hi"), assistant("a")], "rejected": [SYSTEM, user("hi"), assistant("b")]},
        Conversation.of([SYSTEM, user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "implicit beside a prompt string": (
        "implicit",
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "implicit beside the prompt's messages": (
        "implicit",
        {"prompt": [user("hi")], "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "implicit, rejected is chosen's beginning": (
        "implicit",
        {
            "chosen": [user("hi"), assistant("a"), user("go on"), assistant("c")],
            "rejected": [user("hi"), assistant("a")],
        },
        Conversation.of(
            [user("hi")], [assistant("a"), user("go on"), assistant("c")], [assistant("a")], prompts_differ=True
        ),
    ),
    "implicit, other user turns": (
        "implicit",
        {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("a")]},
        Conversation.of([], [user("x"), assistant("a")], [user("y"), assistant("a")], prompts_differ=True),
    ),
    "a prompt string beside answers alone": (
        "implicit",
        {"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "a prompt string and a system column beside answers alone": (
        "implicit",
        {"prompt": "hi", "system": "be brief", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        Conversation.of([SYSTEM, user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "a prompt string behind a system turn": (
        "implicit",
        {"prompt": "hi", "chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, user("hi"), assistant("b")]},
        Conversation.of([SYSTEM, user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "the prompt is the last question": (
        "implicit",
        {
            "prompt": "and?",
            "chosen": [user("hi"), assistant("ho"), user("and?"), assistant("a")],
            "rejected": [user("hi"), assistant("ho"), user("and?"), assistant("b")],
        },
        Conversation.of([user("hi"), assistant("ho"), user("and?")], [assistant("a")], [assistant("b")]),
    ),
    "the prompt's messages in one side alone": (
        "implicit",
        {"prompt": [user("hi")], "chosen": [user("hi"), assistant("a")], "rejected": [assistant("b")]},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "prompt messages and string completions": (
        "explicit",
        {"prompt": [user("hi")], "chosen": "a", "rejected": "b"},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "content as parts, out of Arrow": (
        "implicit",
        {
            "chosen": [
                user([{"type": "text", "text": "h", "image": None}, {"type": "text", "text": "i"}]),
                assistant([{"type": "text", "text": "a"}]),
            ],
            "rejected": [user([{"type": "text", "text": "hi"}]), assistant("b")],
        },
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "orca": (
        "orca",
        {"system": "be brief", "question": "hi", "chosen": "a", "rejected": "b"},
        Conversation.of([SYSTEM, user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "orca, Argilla's of Intel's": (
        "orca",
        {"system": "", "input": "hi", "chosen": "a", "rejected": "b", "rating": [9, 8]},
        Conversation.of([user("hi")], [assistant("a")], [assistant("b")]),
    ),
    "hh": (
        "hh",
        {"chosen": HELLO + " Hi there", "rejected": HELLO + " Hi you"},
        Conversation.of(HELLO, " Hi there", " Hi you"),
    ),
    "hh, last turns of several": (
        "hh",
        {"chosen": HELLO + " Hi" + HELLO + " a", "rejected": HELLO + " Hi" + HELLO + " b"},
        Conversation.of(HELLO + " Hi" + HELLO, " a", " b"),
    ),
    "hh, differing earlier": (
        "hh",
        {"chosen": HELLO + " Hi" + HELLO + " a", "rejected": HELLO + " Ha" + HELLO + " b"},
        Conversation.of(HELLO, " Hi" + HELLO + " a", " Ha" + HELLO + " b", prompts_differ=True),
    ),
    "hh, one goes on": (
        "hh",
        {"chosen": HELLO + " Hi", "rejected": HELLO + " Hi" + HELLO + " b"},
        Conversation.of(HELLO, " Hi", " Hi" + HELLO + " b", prompts_differ=True),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "1+?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
            ],
            "system": "be brief",
            "tools": '[{"name": "add", "parameters": {}}]',
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        Conversation.of(
            [SYSTEM, user("1+?"), {**assistant(""), "tool_calls": CALL}, {"role": "tool", "content": "2"}],
            [assistant("a")],
            [assistant("b")],
            [TOOL],
        ),
    ),
    "alpaca": (
        "alpaca",
        {
            "instruction": "add",
            "input": "1 2",
            "system": "be brief",
            "history": [["hi", "ho"]],
            "chosen": "3",
            "rejected": "4",
        },
        Conversation.of([SYSTEM, user("hi"), assistant("ho"), user("add\n1 2")], [assistant("3")], [assistant("4")]),
    ),
    "alpaca, bare": (
        "alpaca",
        {"instruction": "add", "input": "", "system": None, "chosen": "3", "rejected": "4"},
        Conversation.of([user("add")], [assistant("3")], [assistant("4")]),
    ),
}


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_formats(name, row, expected):
    row = Row(row, {})
    assert detect(row, PAIR) == name
    assert read(row, name, PAIR) == expected


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_format_reads_what_it_says(name, row, expected):
    """Sources leave out columns that no format names."""
    row = Row(row, {})
    read(row, name, PAIR)
    assert {field for field in row.used if field in row.values} <= {*FORMATS[name].fields}


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_supervised_uses_chosen_of_a_pair(name, row, expected):
    row = Row(row, {})
    assert detect(row, CHOSEN_ONLY) == name
    conversation = read(row, name, CHOSEN_ONLY)
    assert (conversation.prompt, conversation.chosen) == (expected.prompt, expected.chosen)
    assert conversation.rejected is None


@pytest.mark.parametrize(
    ("name", "row", "prompt", "chosen"),
    [
        ("completion", {"prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
        ("completion", {"prompt": [user("x")], "completion": [assistant("y")]}, [user("x")], [assistant("y")]),
        ("completion", {"prompt": "2+2=", "response": "4", "helpfulness": 3}, "2+2=", "4"),
        ("completion", {"prompt": "2+2=", "output": "4"}, "2+2=", "4"),
        ("completion", {"prompt": [user("x")], "completion": "y"}, [user("x")], [assistant("y")]),
        ("text", {"text": "Once upon a time"}, "", "Once upon a time"),
        ("alpaca", {"instruction": "i", "input": "j", "output": "y"}, [user("i\nj")], [assistant("y")]),
        ("alpaca", {"instruction": "i", "context": "j", "response": "y"}, [user("i\nj")], [assistant("y")]),
        (
            "orca",
            {"system_prompt": "be brief", "question": "x", "response": "y"},
            [SYSTEM, user("x")],
            [assistant("y")],
        ),
        (
            "messages",
            {"messages": [SYSTEM, user("x"), assistant("y"), user("z"), assistant("w")]},
            [SYSTEM, user("x")],
            [assistant("y"), user("z"), assistant("w")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            [user("x")],
            [assistant("y")],
        ),
        ("hh", {"chosen": HELLO + " Hi" + HELLO + " a"}, HELLO + " Hi" + HELLO, " a"),
        (
            "implicit",
            {"chosen": [user("x"), assistant("y"), user("z"), assistant("w")]},
            [user("x"), assistant("y"), user("z")],
            [assistant("w")],
        ),
    ],
)
def test_supervised_rows_without_rejected(name, row, prompt, chosen):
    row = Row(row, {})
    assert detect(row, CHOSEN_ONLY) == name
    assert read(row, name, CHOSEN_ONLY) == Conversation.of(prompt, chosen)


def test_columns_rename_before_detection():
    row = Row({"question": "q", "good": "a", "bad": "b"}, {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert read(row, detect(row, PAIR), PAIR) == Conversation.of("q", "a", "b")
    row = Row({"question": "q", "good": "a"}, {"prompt": "question", "chosen": "good", "rejected": "worse"})
    with pytest.raises(
        BadRow, match=r"lacks 'rejected' \(data.columns takes it from 'worse'\); it has 'question', 'good'"
    ):
        read(row, "explicit", PAIR)


CHAT = {"prompt": [user("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
MISTAKES = [
    ({"prompt": "p", "chosen": "a"}, "no rejected", r"lacks 'rejected'; it has 'prompt', 'chosen'"),
    ({"prompt": "p", "rejected": "a"}, "no chosen", r"lacks 'chosen'; it has 'prompt', 'rejected'"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is null", r"'prompt' is null"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "rejected is null", r"'rejected' is null"),
    ({"chosen": None, "rejected": "b"}, "chosen is null", r"'chosen' is null"),
    ({"prompt": "p", "chosen": 7, "rejected": "b"}, "wrong type", r"'chosen' is int 7; it must be text"),
    (
        {"prompt": 1.5, "chosen": "a", "rejected": "b"},
        "wrong type",
        r"'prompt' is float 1.5; it must be text or a list of",
    ),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty chosen", r"'chosen' is empty \(''\)"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty rejected", r"'rejected' is empty \(' \\n'\)"),
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen equals rejected", r"equals 'rejected' \('same'\)"),
    ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "not Unicode", r"half a surrogate pair, '\\ud800', at"),
    ({"text": "p", "label": 1}, "no known format", r"its fields 'text', 'label' fit no known format \(sharegpt, alp"),
    ({}, "no known format", r"its fields \(none\) fit no known format"),
    ({"chosen": "no marks", "rejected": "here"}, "no known format", r"fit no known format"),
    ({"chosen": HELLO + " ", "rejected": HELLO + " b"}, "empty chosen", r"'chosen' is empty after its last '\\n\\nAs"),
    ({"chosen": HELLO + " a", "rejected": HELLO + "b" + HELLO}, "empty rejected", r"'rejected' is empty after"),
    ({"chosen": HELLO + " a", "rejected": "b"}, "no assistant turn", r"'rejected' \('b'\) has no '\\n\\nAssistant:'"),
    ({"chosen": HELLO + " a", "rejected": "!" + HELLO + " b"}, "no common prompt", r"share no beginning that ends"),
    ({**CHAT, "chosen": [assistant("b")]}, "chosen equals rejected", r"a pair needs two different completions"),
    ({**CHAT, "chosen": [user("u")]}, "no assistant turn", r"'chosen' has no assistant turn \(user\)"),
    ({**CHAT, "chosen": []}, "no assistant turn", r"'chosen' has no assistant turn \(no message\)"),
    ({**CHAT, "chosen": [assistant(" ")]}, "empty chosen", r"'chosen' is empty"),
    ({**CHAT, "chosen": [7]}, "wrong type", r"'chosen\[0\]' is int 7; it must be a message"),
    ({**CHAT, "rejected": "text"}, "wrong type", r"'rejected' is str 'text'; it must be a list of messages"),
    (
        {**CHAT, "prompt": [{"role": "usr", "content": "x"}]},
        "unknown role",
        r"prompt\[0\] has the unknown role 'usr'; known",
    ),
    ({**CHAT, "prompt": [{"content": "x"}]}, "message without a role", r"prompt\[0\] lacks a role"),
    ({**CHAT, "prompt": [{"role": "user"}]}, "message without content", r"prompt\[0\] has no content"),
    (
        {**CHAT, "prompt": [{"role": "user", "content": [1]}]},
        "wrong type",
        r"'prompt\[0\].content' is list \[1\]; it must be",
    ),
    ({**CHAT, "tools": "{"}, "broken JSON in a field", r"'tools' must be JSON but is '\{'"),
    ({**CHAT, "tools": ["f"]}, "wrong type", r"'tools\[0\]' is str 'f'; it must be an object that describes a tool"),
    ({**CHAT, "tools": "[" + "1" * 5000 + "]"}, "number too long", r"a whole number has more than 4300 digits"),
    ({**CHAT, "tools": {"a": 1}}, "wrong type", r"'tools' is dict .* must be a list of tools"),
    (
        {"conversations": "x", "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        "wrong type",
        r"'conversations' is str",
    ),
    (
        {"conversations": [], "chosen": {"from": "human", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        "no assistant turn",
        r"'chosen' has no assistant turn \(user\)",
    ),
    (
        {
            "conversations": [],
            "chosen": {"from": "function_call", "value": "3"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "wrong type",
        r"'chosen' is int 3; it must be a call {name, arguments}",
    ),
    (
        {"conversations": [{"from": "system", "value": "s"}], "system": "t", "chosen": {}, "rejected": {}},
        "two system turns",
        r"begins with another system turn",
    ),
    (
        {"instruction": "i", "history": [["only user"]], "chosen": "a", "rejected": "b"},
        "wrong type",
        r"'history\[0\]' is list \['only user'\]; it must be a list \[user, assistant\]",
    ),
    ({"instruction": "i", "chosen": "a"}, "no rejected", r"lacks 'rejected'"),
    (
        {"prompt": "Write a poem", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        "prompt contradicts",
        r"'prompt' is 'Write a poem', but 'chosen' begins with 'hi'; mend one, or .*ignore_columns '\[prompt\]'",
    ),
    (
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("ho"), assistant("b")]},
        "prompt contradicts",
        r"'prompt' is 'hi', but 'rejected' begins with 'ho'",
    ),
    (
        {"prompt": [user("q")], "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        "prompt contradicts",
        r"'prompt' is 'q', but 'chosen' begins with 'hi'",
    ),
    (
        {**CHAT, "system": "t", "prompt": [{"role": "system", "content": "s"}, user("x")]},
        "two system turns",
        r"'prompt' begins with another system turn",
    ),
    (
        {**CHAT, "prompt": [user([{"type": "text", "text": "what is"}, {"type": "image", "image": "a.png"}])]},
        "a part that is no text",
        r"prompt\[0\].content\[1\] is \{'type': 'image'.*only parts \{type: text, text: ...\}",
    ),
    (
        {"prompt": "p", "response": "r", "helpfulness": 4, "correctness": 3},
        "no pair",
        r"a row of HelpSteer .* holds no pair; make pairs of the best and the worst response",
    ),
    (
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2},
        "no pair",
        r"a row of HelpSteer3 .* write rows of prompt \(context\), chosen \(response1 where",
    ),
    (
        {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3},
        "no pair",
        r"a row of SHP .* write rows of prompt \(history\), chosen \(human_ref_A where labels is 1",
    ),
]


@pytest.mark.parametrize(("row", "reason", "message"), MISTAKES)
def test_mistakes(row, reason, message):
    row = Row(row, {})
    with pytest.raises(BadRow, match=message) as caught:
        read(row, detect(row, PAIR), PAIR)
    assert caught.value.reason == reason
    full = str(caught.value.at(Location("f.jsonl", 12)))
    assert full.startswith("f.jsonl:12: ") and full.endswith("(drop such rows with --data.on_bad_row skip)")
    assert "\n" not in full


def test_supervised_mistakes():
    for row, message in [
        ({"prompt": 3, "completion": "x"}, "'prompt' is int 3; it must be text or a list of messages"),
        ({"messages": [user("x")]}, "'messages' has no assistant turn"),
        ({"prompt": "x", "completion": " "}, "'chosen' is empty"),
        ({"prompt": "x"}, "lacks 'chosen'"),
    ]:
        row = Row(row, {})
        with pytest.raises(BadRow, match=message):
            read(row, detect(row, CHOSEN_ONLY), CHOSEN_ONLY)
    equal = Row({"prompt": "p", "chosen": "same", "rejected": "same"}, {})  # no mistake where rejected is not used
    assert read(equal, "explicit", CHOSEN_ONLY) == Conversation.of("p", "same")


def test_long_values_are_shortened():
    with pytest.raises(BadRow) as caught:
        read(Row({"prompt": "p", "chosen": "x" * 1000, "rejected": "x" * 1000}, {}), "explicit", PAIR)
    assert len(str(caught.value)) < 200


def test_format_names():
    for name in ["auto", "explicit", "implicit", "hh", "sharegpt", "alpaca"]:
        check_name(name, PAIR)
    check_name("messages", CHOSEN_ONLY)
    with pytest.raises(ConfigError, match="data.format is 'sharegtp': did you mean 'sharegpt'?"):
        check_name("sharegtp", PAIR)
    with pytest.raises(ConfigError, match="data.format is 'messages': .*Known: auto, sharegpt"):
        check_name("messages", PAIR)


def test_columns_that_no_format_reads():
    check_columns({"prompt": "q", "chosen": "a", "messages": "m", "history": "h"})
    with pytest.raises(ConfigError, match="takes 'chosne' from 'x', but no format .*: did you mean 'chosen'?"):
        check_columns({"chosne": "x"})
