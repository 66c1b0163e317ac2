"""The GPUs that are known by name: how much each holds and how fast it multiplies. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_ds.errors import UserError


@dataclass(frozen=True)
class Card:
    """memory: bytes. peak: FLOP/s of dense bfloat16 products summed in float32. bandwidth: of its memory, bytes/s; None
    where a user has not given it.
    """

    memory: int
    peak: float
    bandwidth: float | None = None


def _card(gigabytes: float, teraflops: float, terabytes_a_second: float | None = None) -> Card:
    bandwidth = terabytes_a_second and terabytes_a_second * 1e12
    return Card(int(gigabytes * 1e9), teraflops * 1e12, bandwidth)


# By the words that the device's name contains; the first that fits is taken. From NVIDIA's data sheets of each product,
# SXM where the name does not say PCIe or NVL, a gigabyte as 10^9 bytes: what the driver shows differs by some percent.
CARDS = {
    "B200": _card(180, 2250, 8),
    "H200": _card(141, 989, 4.8),
    "H100 PCIe": _card(80, 756, 2),
    "H100 NVL": _card(94, 835, 3.9),
    "H100": _card(80, 989, 3.35),
    "H800": _card(80, 989, 3.35),
    "A100-40GB": _card(40, 312, 1.555),
    "A100": _card(80, 312, 2.039),
    "A800": _card(80, 312, 2.039),
    "L40S": _card(48, 362, 0.864),
    "L40": _card(48, 181, 0.864),
    "L4": _card(24, 121, 0.3),
    "A40": _card(48, 149.7, 0.696),
    "A10": _card(24, 125, 0.6),
}
_NUMBER = r"(\d+(?:\.\d+)?)"
_NUMBERS = re.compile(rf"{_NUMBER}GB:{_NUMBER}TFLOPS(?::{_NUMBER}TB/s)?", re.IGNORECASE)


def card_of_device(name: str) -> Card | None:
    """Returns the card of what torch.cuda.get_device_name says; None where the table does not know it."""
    return next((card for part, card in CARDS.items() if re.search(rf"\b{part}\b", name)), None)


def card_named(text: str) -> Card:
    """Returns the card that a user names ("h100", "h100-nvl") or gives by numbers ("96GB:400TFLOPS", and ":2TB/s" for
    the bandwidth of its memory).

    Raises UserError for any other text, and for a card of no memory or no speed.
    """
    named = {part.lower().replace(" ", "-"): card for part, card in CARDS.items()}
    if card := named.get(text.lower().replace(" ", "-")):
        return card
    found = _NUMBERS.fullmatch(text)
    numbers = [float(number) for number in found.groups() if number is not None] if found else [0]
    if all(number > 0 for number in numbers):
        return _card(*numbers)
    raise UserError(f"--gpu {text}: not a known card; one of {', '.join(named)}, or by numbers, as 96GB:400TFLOPS")
