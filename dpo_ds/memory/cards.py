"""The GPUs that are known by name: how much each holds and how fast it multiplies. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_ds.errors import UserError


@dataclass(frozen=True)
class Card:
    """memory: bytes. peak: FLOP/s of dense bfloat16 products summed in float32."""

    memory: int
    peak: float


def _card(gigabytes: float, teraflops: float) -> Card:
    return Card(int(gigabytes * 1e9), teraflops * 1e12)


# By the words that the device's name contains; the first that fits is taken. From NVIDIA's data sheets of each product,
# SXM where the name does not say PCIe or NVL, a gigabyte as 10^9 bytes: what the driver shows differs by some percent.
CARDS = {
    "B200": _card(180, 2250),
    "H200": _card(141, 989),
    "H100 PCIe": _card(80, 756),
    "H100 NVL": _card(94, 835),
    "H100": _card(80, 989),
    "H800": _card(80, 989),
    "A100-40GB": _card(40, 312),
    "A100": _card(80, 312),
    "A800": _card(80, 312),
    "L40S": _card(48, 362),
    "L40": _card(48, 181),
    "L4": _card(24, 121),
    "A40": _card(48, 149.7),
    "A10": _card(24, 125),
}
_NUMBERS = re.compile(r"(\d+(?:\.\d+)?)GB:(\d+(?:\.\d+)?)TFLOPS", re.IGNORECASE)


def card_of_device(name: str) -> Card | None:
    """Returns the card of what torch.cuda.get_device_name says; None where the table does not know it."""
    return next((card for part, card in CARDS.items() if re.search(rf"\b{part}\b", name)), None)


def card_named(text: str) -> Card:
    """Returns the card that a user names ("h100", "h100-nvl") or gives by numbers ("96GB:400TFLOPS").

    Raises UserError for any other text, and for a card of no memory or no speed.
    """
    named = {part.lower().replace(" ", "-"): card for part, card in CARDS.items()}
    if card := named.get(text.lower().replace(" ", "-")):
        return card
    numbers = _NUMBERS.fullmatch(text)
    if numbers and all(float(number) > 0 for number in numbers.groups()):
        return _card(*map(float, numbers.groups()))
    raise UserError(f"--gpu {text}: not a known card; one of {', '.join(named)}, or by numbers, as 96GB:400TFLOPS")
