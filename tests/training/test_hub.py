"""Pushing to the Hub, here a stand-in on loopback: what is refused before the run, and what costs a line at its end."""

import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from pydantic import ValidationError

from dpo_ds.config import HubSection
from dpo_ds.errors import ConfigError
from dpo_ds.training import hub
from dpo_ds.training.hub import Push, prepare
from tests.stand_ins.http import address, serving
from tests.stand_ins.hub import new_hub

TO = HubSection(push="org/name", timeout=30)
BY_HAND = "hf upload org/name {} . --private"


@pytest.fixture
def there(monkeypatch, tmp_path):
    """The Hub, and a token that may write to it."""
    own = new_hub()
    with serving(own) as server:
        monkeypatch.setattr(constants, "ENDPOINT", address(server))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield own


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text("---\ntags: [dpo_ds]\n---\n# A model\n")
    return folder


def outcome(push: Push, is_stopped=lambda: False) -> str:
    return push.outcome(lambda: None, is_stopped)


def test_a_folder_arrives_whole_in_a_private_repository(there, model):
    assert prepare("org/name", True, "hub.push") == []
    assert prepare("org/name", True, "hub.push") == [], "it may be there already"
    assert outcome(Push(model, TO)) == f"pushed to {constants.ENDPOINT}/org/name"
    assert there.private == {"org/name": True}
    assert there.files["org/name"] == {path.name: path.read_bytes() for path in model.iterdir()}
    assert list(map(len, there.blobs.values())) == [10240], "weights go by LFS"
    outcome(Push(model, HubSection(push="org/public", private=False)))
    assert there.private["org/public"] is False


@pytest.mark.parametrize(
    "case, parts",
    [
        ("no token", ["there is no token", "hf auth login", "HF_TOKEN"]),
        ("a stranger's", ["refuses", "401", "Invalid credentials"]),
        ("others/name", ["refuses", "403", "don't have the rights"]),
        ("org/public", ["is public", "private false"]),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_run(there, monkeypatch, case, parts):
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if case == "a stranger's":
        monkeypatch.setenv("HF_TOKEN", "stranger")
    there.private["org/public"] = False
    name = case if "/" in case else "org/name"
    with pytest.raises(ConfigError) as refusal:
        prepare(name, True, "hub.push")
    assert str(refusal.value).startswith(f"--hub.push {name}: ")
    assert [part for part in parts if part not in str(refusal.value)] == []


def test_a_hub_that_is_not_there_costs_a_line(there, model, monkeypatch):
    there.is_down = True
    (line,) = prepare("org/name", True, "hub.push")
    assert "cannot be asked now (HTTP 503: maintenance); the push at the end is tried all the same" in line
    line = outcome(Push(model, TO))
    assert line == f"{model} was not pushed to org/name (HTTP 503: maintenance); {BY_HAND.format(model)}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (line,) = prepare("org/name", True, "hub.push")
    assert "HF_HUB_OFFLINE is set" in line
    assert "OfflineModeIsEnabled" in (line := outcome(Push(model, TO))) and BY_HAND.format(model) in line


def test_the_end_of_a_run_waits_so_long_and_no_longer(model, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(hub, "push", lambda *_: never.wait(60))
    signs = []
    late = Push(model, TO.model_copy(update={"timeout": 0.2}))
    line = late.outcome(lambda: signs.append(0), lambda: False)
    assert "(not done after 0.2 s)" in line and BY_HAND.format(model) in line and signs
    assert "(the run was told to stop)" in outcome(late, lambda: True)
    never.set()


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/", "-org/name", "org/na me", "org/a..b", "o/" + "n" * 99])
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(ValidationError, match="OWNER/NAME"):
        HubSection(push=name)
