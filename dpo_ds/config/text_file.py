"""Reads the small text files that a user names: run configs and DeepSpeed's JSON."""

from __future__ import annotations

import stat
from pathlib import Path

from dpo_ds.errors import ConfigError

LARGEST = 1 << 24  # bytes; a config of more is another file


def read_text(path: str | Path, key: str, missing: str = "no such file") -> str:
    """Returns the text of the file that `key` names.

    Raises:
        ConfigError: missing, no plain file (to read a FIFO may be to wait for ever), too large, or not UTF-8.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"--{key} {path}: is {_kind(found.st_mode)}, not a file; write its text into a file")
        if found.st_size > LARGEST:
            raise ConfigError(f"--{key} {path}: {found.st_size} bytes; a config has at most {LARGEST}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--{key} {path}: {missing}") from None
    except OSError as error:
        raise ConfigError(f"--{key} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--{key} {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
