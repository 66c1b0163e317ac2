"""Families of transformers, each as a user would train it: the guide's list says what becomes of it."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, GUIDE, listed, try_all

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return try_all(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(found, family):
    seen = found[family]
    assert seen["layout"] in ("packed", "padded", "refused"), seen["why"]
    if seen["layout"] == "refused":
        assert seen["why"].count("\n") == 0
        return
    assert seen["error"] <= 1e-5 * max(1, seen["largest"])
    assert seen["norm"] > 0 and seen["moved"] > 1e-3
    assert seen["missing"] == seen["unexpected"] == [] and seen["same_names"]
    assert seen["reopened_error"] <= 1e-5 * max(1, 2 * seen["largest"])


def test_the_guide_lists_what_was_seen(found):
    assert GUIDE.read_text(encoding="utf-8").endswith(listed(found))
    assert sum(seen["layout"] != "refused" for seen in found.values()) >= 40
