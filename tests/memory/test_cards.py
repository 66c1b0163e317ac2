"""Cards by a device's name, by a user's, by numbers."""

import pytest

from dpo_ds.errors import UserError
from dpo_ds.memory.cards import CARDS, Card, card_named, card_of_device


@pytest.mark.parametrize(
    ("device", "known_as"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_devices_are_known_by_their_name(device, known_as):
    assert card_of_device(device) == CARDS[known_as]


def test_other_devices_are_not_known():
    for name in ("NVIDIA GeForce RTX 4090", "NVIDIA RTX A4000", "NVIDIA A10G"):
        assert card_of_device(name) is None


def test_users_name_cards_in_small_letters_or_give_numbers():
    assert card_named("h100") == Card(80_000_000_000, 989e12, 3.35e12)
    assert card_named("h100-nvl") == CARDS["H100 NVL"]
    assert card_named("96GB:400TFLOPS") == Card(96_000_000_000, 400e12)
    assert card_named("96GB:400TFLOPS:2.5TB/s") == Card(96_000_000_000, 400e12, 2.5e12)


@pytest.mark.parametrize("text", ["h1000", "96GB", "0GB:400TFLOPS", "96GB:0TFLOPS", "96GB:1TFLOPS:0TB/s", ""])
def test_what_is_no_card_costs_one_line(text):
    with pytest.raises(UserError, match="not a known card; one of b200, h200") as refused:
        card_named(text)
    assert "\n" not in str(refused.value)
