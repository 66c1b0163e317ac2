"""Conversations -> token ids: one text for prompt and completion, the boundary by characters, masks, cuts.

Tokenising prompt and completion apart, or slicing by the prompt's own length, is off where a token spans the boundary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from dpo_ds.batch import NO_COMPARISON, Group
from dpo_ds.data.chat.render import CONVERSATION, Rendered, render
from dpo_ds.data.chat.template import DEFAULT_CHAT_TEMPLATE, date_of
from dpo_ds.data.formats import Conversation
from dpo_ds.data.rows import BadRow
from dpo_ds.errors import ModelError


class Tokenized(NamedTuple):
    """A group, whether its prompt was cut, and how many of its completions were.

    asked: the prompt in the text and as generation writes it, where the two differ. left_out: what the chat template
    does not show of an answer.
    """

    group: Group
    prompt_cut: bool
    completions_cut: int
    asked: tuple[str, str] | None = None
    left_out: str | None = None


class _Side(NamedTuple):
    """A prompt with one completion before cutting: token ids, with EOS, how many of them are the prompt's, which are
    trained on."""

    ids: np.ndarray
    prompt: int
    trained: np.ndarray


class GroupTokenizer:
    """Tokenises conversations; lengths are in tokens.

    max_prompt_length is below max_length; prompt_rendering: data.prompt_rendering. Raises ModelError for a tokenizer
    without offsets or EOS.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, max_prompt_length: int, prompt_rendering: str = CONVERSATION
    ):
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(f"{name}: a slow tokenizer gives no character offsets; use a model with a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{name}: the tokenizer has no EOS token, so no completion could end; set eos_token")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.prompt_rendering = prompt_rendering
        self.eos = tokenizer.eos_token_id
        self.bare = _bare(tokenizer)
        self.prefix = _added_in_front(tokenizer, self.bare)

    def __call__(self, conversations: Sequence[Conversation]) -> list[Tokenized | BadRow]:
        """One result each, in order; BadRow where the chat template cannot show the conversation.

        Raises ModelError for a chat template that is not valid.
        """
        rendered = [self._render(conversation) for conversation in conversations]
        known = [(c.comparisons, c.margins, c.labels) for c in conversations]
        texts = [side.text for sides in rendered if not isinstance(sides, BadRow) for side in sides]
        encodings = iter(self.bare.encode_batch(texts, add_special_tokens=False))
        return [
            sides
            if isinstance(sides, BadRow)
            else self._group([self._side(next(encodings), side) for side in sides], *more)._replace(**_otherwise(sides))
            for sides, more in zip(rendered, known, strict=True)
        ]

    def within(self, max_length: int, max_prompt_length: int) -> GroupTokenizer:
        """The same with other limits."""
        other = copy.copy(self)
        other.max_length, other.max_prompt_length = max_length, max_prompt_length
        return other

    def prompts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """Token ids of texts that a completion is to follow, [tokens] int64, and whether each was cut."""
        encodings = self.bare.encode_batch(texts, add_special_tokens=False)
        return [self._cut_prompt(np.array(self._with_prefix(encoding.ids), dtype=np.int64)) for encoding in encodings]

    def _render(self, conversation: Conversation) -> list[Rendered] | BadRow:
        prompt = conversation.prompt
        completions = conversation.completions
        if isinstance(prompt, str):
            return [_verbatim(prompt, completion) for completion in completions]
        try:
            tools = conversation.tools
            return [render(self.tokenizer, prompt, side, tools, self.prompt_rendering) for side in completions]
        except BadRow as error:
            return error

    def _side(self, encoding: Encoding, rendered: Rendered) -> _Side:
        """A token that straddles the end of the prompt is the completion's. BOS never comes twice, nor does EOS."""
        ids = encoding.ids
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        beyond = np.flatnonzero(ends > rendered.prompt_end)
        prompt = int(beyond[0]) if len(beyond) else len(ids)
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in rendered.trained:
            trained |= (starts < end) & (ends > start)
        trained[:prompt] = False
        prefixed = self._with_prefix(ids)
        trained = np.concatenate([np.zeros(len(prefixed) - len(ids), dtype=bool), trained])
        prompt += len(prefixed) - len(ids)
        ids = prefixed
        if not ids or ids[-1] != self.eos:
            ids = [*ids, self.eos]
            trained = np.append(trained, rendered.ends_in_answer)
        return _Side(np.array(ids, dtype=np.int64), prompt, trained)

    def _group(
        self, sides: list[_Side], comparisons: Sequence, margins: Sequence[float] | None, labels: Sequence[bool] | None
    ) -> Tokenized:
        """The shared prompt is cut from its start, behind BOS; each completion from its end."""
        shared = _common_prefix([side.ids[: side.prompt] for side in sides])
        prompt, prompt_cut = self._cut_prompt(sides[0].ids[:shared])
        room = self.max_length - len(prompt)
        completions = tuple(side.ids[shared:][:room] for side in sides)
        masks = tuple(side.trained[shared:][:room] for side in sides)
        cut = sum(len(side.ids) - shared > room for side in sides)
        known = np.array(comparisons, np.int64).reshape(-1, 2) if len(comparisons) else NO_COMPARISON
        margins = None if margins is None else np.array(margins, np.float32)
        labels = None if labels is None else np.array(labels, bool)
        return Tokenized(Group(prompt, completions, masks, known, margins, labels), prompt_cut, cut)

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Returns the ids behind what the tokenizer adds in front, unless it stands there already."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _cut_prompt(self, prompt: np.ndarray) -> tuple[np.ndarray, bool]:
        if len(prompt) <= self.max_prompt_length:
            return prompt, False
        head = self._bos(prompt)[: self.max_prompt_length]
        return np.concatenate([head, prompt[len(prompt) - (self.max_prompt_length - len(head)) :]]), True

    def _bos(self, prompt: np.ndarray) -> np.ndarray:
        """Returns what stays in front of a cut prompt: what the tokenizer adds, or a BOS that the chat template wrote.
        """
        if self.prefix:
            return prompt[: len(self.prefix)]
        return prompt[:1] if len(prompt) and prompt[0] == self.tokenizer.bos_token_id else prompt[:0]


def fingerprint(tokenizer: Any) -> str:
    """Returns all of the tokenizer that token ids depend on, as text."""
    template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    return json.dumps([*_words(tokenizer), template, *filter(None, [date_of(tokenizer)])], sort_keys=True)


def fingerprint_without_template(tokenizer: Any) -> str:
    return json.dumps(_words(tokenizer), sort_keys=True)


def _words(tokenizer: Any) -> list:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [_clone(tokenizer).to_str(), special]


def _otherwise(sides: list[Rendered]) -> dict[str, Any]:
    """Returns what a pair's texts are not: the prompt that generation would write, answers that are shown whole."""
    asked = next(((side.text[: side.prompt_end], side.sampled) for side in sides if side.sampled is not None), None)
    return {"asked": asked, "left_out": next((side.left_out for side in sides if side.left_out is not None), None)}


def _verbatim(prompt: str, completion: str) -> Rendered:
    whole = len(prompt) + len(completion)
    return Rendered(prompt + completion, len(prompt), [(len(prompt), whole)], ends_in_answer=True)


def _clone(tokenizer: Any) -> Tokenizer:
    """The backend with no cut or padding set, apart from the caller's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _bare(tokenizer: Any) -> Tokenizer:
    """Without the post-processor, which adds special tokens and may trim white space off the offsets."""
    backend = _clone(tokenizer)
    backend.post_processor = None
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _added_in_front(tokenizer: Any, bare: Tokenizer) -> list[int]:
    """The special tokens, most often BOS, that the tokenizer itself puts before a text; not those it puts behind."""
    probe = "a"
    plain, whole = bare.encode(probe, add_special_tokens=False).ids, tokenizer(probe)["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    if at is None:
        problem = f"the tokenizer and its tokenizer.json disagree on {probe!r}: {whole}, {plain}"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}; save the tokenizer again with save_pretrained")
    return whole[:at]


def _common_prefix(prompts: list[np.ndarray]) -> int:
    length = min(map(len, prompts))
    for other in prompts[1:]:
        differs = np.flatnonzero(prompts[0][:length] != other[:length])
        length = int(differs[0]) if len(differs) else length
    return length
