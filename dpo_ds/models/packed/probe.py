"""Notes what a model asks of packed attention while somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class UnsupportedAttention(RuntimeError):
    """The model asks of attention what the packed one does not implement, or calls it without segments."""


@dataclass
class AttentionProbe:
    """Records what a model asked of packed attention while `probe_attention` was open.

    backends: one name per call. refusals: what it asked for in vain. masked, windowed: the local spans its masks were
    meant to have (transformers' `local_size`) and those it handed to attention itself.
    """

    backends: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    masked: set[int] = field(default_factory=set)
    windowed: set[int] = field(default_factory=set)


_probe: AttentionProbe | None = None


def open_probe() -> AttentionProbe | None:
    return _probe


@contextmanager
def probe_attention() -> Iterator[AttentionProbe]:
    """Records calls while it is open, and notes what is unsupported instead of raising: an exception in the middle of a
    forward would leave ZeRO-3 with gathered parameters. Not for nesting.
    """
    global _probe
    _probe = AttentionProbe()
    try:
        yield _probe
    finally:
        _probe = None


def refuse(reason: str) -> None:
    if _probe is None:
        raise UnsupportedAttention(f"packed attention: {reason}; train with --train.layout padded")
    _probe.refusals.append(reason)
