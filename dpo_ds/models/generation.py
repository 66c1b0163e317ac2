"""Completions drawn from a causal language model: batches with left padding, a key-value cache, draws by row.

A completion's randomness comes from (seed, row of its prompt, which of the n) alone, drawn before the batch is formed;
batches are what a list of prompts makes them. So the same list gives the same completions on any rank, beside any
others, however many ranks there are. What the model's generation_config.json sets besides its end-of-text tokens is
not used: completions come from the model's own distribution, bent by `settings` alone.

    B rows of a batch, T prompt tokens with padding, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from dpo_ds.cluster import collectives
from dpo_ds.config import GenerationSection
from dpo_ds.errors import ModelError

Item = TypeVar("Item")
SHRINK_AT = 0.85  # rows still going, of those in the batch, at which the finished ones are taken out
BLOCK = 256  # tokens
ALMOST_ONE = 1 - 2**-53
CONTEXT = 16  # tokens of the prompt that decoding looks back on: some tokenizers drop a text's first blank


class Completion(NamedTuple):
    """ids: as drawn, int64, the stop token included; text: without special tokens; finished: a stop token came."""

    ids: np.ndarray
    text: str
    finished: bool


class Generator:
    """`model` is any LoadedModel (models.engine); together: its weights are spread over the ranks (ZeRO-3).

    Then all ranks call it equally often, a rank without work with no prompts; they need not take as many steps.
    """

    def __init__(self, model, tokenizer: Any, settings: GenerationSection, together: bool):
        self.model, self.tokenizer, self.settings, self.together = model, tokenizer, settings, together
        self.report: Callable[[int, int], None] = lambda tokens, completions: None  # called after every batch
        self.stops = stop_tokens(model.causal_lm.generation_config, tokenizer)
        self._stops = torch.tensor(self.stops, device=model.device)

    def __call__(self, prompts: Sequence[np.ndarray], n: int, first_row: int = 0) -> list[list[Completion]]:
        """n completions of each prompt (token ids [tokens], at least one); first_row: the number of prompts[0].

        Raises:
            ModelError: logits that are not finite, or a model without a key-value cache.
        """
        return self.draw(prompts, n, [(self.settings.seed, first_row + row) for row in range(len(prompts))])

    def draw(self, prompts: Sequence[np.ndarray], n: int, seeds: Sequence[tuple[int, ...]]) -> list[list[Completion]]:
        """As a call; seeds: what the draws of each prompt depend on."""
        with torch.no_grad(), self._padded_attention():
            drawn, mistake = {}, None
            try:
                drawn = self._all_batches(prompts, n, seeds)
            except ModelError as error:
                mistake = error
            while self.together and self._anyone(False):
                self._dummy_forward()  # ZeRO-3 gathers weights inside every forward: the others still need this rank
        if mistake is not None:
            raise mistake
        own = [[drawn[row, i] for i in range(n)] for row in range(len(prompts))]
        return [as_completions(self.tokenizer, self.stops, *pair) for pair in zip(prompts, own, strict=True)]

    def _all_batches(
        self, prompts: Sequence[np.ndarray], n: int, seeds: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, int], np.ndarray]:
        """Token ids of each completion by (index in prompts, which of the n)."""
        length = self.settings.max_new_tokens
        uniforms = [np.random.default_rng(seed).random((n, length)) for seed in seeds]  # float64 in [0, 1)
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))  # like lengths share a batch
        places = [(row, i) for row in order for i in range(n)]
        drawn: dict[tuple[int, int], np.ndarray] = {}
        for start in range(0, len(places), self.settings.batch_size):
            batch = places[start : start + self.settings.batch_size]
            own = torch.from_numpy(np.stack([uniforms[row][i] for row, i in batch])).to(self.model.device)
            ids = self._batch([prompts[row] for row, _ in batch], own)
            drawn |= zip(batch, ids, strict=True)
            self.report(sum(map(len, ids)), len(ids))
        return drawn

    @contextlib.contextmanager
    def _padded_attention(self) -> Iterator[None]:
        """The model may have been given the packed attention, which knows no cache, for its log-probs."""
        causal_lm = self.model.causal_lm
        usual = causal_lm.config._attn_implementation
        causal_lm.set_attn_implementation(self.model.padded_attention)
        yield
        causal_lm.set_attn_implementation(usual)

    def _batch(self, prompts: list[np.ndarray], uniforms: Tensor) -> list[np.ndarray]:
        """Token ids of one completion each, up to a stop token. The same prompt again and again is read once."""
        is_new = [i == 0 or prompt is not prompts[i - 1] for i, prompt in enumerate(prompts)]
        input_ids, mask = left_padded([prompt for prompt, new in zip(prompts, is_new, strict=True) if new])
        rows = torch.tensor(np.cumsum(is_new) - 1, device=self.model.device)
        logits_BV, cache = self._forward(input_ids.to(self.model.device), mask := mask.to(self.model.device), None)
        if len(rows) != len(mask):
            cache.batch_select_indices(rows)
            logits_BV, mask = logits_BV[rows], mask[rows]
        tokens = torch.full(uniforms.shape, -1, device=self.model.device)
        going = torch.arange(len(prompts), device=self.model.device)  # rows of the batch as it is now
        stopped = torch.zeros_like(going, dtype=torch.bool)
        for step in range(uniforms.shape[1]):
            drawn = self._draw(logits_BV, uniforms[going, step], step)
            tokens[going, step] = drawn
            stopped |= torch.isin(drawn, self._stops)
            left = int((~stopped).sum())
            if left == 0 or step + 1 == uniforms.shape[1]:
                break
            if left <= SHRINK_AT * len(going):
                keep = torch.nonzero(~stopped)[:, 0]
                cache.batch_select_indices(keep)
                going, drawn, mask, stopped = going[keep], drawn[keep], mask[keep], stopped[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits_BV, cache = self._forward(drawn[:, None], mask, cache)
        return [self._cut(row) for row in tokens.cpu().numpy()]

    def _forward(self, input_ids: Tensor, mask: Tensor, cache) -> tuple[Tensor, Any]:
        """Logits [B, V] of the last position, and the cache."""
        if self.together:
            self._anyone(True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        output = self.model.engine(None, **inputs, use_cache=True, logits_to_keep=1)
        if getattr(output, "past_key_values", None) is None:
            name = type(self.model.causal_lm).__name__
            raise ModelError(f"{name} keeps no key-value cache, so it cannot be sampled from")
        return output.logits[:, -1].float(), output.past_key_values

    def _draw(self, logits_BV: Tensor, uniforms_B: Tensor, step: int) -> Tensor:  # [B]
        """The token at which the cumulative probability passes the row's number; temperature 0: the likeliest one."""
        settings = self.settings
        if step < settings.min_new_tokens:
            logits_BV[:, self._stops] = -torch.inf
        if settings.temperature == 0:
            total = logits_BV.amax(1)
            token = logits_BV.argmax(1)
        else:
            logits_BV = truncated(logits_BV / settings.temperature, settings.top_k, settings.top_p)
            token, total = inverse_cdf(logits_BV.softmax(1), uniforms_B)
        if not bool(torch.isfinite(total).all()):
            raise ModelError(f"{type(self.model.causal_lm).__name__}: its logits are not finite numbers")
        return token

    def _cut(self, row: np.ndarray) -> np.ndarray:
        """Up to the first stop token: a finished row may have stayed in the batch for a while."""
        end = np.flatnonzero(np.isin(row, self.stops))[:1]
        return row[: end[0] + 1] if len(end) else row[row >= 0]

    def _anyone(self, works: bool) -> bool:
        """Tells whether a rank is about to run a forward. All ranks enter."""
        return collectives.reduce_max(works, self.model.device) > 0

    def _dummy_forward(self) -> None:
        one = torch.ones((1, 1), dtype=torch.long, device=self.model.device)
        self.model.engine(None, input_ids=one, attention_mask=one, position_ids=one - 1, use_cache=True)


def stop_tokens(generation_config: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """The tokenizer's EOS and what generation_config.json names beside it: the end of a chat turn."""
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({tokenizer.eos_token_id, *named})


def as_completions(
    tokenizer: Any, stops: Sequence[int], prompt: np.ndarray, drawn: Sequence[np.ndarray]
) -> list[Completion]:
    """Token ids drawn after `prompt`, with their text as it reads there.

    Where the prompt's own text reads differently with them (bytes that go on with its last character, or that a
    tokenizer with byte fallback decodes as one run with it), it is the text of these ids alone.
    """

    def decode(runs: list[np.ndarray]) -> list[str]:
        return tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    context = prompt[-CONTEXT:]
    before, *texts = decode([context, *(np.concatenate([context, ids]) for ids in drawn)])
    own = [
        text.removeprefix(before) if text.startswith(before) else decode([ids])[0]
        for ids, text in zip(drawn, texts, strict=True)
    ]
    return [Completion(ids, text, int(ids[-1]) in stops) for ids, text in zip(drawn, own, strict=True)]


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """input_ids and attention mask [B, T]; what pads is masked, so any token does."""
    width = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        mask[row, width - len(ids) :] = 1
    return input_ids, mask


def truncated(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k likeliest (0: all) and the fewest tokens whose probabilities reach top_p (1: all)."""
    if 0 < top_k < logits_BV.shape[1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits_BV.sort(dim=1, descending=True, stable=True)
        probs = ordered.softmax(1)
        beyond = probs.cumsum(1) - probs >= top_p  # what comes before a token reaches top_p already
        logits_BV = logits_BV.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits_BV


def inverse_cdf(probs_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of each row up to which more than the uniform number's share of its total lies, and the total.

    First the block of tokens is found, then the token in it: a cumulative sum over a whole vocabulary, in float64 for
    its accuracy, takes longer than a small model's forward. A token without probability is never drawn.
    """
    rows = torch.arange(len(probs_BV), device=probs_BV.device)
    blocks = pad(probs_BV, (0, -probs_BV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block, rest, total = _first_above(blocks.sum(2), uniforms_B)
    token, _, _ = _first_above(blocks[rows, block], rest)
    return block * BLOCK + token, total


def _first_above(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weights [B, W], share [B] in [0, 1): the index at which the cumulative weight passes that share of the total, the
    share of the weight there that is passed, and the total."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1]
    wanted = share * total
    index = torch.searchsorted(cumulative, wanted[:, None], right=True)
    index = index.clamp(max=weights.shape[1] - 1)
    own = weights.gather(1, index).double()
    before = cumulative.gather(1, index) - own
    within = ((wanted[:, None] - before) / own).clamp(0, ALMOST_ONE)
    return index[:, 0], within[:, 0], total


def in_rounds(items: Sequence[Item], rank: int, ranks: int) -> Iterator[Item | None]:
    """This rank's item of every round of `ranks`; None where the last has none for it: all take as many turns."""
    for start in range(0, len(items), ranks):
        yield items[start + rank] if start + rank < len(items) else None
