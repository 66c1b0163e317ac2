"""The user's turn never comes twice, whatever else differs where a side repeats the prompt; calls, roles and flags as
the world writes them.
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.data import prepare
from dpo_ds.data.chat.template import DEFAULT_CHAT_TEMPLATE
from dpo_ds.data.formats import detect, read
from dpo_ds.data.rows import TRAINED, BadRow, Row, as_message
from dpo_ds.data.sources import open_source
from dpo_ds.errors import DataError
from tests.data_helpers import options, tokenizer, write_lines


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "be brief"}
HI, Q = [user("hi")], [user("hi"), assistant("ho"), user("and?")]
A, B = [assistant("a")], [assistant("b")]

REPEATS = {  # prompt, what chosen and rejected say before their answer, the prompt that comes of it
    "literally": (HI, HI, HI),
    "a null more, as Arrow writes": (HI, [user("hi", tool_calls=None, name=None)], HI),
    "other white space": ([user("hi\n there")], [user("hi there ")], [user("hi\n there")]),
    "a system turn in front": (HI, [SYSTEM, *HI], [SYSTEM, *HI]),
    "without the system turn": ([SYSTEM, *HI], HI, [SYSTEM, *HI]),
    "the last turn alone": (Q, Q[2:], Q),
    "the last turn behind the system's": ([SYSTEM, *Q], [SYSTEM, *Q[2:]], [SYSTEM, *Q]),
    "a name": (HI, [user("hi", name="me")], HI),
    "an id": (HI, [user("hi", id=7, timestamp="now")], HI),
    "more before it": (HI, [user("x"), assistant("y"), *HI], [user("x"), assistant("y"), *HI]),
    "not at all": (Q, [], Q),
}


@pytest.mark.parametrize(("prompt", "said", "expected"), REPEATS.values(), ids=REPEATS)
def test_the_users_turn_comes_once(prompt, said, expected):
    row = Row({"prompt": prompt, "chosen": [*said, *A], "rejected": [*said, *B]}, {})
    conversation = read(row, detect(row, PAIR), PAIR)

    def shown(turns):
        return [(turn["role"], turn["content"]) for turn in turns]

    assert shown(conversation.prompt) == shown(expected)
    assert (conversation.chosen, conversation.rejected) == (A, B)
    supervised = Row({"prompt": prompt, "completion": [*said, *A]}, {})
    conversation = read(supervised, detect(supervised, CHOSEN_ONLY), CHOSEN_ONLY)
    assert (shown(conversation.prompt), conversation.chosen) == (shown(expected), A)


@pytest.mark.parametrize("said", ["It is so", " so"])
def test_an_answer_that_gives_an_open_turn_whole_goes_on_from_it(said):
    row = Row({"prompt": [*HI, assistant("It is")], "chosen": [assistant(said)], "rejected": [assistant(" no")]}, {})
    conversation = read(row, detect(row, PAIR), PAIR)
    assert (conversation.prompt, conversation.chosen) == ([*HI, assistant("It is")], [assistant(" so")])


def test_a_side_that_begins_with_the_prompts_last_answer_and_asks_on_repeats_it():
    sides = {"chosen": [assistant("ho"), user("x"), *A], "rejected": [assistant("ho"), user("x"), *B]}
    row = Row({"prompt": [*HI, assistant("ho")], **sides}, {})
    conversation = read(row, detect(row, PAIR), PAIR)
    assert (conversation.prompt, conversation.chosen) == ([*HI, assistant("ho")], [user("x"), *A])


def test_the_system_column_and_the_system_turn_may_differ_in_white_space():
    row = Row({"system": "be  brief\n", "prompt": [SYSTEM, *HI], "chosen": A, "rejected": B}, {})
    assert read(row, detect(row, PAIR), PAIR).prompt == [SYSTEM, *HI]


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        (HI, [user("ho"), *A]),
        ([*HI, assistant("g1")], [*HI, assistant("g2"), user("x"), *A]),
        (HI, [SYSTEM, *A]),
        ([SYSTEM, *HI], [{**SYSTEM, "content": "be long"}, *HI, *A]),
    ],
)
def test_a_side_that_asks_anew_is_a_bad_row(prompt, chosen):
    row = Row({"prompt": prompt, "chosen": chosen, "rejected": B}, {})
    with pytest.raises(BadRow, match="'prompt' is .*, but 'chosen' begins with"):
        read(row, detect(row, PAIR), PAIR)


def test_a_question_that_comes_back_in_a_side_stays_there():
    chosen = [assistant("x"), user("hi"), assistant("z")]
    row = Row({"prompt": HI, "chosen": chosen, "rejected": B}, {})
    conversation = read(row, detect(row, PAIR), PAIR)
    assert (conversation.prompt, conversation.chosen, conversation.rejected) == (HI, chosen, B)


def test_calls_of_a_repeated_prompt_may_be_written_otherwise():
    """Without a type, arguments as text or with a null; the prompt ends in the tool's turn."""
    bare = {"function": {"name": "f", "arguments": '{"x": 1, "y": null}'}}
    full = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked, again = ([*HI, assistant("", tool_calls=[call]), {"role": "tool", "content": "7"}] for call in (bare, full))
    row = Row({"prompt": asked, "chosen": [*again, *A], "rejected": [*again, *B]}, {})
    conversation = read(row, detect(row, PAIR), PAIR)
    assert [turn["role"] for turn in conversation.prompt] == ["user", "assistant", "tool"]
    assert (conversation.chosen, conversation.rejected) == (A, B)


def test_a_pair_that_differs_in_its_reasoning_alone_keeps_it():
    sides = {side: [*HI, assistant("", reasoning_content=side), {"role": "tool", "content": "7"}, *A] for side in PAIR}
    conversation = read(Row(sides, {}), "implicit", PAIR)
    assert conversation.prompt == HI and conversation.chosen[0]["reasoning_content"] == "chosen"


def test_turns_share_their_prompt_whatever_ids_they_carry():
    chosen = [user("hi", id="1"), assistant("ho", id="2"), user("and?", id="3"), assistant("a", id="4")]
    rejected = [user("hi", id="5"), assistant("ho", id="6"), user("and?", id="7"), assistant("b", id="8")]
    row = Row({"chosen": chosen, "rejected": rejected}, {})
    conversation = read(row, "implicit", PAIR)
    assert conversation.prompt == chosen[:3] and not conversation.prompts_differ
    assert (conversation.chosen, conversation.rejected) == (chosen[3:], rejected[3:])


def test_sft_finds_messages_beside_a_prompt():
    row = Row({"prompt": "hi", "prompt_id": "x", "messages": [*HI, *A]}, {})
    assert detect(row, CHOSEN_ONLY) == "messages"
    assert (read(row, "messages", CHOSEN_ONLY).prompt, read(row, "messages", CHOSEN_ONLY).chosen) == (HI, A)
    with pytest.raises(BadRow, match="'prompt' is 'ho', but 'messages' begins with 'hi'"):
        read(Row({"prompt": "ho", "messages": [*HI, *A]}, {}), "messages", CHOSEN_ONLY)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ai", "assistant"), ("Assistant", "assistant"), ("model", "assistant"), ("bot", "assistant"),
        ("gpt", "assistant"), ("Human", "user"), ("USER", "user"), ("function", "tool"), ("system", "system"),
        ("ipython", "tool"), ("environment", "tool"), ("tool_results", "tool"), ("prompter", "user"),
    ],
)  # fmt: skip
def test_roles(theirs, ours):
    assert as_message("m", {"role": theirs, "content": "x"}) == {"role": ours, "content": "x"}
    assert as_message("m", {"from": theirs, "value": "x"}) == {"role": ours, "content": "x"}


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_turns_that_are_not_to_be_trained(flag):
    assert as_message("m", assistant("x", **flag)) == assistant("x", **{TRAINED: False})
    assert as_message("m", user("x", **flag)) == as_message("m", user("x", weight=0.5)) == user("x")
    key = next(iter(flag))
    assert as_message("m", assistant("x", **{key: type(flag[key])(1)})) == assistant("x")
    with pytest.raises(BadRow, match=f"'m.{key}' is .*; it must be"):
        as_message("m", assistant("x", **{key: 0.5}))


CALL = {"name": "f", "arguments": {"x": 1, "unit": None}}
AS_TEXT = CALL | {"arguments": json.dumps(CALL["arguments"])}
AS_OBJECT = [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    "message",
    [
        assistant("", tool_calls=AS_OBJECT),
        assistant("", tool_calls=[CALL]),
        assistant(None, tool_calls=[{"type": "function", "function": AS_TEXT}]),
        assistant(None, function_call=AS_TEXT),
        assistant(None, function_call=json.dumps(CALL)),
        assistant("", tool_calls=json.dumps(AS_OBJECT)),
        assistant("", tool_calls=AS_OBJECT[0]),
        assistant("", tool_calls=[{"name": "f", "parameters": CALL["arguments"]}]),
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "tool_call", "value": json.dumps([CALL])},
    ],
)
def test_arguments_of_calls_are_objects_whose_nulls_stay(message):
    assert as_message("m", message) == assistant("", tool_calls=AS_OBJECT)


def test_arguments_that_are_no_object_stay_as_they_are():
    for text in ('{"x": ', "3", '{"x": 1, "x": 2}'):
        call = {"type": "function", "function": {"name": "f", "arguments": text}}
        assert as_message("m", assistant("", tool_calls=[call]))["tool_calls"] == [call]


def test_nulls_out_of_arrow_are_padding_but_in_json_they_are_meant(tmp_path):
    def turn(arguments):
        call = {"id": "c7", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [assistant("", tool_calls=[call])]

    rows = [{"prompt": HI, "chosen": turn({"x": 1, "unit": None}), "rejected": turn({"y": "m"})}]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = {}
    for path in (lines, tmp_path / "a.parquet"):
        tok = tokenizer(template=DEFAULT_CHAT_TEMPLATE)
        pair = prepare(str(path), options=options(max_length=500, max_prompt_length=200), tokenizer=tok)[0]
        texts[path.suffix] = tok.decode(pair.chosen), tok.decode(pair.rejected)
    chosen = '{"type": "function", "function": {"name": "f", "arguments": %s}}</s>'
    assert texts[".jsonl"] == (chosen % '{"x": 1, "unit": null}', chosen % '{"y": "m"}')  # and no call's id
    assert texts[".parquet"] == (chosen % '{"x": 1}', chosen % '{"y": "m"}')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'[{"prompt": "p"}]\n', "one JSON array, where .jsonl holds an object a line; call it .json"),
        ("a.jsonl", b'[\n{"prompt": "p"}\n]\n', "one JSON array, where .jsonl holds an object a line; call it .json"),
        ("a.jsonl", b'{"prompt": "p"}\r{"prompt": "q"}\r', "its lines end in carriage returns alone"),
        ("a.jsonl", b'{"prompt": "p", "a": {"b": 1, "b": 2}}\n', "the key 'b' comes twice in one object"),
        ("a.json", b'[{"prompt": "p", "prompt": "q"}]', "the key 'prompt' comes twice in one object"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        for _, row in open_source(str(tmp_path / name)).rows():
            if isinstance(row, BadRow):
                raise row


def test_pairs_that_are_equal_only_in_the_template_have_a_reason_of_their_own(tmp_path):
    rows = [{"prompt": HI, "chosen": [assistant(x)], "rejected": [assistant("b")]} for x in (" b\n", "a")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    trims = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}"
    data = prepare(str(path), options=options(), tokenizer=tokenizer(template=trims))
    assert data.census["dropped"] == {"equal after the chat template": 1} and len(data) == 1


def test_the_census_shows_what_generation_would_write_otherwise(tmp_path):
    rows = [{"prompt": HI, "chosen": [assistant("<think>t</think>a")], "rejected": [assistant("b")]}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    opens = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    data = prepare(str(path), options=options(), tokenizer=tokenizer(template=opens))
    assert (data.census["prompts_rendered_otherwise"], data.census["content_left_out"]) == (1, 1)
    assert data.census["first_of"] == {
        "prompts_rendered_otherwise": f"{path}:1: at character 19 '', in generation '<think>'",
        "content_left_out": f"{path}:1: '<think>t</think>a'",
    }
    tok = tokenizer(template=opens)
    data = prepare(str(path), options=options(prompt_rendering="generation"), tokenizer=tok)
    assert tok.decode(data[0].prompt) == "[user]hi[assistant]<think>"
    assert (tok.decode(data[0].chosen), tok.decode(data[0].rejected)) == ("t</think>a</s>", "b</s>")
    assert data.census["prompts_rendered_otherwise"] == 1 and data.census["content_left_out"] == 0
