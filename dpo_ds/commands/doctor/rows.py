"""Looks at the data as the model will get it: the census, one row decoded with its mask, whose turns are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np

from dpo_ds.batch import Group
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding
from dpo_ds.data.formats.conversation import Conversation
from dpo_ds.data.tokenize import GroupTokenizer

DATA, MASK = "data", "mask"
FEW, MANY = 0.01, 0.2  # shares of rows dropped, or of prompts and completions cut
REMEDY = "mend the chat template (data.chat_template): see dpo_ds/data/README.md"
PROBE_LENGTH = 4096  # tokens
USERS, ASSISTANTS = ("pelican", "walnut"), ("lighthouse", "marmalade")  # words of the probe's turns
SHOWN = 400  # characters of each end of a long text
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


def check_census(split: str, census: Mapping[str, Any]) -> list[Finding]:
    """Judges what became of the rows."""
    read, kept = census["rows_read"], census["rows_kept"]
    dropped = census["rows_dropped"] / max(read, 1)
    cut = {"prompts": census["prompts_cut"] / max(kept, 1)}
    cut["completions"] = census["completions_cut"] / max(census["completions"], 1)
    figures = {"rows_read": read, "rows_kept": kept, "dropped": dropped, "cut": cut}
    findings = []
    if dropped > FEW:
        first = census["bad_rows"][0]
        text = f"{split}: {census['rows_dropped']:,} of {read:,} rows dropped ({first['location']}: {first['reason']})"
        findings.append(Finding(DATA, _grade(dropped), text, "mend the rows, or data.columns and data.format", figures))
    for what, share in cut.items():
        if share > FEW:
            text = f"{split}: {share:.0%} of the {what} cut; the longest row has {census['longest']:,} tokens"
            key = "data.max_prompt_length" if what == "prompts" else "data.max_length"
            findings.append(Finding(DATA, _grade(share), text, f"raise {key}, or leave such rows out", figures))
    if census["content_left_out"]:
        text = f"{split}: the chat template leaves part of {census['content_left_out']:,} answers out"
        where = census["first_of"]["content_left_out"]
        findings.append(Finding(DATA, WARN, f"{text} ({where})", "see dpo_ds/data/README.md"))
    text = f"{split}: {kept:,} of {read:,} rows, the longest {census['longest']:,} tokens"
    return findings or [Finding(DATA, PASS, text, figures=figures)]


def _grade(share: float) -> str:
    return FAIL if share > MANY else WARN


def check_template(tokenizer: Any, data_section) -> list[Finding]:
    """Puts a conversation of known words through the template and mask: the assistant's are trained, the user's not."""
    turns = [("user", USERS[0]), ("assistant", ASSISTANTS[0]), ("user", USERS[1]), ("assistant", ASSISTANTS[1])]
    messages = [{"role": role, "content": word} for role, word in turns]
    tokenize = GroupTokenizer(tokenizer, PROBE_LENGTH, PROBE_LENGTH // 2, data_section.prompt_rendering)
    probe = tokenize([Conversation.of(messages[:1], messages[1:])])[0]
    if isinstance(probe, Exception):
        text = f"the template refuses a plain conversation: {probe}"
        return [Finding(MASK, WARN, text, "look at data.chat_template")]
    group = probe.group
    trained = tokenizer.decode(group.completions[0][group.masks[0]])
    if wrong := [word for word in USERS if word in trained]:
        text = f"the mask trains what the user says ({wrong[0]!r} of a user's turn is in {trained!r})"
        return [Finding(MASK, FAIL, text, REMEDY)]
    if missing := [word for word in ASSISTANTS if word not in trained]:
        text = f"the mask leaves the assistant's {missing[0]!r} out of {trained!r}"
        return [Finding(MASK, FAIL, text, REMEDY)]
    return [Finding(MASK, PASS, f"of a conversation of four turns the assistant's alone are trained: {trained!r}")]


def check_mask(group: Group) -> list[Finding]:
    """Looks whether each completion of a row has something that is trained."""
    trained = [int(mask.sum()) for mask in group.masks]
    text = f"row {group.index}: prompt {len(group.prompt)} tokens, trained {' and '.join(map(str, trained))}"
    if not all(trained):
        return [Finding(MASK, FAIL, text, "nothing of a completion is trained: raise data.max_length, or mend the row")]
    return [Finding(MASK, PASS, text)]


def decoded(group: Group, tokenizer: Any, colours: bool) -> list[str]:
    """Returns the row's text: what is trained green, or in brackets where there are no colours."""
    parts = {"prompt": (group.prompt, np.zeros(len(group.prompt), bool))}
    names = ("chosen", "rejected") if len(group.completions) == 2 else map(str, range(1, len(group.completions) + 1))
    parts |= {name: pair for name, pair in zip(names, zip(group.completions, group.masks, strict=True), strict=True)}
    return [f"  {name:>9}  {''.join(_runs(ids, mask, tokenizer, colours))}" for name, (ids, mask) in parts.items()]


def _runs(ids: np.ndarray, mask: np.ndarray, tokenizer: Any, colours: bool) -> Iterator[str]:
    for is_trained, run in groupby(zip(mask.tolist(), ids.tolist(), strict=True), key=lambda token: token[0]):
        text = tokenizer.decode([token for _, token in run]).replace("\n", "\\n")
        text = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
        text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
        if colours:
            yield f"{GREEN if is_trained else DIM}{text}{PLAIN}"
        else:
            yield f"[{text}]" if is_trained else text
