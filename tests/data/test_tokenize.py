"""Boundaries, special tokens, cuts and masks on tokenizers whose merges are known: other characters are tokens each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ds.batch import PAIR
from dpo_ds.data.chat.template import DEFAULT_CHAT_TEMPLATE, set_template, settle_template
from dpo_ds.data.formats import Conversation
from dpo_ds.data.rows import BadRow
from dpo_ds.data.tokenize import GroupTokenizer, fingerprint
from dpo_ds.errors import ConfigError, ModelError
from tests.data_helpers import CHATML, EOS, tokenizer

STRIPS_THINKING = (  # earlier assistant turns lose their <think> block, the last keeps it (as in Qwen 3)
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINKING = (  # the generation prompt opens a block that a finished turn does not show (as in DeepSeek R1)
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}[A]"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tokenize(conversation, tok, max_length=1000, max_prompt_length=500):
    result = GroupTokenizer(tok, max_length, max_prompt_length)([conversation])[0]
    if isinstance(result, BadRow):
        raise result
    return result


def shown(tok, ids):
    return [tok.decode([i]) for i in ids]


def trained(tok, pair, side):
    return tok.decode(getattr(pair, side)[pair.masks[PAIR.index(side)]])


def test_strings_are_used_verbatim():
    tok = tokenizer(template=CHATML)
    pair = tokenize(Conversation.of("ab", "c d", "e\n"), tok).group
    assert shown(tok, pair.prompt) == ["a", "b"]
    assert shown(tok, pair.chosen) == ["c", " ", "d", EOS]
    assert shown(tok, pair.rejected) == ["e", "\n", EOS]
    assert pair.masks[0].all() and pair.masks[1].all()
    assert {array.dtype for array in (pair.prompt, pair.chosen, pair.rejected)} == {np.dtype(np.int64)}
    assert pair.masks[0].dtype == bool


def test_a_token_across_the_boundary_is_the_completions():
    """ "bc" is one token: chosen's prompt is only "a", so rejected begins with the "b" left over, untrained."""
    tok = tokenizer(merges=(("b", "c"),))
    pair = tokenize(Conversation.of("ab", "cd", "xd"), tok).group
    assert shown(tok, pair.prompt) == ["a"]
    assert shown(tok, pair.chosen) == ["bc", "d", EOS]
    assert pair.masks[0].tolist() == [True, True, True]
    assert shown(tok, pair.rejected) == ["b", "x", "d", EOS]
    assert pair.masks[1].tolist() == [False, True, True, True]


def test_a_token_across_both_boundaries():
    tok = tokenizer(merges=(("b", "c"), ("b", "x")))
    pair = tokenize(Conversation.of("ab", "cd", "xd"), tok).group
    assert shown(tok, pair.prompt) == ["a"]
    assert shown(tok, pair.chosen) == ["bc", "d", EOS]
    assert shown(tok, pair.rejected) == ["bx", "d", EOS]
    assert pair.masks[0].all() and pair.masks[1].all()


def test_white_space_at_the_boundary_with_trimmed_offsets():
    """A tokenizer that trims offsets reports " " as empty; the boundary must not move."""
    tok = tokenizer(merges=(("Ġ", "h"),), trim_offsets=True)
    pair = tokenize(Conversation.of("a:", " hi", "  hi"), tok).group
    assert shown(tok, pair.prompt) == ["a", ":"]
    assert shown(tok, pair.chosen) == [" h", "i", EOS]
    assert shown(tok, pair.rejected) == [" ", " h", "i", EOS]
    assert pair.masks[1].all()


def test_characters_of_several_tokens():
    tok = tokenizer()
    pair = tokenize(Conversation.of("世", "界é", "é"), tok).group
    assert tok.decode(pair.prompt) == "世" and len(pair.prompt) == 3
    assert len(pair.chosen) == 3 + 2 + 1 and pair.masks[0].all()


@pytest.mark.parametrize(
    ("prompt", "bos", "eos_too", "front"),
    [
        ("ab", False, False, ["a", "b"]),
        ("ab", True, False, ["<s>", "a", "b"]),
        ("ab", True, True, ["<s>", "a", "b"]),
        ("ab", False, True, ["a", "b"]),
        ("<s>ab", True, False, ["<s>", "a", "b"]),
        ("<s>ab", False, False, ["<s>", "a", "b"]),
        ("", True, False, ["<s>"]),
        ("", False, False, []),
    ],
)
def test_bos_where_the_tokenizer_adds_one_and_never_twice(prompt, bos, eos_too, front):
    tok = tokenizer(bos=bos, eos_too=eos_too)
    pair = tokenize(Conversation.of(prompt, "c", "d"), tok).group
    assert shown(tok, pair.prompt) == front
    assert shown(tok, pair.chosen) == ["c", EOS]  # and the EOS that the tokenizer adds does not come on top


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template_bos", [False, True])
def test_bos_of_a_chat_template(bos, template_bos):
    tok = tokenizer(bos=bos, template=("{{ bos_token }}" if template_bos else "") + CHATML)
    pair = tokenize(Conversation.of([user("q")], [assistant("a")], [assistant("b")]), tok).group
    assert shown(tok, pair.prompt).count("<s>") == (bos or template_bos)


def test_eos_is_not_doubled():
    tok = tokenizer()
    pair = tokenize(Conversation.of("a", "b</s>", "b"), tok).group
    assert shown(tok, pair.chosen) == shown(tok, pair.rejected) == ["b", EOS]


def test_cuts():
    """10 prompt tokens cut to the last 4; 6 remain for a completion: 5 and EOS fit, 6 lose EOS, 9 lose 3 and EOS."""
    tok = tokenizer()
    for length, kept, cut in [(5, "vwxyz"[:5] + EOS, 0), (6, "vwxyzv", 1), (9, "vwxyzv", 1)]:
        result = tokenize(Conversation.of("0123456789", ("vwxyz" * 2)[:length], "!"), tok, 10, 4)
        assert tok.decode(result.group.prompt) == "6789"
        assert tok.decode(result.group.chosen) == kept
        assert tok.decode(result.group.rejected) == "!" + EOS
        assert (result.prompt_cut, result.completions_cut) == (True, cut)


def test_a_cut_prompt_keeps_bos():
    tok = tokenizer(bos=True)
    result = tokenize(Conversation.of("0123456789", "a", "b"), tok, 10, 4)
    assert shown(tok, result.group.prompt) == ["<s>", "7", "8", "9"]
    written = tokenizer(template="{{ bos_token }}" + CHATML)
    result = tokenize(Conversation.of([user("q" * 50)], [assistant("a")], [assistant("b")]), written, 90, 20)
    assert shown(written, result.group.prompt)[0] == "<s>" and len(result.group.prompt) == 20
    whole = tokenize(Conversation.of("123", "a", "b"), tok, 10, 4)
    assert shown(tok, whole.group.prompt) == ["<s>", "1", "2", "3"] and not whole.prompt_cut


def test_left_over_prompt_tokens_count_as_completion_when_cutting():
    tok = tokenizer(merges=(("b", "c"),))
    pair = tokenize(Conversation.of("ab", "cd", "xd"), tok, 3, 2).group
    assert shown(tok, pair.rejected) == ["b", "x"] and pair.masks[1].tolist() == [False, True]


def test_a_cut_can_leave_nothing_to_train_on():
    """Default template: "<|user|>\\nq\\n" is 11 tokens, all of what room is left after an empty prompt."""
    conversation = Conversation.of([], [user("q"), assistant("a")], [user("r"), assistant("b")])
    pair = tokenize(conversation, tokenizer(), 11, 5).group
    assert len(pair.target_positions(0)) == 0


def test_supervised_pair_has_no_rejected():
    tok = tokenizer()
    pair = tokenize(Conversation.of("a", "bc"), tok).group
    assert (tok.decode(pair.prompt), tok.decode(pair.chosen)) == ("a", "bc" + EOS)
    assert len(pair.completions) == len(pair.masks) == 1 and not len(pair.comparisons)


def test_default_template():
    tok = tokenizer()
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [
        {"role": "system", "content": "brief"},
        user("hi"),
        {**assistant(""), "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    pair = tokenize(Conversation.of(prompt, [assistant("yes\n")], [assistant("no")], [tool]), tok).group
    assert tok.decode(pair.prompt) == (
        '<|tools|>\n{"type": "function", "function": {"name": "add"}}\n<|system|>\nbrief\n<|user|>\nhi\n<|assistant|>\n'
        '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}</s>\n<|tool|>\n2\n<|assistant|>\n'
    )
    assert tok.decode(pair.chosen) == "yes\n</s>"  # the template's newline after EOS is left off
    assert tok.decode(pair.rejected) == "no</s>"
    assert pair.masks[0].all()


def test_end_of_turn_that_is_not_eos():
    """ChatML with </s> as EOS: turn, its mark, the template's newline (untrained), EOS."""
    tok = tokenizer(template=CHATML)
    pair = tokenize(Conversation.of([user("q")], [assistant("a")], [assistant("b")]), tok).group
    assert tok.decode(pair.prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tok, pair.chosen) == ["a", "<|im_end|>", "\n", EOS]
    assert pair.masks[0].tolist() == [True, True, False, True]


def test_end_of_turn_that_is_eos():
    tok = tokenizer(template=CHATML, eos="<|im_end|>")
    pair = tokenize(Conversation.of([user("q")], [assistant("a")], [assistant("b")]), tok).group
    assert shown(tok, pair.chosen) == ["a", "<|im_end|>"] and pair.masks[0].all()


def test_only_assistant_turns_are_trained_on():
    tok = tokenizer()
    chosen = [assistant("one"), user("two"), assistant("three")]
    pair = tokenize(Conversation.of([user("q")], chosen, [assistant("x"), user("end")]), tok).group
    assert tok.decode(pair.chosen) == "one</s>\n<|user|>\ntwo\n<|assistant|>\nthree</s>"
    assert trained(tok, pair, "chosen") == "one</s>three</s>"
    assert tok.decode(pair.rejected) == "x</s>\n<|user|>\nend\n</s>"
    assert trained(tok, pair, "rejected") == "x</s>"  # EOS after the user's turn is not the assistant's


def test_completion_that_begins_with_a_user_turn():
    tok = tokenizer()
    system = {"role": "system", "content": "s"}
    pair = tokenize(Conversation.of([system], [user("q"), assistant("a")], [user("r"), assistant("b")]), tok).group
    assert tok.decode(pair.prompt) == "<|system|>\ns\n"
    assert tok.decode(pair.chosen) == "<|user|>\nq\n<|assistant|>\na</s>"
    assert trained(tok, pair, "chosen") == "a</s>"


def test_masks_when_the_template_strips_earlier_thinking():
    tok = tokenizer(template=STRIPS_THINKING, eos="<|im_end|>")
    chosen = [assistant("<think>t</think> s"), user("u"), assistant("<think>v</think> w")]
    pair = tokenize(Conversation.of([user("s")], chosen, [assistant("n")]), tok).group
    assert tok.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert trained(tok, pair, "chosen") == "s<|im_end|><think>v</think> w<|im_end|>"
    assert trained(tok, pair, "rejected") == "n<|im_end|>"


def test_masks_when_the_generation_prompt_is_no_beginning():
    tok = tokenizer(template=OPENS_THINKING)
    chosen = [assistant("<think>t</think><i>A</i>"), user("A"), assistant("A")]
    pair = tokenize(Conversation.of([user("A")], chosen, [assistant("B")]), tok).group
    assert tok.decode(pair.prompt) == "[U]A[A]"
    assert tok.decode(pair.chosen) == "<i>A</i></s>[U]A[A]A</s>"
    assert trained(tok, pair, "chosen") == "<i>A</i></s>A</s>"
    assert trained(tok, pair, "rejected") == "B</s>"


def test_a_template_may_refuse_or_leave_out():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    conversation = Conversation.of([{"role": "system", "content": "s"}], [assistant("a")], [assistant("b")])
    with pytest.raises(BadRow, match="the chat template refuses the conversation: no system role"):
        tokenize(conversation, tokenizer(template=refuses))
    silent = tokenizer(
        template="{% for m in messages %}{{ m.content.split('z')[-1] }}|{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(BadRow, match="the chat template leaves out the turn 'textz'"):
        tokenize(Conversation.of([user("q")], [assistant("textz"), user("e")], [assistant("b")]), silent)
    result = tokenize(Conversation.of([user("q")], [assistant("atextzb"), user("e")], [assistant("b")]), silent)
    assert trained(silent, result.group, "chosen") == "b|" and result.left_out == "atextzb"


def test_a_template_that_the_config_sets_is_used_and_told_apart():
    """"[U]q[A]a</s>" is 3 + 1 characters of prompt, then the header, which generation would write, and the answer."""
    conversation = Conversation.of([user("q")], [assistant("a")], [assistant("b")])
    own, other = tokenizer(template=CHATML), tokenizer(template=CHATML)
    set_template(own, None)
    assert own.chat_template == CHATML and fingerprint(own) == fingerprint(other)
    set_template(own, OPENS_THINKING)
    assert fingerprint(own) != fingerprint(other)
    pair = tokenize(conversation, own).group
    assert own.decode(np.concatenate([pair.prompt, pair.chosen])) == "[U]q[A]a</s>"
    several = tokenizer(template={"plain": CHATML, "thinking": OPENS_THINKING})
    set_template(several, "thinking")
    assert several.chat_template == OPENS_THINKING


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (None, "thinking", "--data.chat_template 'thinking': no such file, and .* has no chat template; give a file"),
        (CHATML, "thinking", "'thinking': no such file, and .* has templates named default; give a file"),
        ({"b": CHATML, "a": CHATML}, "c", "'c': no such file, and .* has templates named a, b; give a file"),
        (None, "{{ messages }}{% for %}", "'{{ messages }}{% for %}': not valid at its line 1: Expected an expression"),
    ],
)
def test_a_template_that_cannot_be_set(own, given, message):
    with pytest.raises(ConfigError, match=message):
        set_template(tokenizer(template=own), given)


def test_the_built_in_template_stays_with_the_tokenizer_where_it_is_used():
    tok = tokenizer()
    before = fingerprint(tok)
    assert settle_template(tok, has_messages=False) == [] and tok.chat_template is None
    assert ["built-in" in line for line in settle_template(tok, has_messages=True)] == [True]
    assert tok.chat_template == DEFAULT_CHAT_TEMPLATE and fingerprint(tok) == before
    assert settle_template(tok, has_messages=True) == []  # said once
    own = tokenizer(template=CHATML)
    assert settle_template(own, has_messages=True) == [] and own.chat_template == CHATML


def test_a_template_that_fails():
    """One that is no Jinja cannot show any row; one that fails while it runs may show others."""
    conversation = Conversation.of([user("q")], [assistant("a")], [assistant("b")])
    for template, message in [
        ("\n{% for %}", "the chat template is not valid at its line 2: Expected an expression"),
        ("{{ messages | nothing }}", "the chat template is not valid at its line 1: No filter named 'nothing'"),
        ({"tool_use": CHATML}, "no chat template to use: "),
    ]:
        tok = tokenizer(template=template)
        with pytest.raises(ModelError, match=message):
            tokenize(conversation, tok)
    for template, message in [
        ("{{ 1 / 0 }}", "the chat template fails on the conversation: ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "the chat template fails on the conversation: TypeError: "),
        ("{{ messages[0].name.first }}", "the chat template refuses the conversation: .* has no attribute 'name'"),
    ]:
        with pytest.raises(BadRow, match=message):
            tokenize(conversation, tokenizer(template=template))


@pytest.mark.parametrize(
    ("template", "header", "end"),
    [
        (None, "<|assistant|>\n", EOS),
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
        ("{{ bos_token }}" + CHATML, "<s><|im_start|>assistant\n", "<|im_end|>"),
        ("{% if messages[0].role == 'user' %}U{% endif %}" + CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    ],
)
def test_the_role_line_of_a_first_turn_is_not_trained_on(template, header, end):
    """Whole conversations that have no turn in common: the assistant's header is all of the prompt."""
    call = {"type": "function", "function": {"name": "f"}}
    tok = tokenizer(template=template)
    pair = tokenize(Conversation.of([], [assistant("one"), user("u"), assistant("two")], [assistant("x")]), tok).group
    assert tok.decode(pair.prompt) == header
    assert trained(tok, pair, "chosen").removesuffix(EOS) == ("one" + end + "two" + end).removesuffix(EOS)
    assert trained(tok, pair, "rejected").startswith("x" + end)
    if template is None:
        pair = tokenize(Conversation.of([], [{**assistant(""), "tool_calls": [call]}], [assistant("x")]), tok).group
        assert trained(tok, pair, "chosen") == '{"type": "function", "function": {"name": "f"}}' + EOS


def test_results_keep_their_order_around_a_refused_row():
    tok = tokenizer(template="{% if messages | length > 2 %}{{ raise_exception('long') }}{% endif %}" + CHATML)
    good = Conversation.of([user("q")], [assistant("a")], [assistant("b")])
    bad = Conversation.of([user("q"), assistant("a"), user("q")], [assistant("a")], [assistant("b")])
    text = Conversation.of("q", "text", "b")
    first, second, third = GroupTokenizer(tok, 100, 50)([good, bad, text])
    assert isinstance(second, BadRow) and second.reason == "refused by the chat template"
    assert trained(tok, first.group, "chosen") == "a<|im_end|>" + EOS
    assert trained(tok, third.group, "chosen") == "text" + EOS


def test_user_mistakes():
    slow = tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(
        ModelError, match="a slow tokenizer gives no character offsets; use a model with a tokenizer.json"
    ):
        GroupTokenizer(slow, 10, 5)
    with pytest.raises(ModelError, match="has no EOS token"):
        GroupTokenizer(tokenizer(eos=None), 10, 5)


def test_the_callers_tokenizer_is_left_alone():
    tok = tokenizer(bos=True, eos_too=True)
    before = tok.backend_tokenizer.to_str()
    tok.backend_tokenizer.enable_truncation(3)  # left over from a call of the user's
    pair = tokenize(Conversation.of("abcdef", "ghi", "j"), tok).group
    assert tok.decode(pair.prompt) == "<s>abcdef"
    assert tok.backend_tokenizer.to_str() == before


def test_fingerprint_sees_all_that_token_ids_depend_on():
    same = [fingerprint(tokenizer()), fingerprint(tokenizer())]
    others = [
        tokenizer(bos=True),
        tokenizer(eos="<|im_end|>"),
        tokenizer(template=CHATML),
        tokenizer(merges=(("a", "b"),)),
    ]
    assert same[0] == same[1]
    assert len({same[0], *map(fingerprint, others)}) == 5


@settings(max_examples=200, deadline=None)
@given(st.text("abc é", max_size=8), st.text("abc é", min_size=1, max_size=8), st.text("abc é", min_size=1, max_size=8))
def test_every_side_is_its_text_tokenised_as_one(prompt, chosen, rejected):
    """Whatever the boundary: prompt ++ side are the ids of the whole text; what is trained on covers the completion."""
    tok = tokenizer(merges=(("a", "b"), ("b", "c"), ("ab", "c"), ("Ġ", "a"), ("c", "Ġ")), bos=True)
    pair = tokenize(Conversation.of(prompt, chosen, rejected), tok).group
    for completion, mask, text in zip(pair.completions, pair.masks, (chosen, rejected), strict=True):
        ids = np.concatenate([pair.prompt, completion])
        assert ids.tolist() == [*tok(prompt + text)["input_ids"], tok.eos_token_id]
        untrained = len(pair.prompt) + int((~mask).sum())
        assert prompt.startswith(tok.decode(ids[1:untrained]).replace("\ufffd", ""))
        assert text.endswith(tok.decode(ids[untrained + 1 : -1]).replace("\ufffd", ""))
