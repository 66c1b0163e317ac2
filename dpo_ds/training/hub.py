"""Pushes a model's folder to the Hugging Face Hub. A failure is a line, with the command that does it by hand."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from dpo_ds.cluster.foreign import told
from dpo_ds.cluster.shared_files import in_background
from dpo_ds.config import HubSection
from dpo_ds.errors import ConfigError

LOOK_SECONDS = 0.5  # between two looks at an upload that is waited for
REFUSALS = (400, 401, 403)  # of HTTP: asking again will not help


def by_hand(folder: Path, repository: str, private: bool) -> str:
    """Returns what a user types to push `folder`."""
    privacy = "--private" if private else "--no-private"
    return shlex.join(["hf", "upload", repository, str(folder), ".", privacy])


def check_token(repository: str, key: str) -> None:
    """Raises ConfigError where a push cannot come to anything. key: by which the user gave the repository."""
    if not constants.HF_HUB_OFFLINE and get_token() is None:
        remedy = f"hf auth login, set HF_TOKEN, or leave --{key} out"
        raise ConfigError(f"--{key} {repository}: there is no token for the Hub; {remedy}")


def prepare(repository: str, private: bool, key: str) -> list[str]:
    """Makes the repository before the work begins: at its end it would be too late to hear that it may not be made.

    key: by which the user gave it. Returns lines for the user: a Hub that cannot be reached now may be there later.

    Raises:
        ConfigError: no token, or one that may not write there; a public repository where a private one is wanted.
    """
    given = f"--{key} {repository}"
    if constants.HF_HUB_OFFLINE:
        return [f"{given}: HF_HUB_OFFLINE is set, so nothing is pushed from here; the end has the command to do it"]
    check_token(repository, key)
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        is_public = private and not api.model_info(repository).private
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSALS:
            raise ConfigError(f"{given}: the Hub refuses ({words_of(error)})") from None
        return [f"{given}: the Hub cannot be asked now ({words_of(error)}); the push at the end is tried all the same"]
    if is_public:
        raise ConfigError(f"{given}: this repository is public; push there with private false, or name another one")
    return []


def push(folder: Path, repository: str, private: bool) -> str:
    """Makes the repository where there is none, and commits the folder's files; returns the address.

    Raises whatever huggingface_hub does.
    """
    api = HfApi()
    made = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dpo-ds")
    return str(made)


class Push:
    """Pushes in the background, from the moment it is made."""

    def __init__(self, folder: Path, section: HubSection):
        self._folder, self._section = folder, section
        disable_progress_bars()
        self._pushing = in_background(partial(push, folder, section.push, section.private))

    def outcome(self, progress: Callable[[], None], is_stopped: Callable[[], bool]) -> str:
        """Waits for the end, for hub.timeout at the most or until the run is told to stop; returns a line for the user.

        progress(): told while it waits.
        """
        deadline = time.monotonic() + self._section.timeout
        while not self._pushing.done() and time.monotonic() < deadline and not is_stopped():
            progress()
            futures.wait([self._pushing], LOOK_SECONDS)
        if not self._pushing.done():
            why = "the run was told to stop" if is_stopped() else f"not done after {self._section.timeout:g} s"
        elif error := self._pushing.exception():
            why = words_of(error)
        else:
            return f"pushed to {self._pushing.result()}"
        return failure(self._folder, self._section.push, self._section.private, why)


def failure(folder: Path, repository: str, private: bool, why: str) -> str:
    """Words a push that came to nothing."""
    return f"{folder} was not pushed to {repository} ({why}); {by_hand(folder, repository, private)}"


def words_of(error: BaseException) -> str:
    """Returns the Hub's own words where there are some."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}: {error.server_message or type(error).__name__}"
    return told(error)
