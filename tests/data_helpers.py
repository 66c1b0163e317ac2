"""Tokenizers and files for the data tests, small enough to reason about by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
OPTIONS = {
    "format": "auto",
    "columns": {},
    "max_length": 64,
    "max_prompt_length": 32,
    "limit": None,
    "on_bad_row": "error",
    "ignore_columns": [],
    "prompt_rendering": "conversation",
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    merges: tuple[tuple[str, str], ...] = (),
    bos: bool = False,
    eos_too: bool = False,
    eos: str | None = EOS,
    template: str | None = None,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly these merges, so that every other character is a token of its own.

    bos, eos_too: its post-processor adds <s> in front, </s> behind.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [BOS, EOS, "<|im_end|>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, "<|im_end|>"])
    if bos or eos_too:
        single = " ".join([BOS] * bos + ["$A"] + [EOS] * eos_too)
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=[(BOS, 0), (EOS, 1)])
    if trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=eos, chat_template=template)


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**OPTIONS, **changes})


def write_lines(path: Path, rows: list) -> Path:
    """JSON lines; a row given as bytes is written as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def pairs(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}:", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(start, start + n)]
