"""A chat template that takes more time than any conversation is worth."""

from __future__ import annotations

import pytest

from dpo_ds.data.chat import render as chat
from dpo_ds.errors import ModelError
from tests.data_helpers import CHATML, tokenizer

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_a_template_without_end_is_one_line(monkeypatch):
    """9^15 rounds, in the whole conversation and in every part of it."""
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.2)
    loops = "".join(f"{{% for {name} in range({9**5}) %}}" for name in "ijk")
    tok = tokenizer(template=loops + "{% endfor %}" * 3 + CHATML)
    for fails in (
        lambda: chat.render(tok, [Q], [A], None),
        lambda: chat.render_prompt(tok, [Q], None),
        lambda: chat.render_prompt(tok, [], None),
    ):
        with pytest.raises(ModelError, match="the chat template did not come to an end within 0.2 s"):
            fails()
