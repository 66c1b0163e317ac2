"""The table of keys in dpo_ds/config/README.md, made from dpo_ds.config: `python -m tests.readme_keys` writes it there
anew; tests/test_readme.py keeps it true.
"""

import re
from pathlib import Path

from dpo_ds import config
from dpo_ds.commands.cli import default_of

GUIDE = Path(__file__).parents[1] / "dpo_ds/config/README.md"
HEAD = "| key | type and range | default | meaning |\n| --- | --- | --- | --- |\n"


def table() -> str:
    """One Markdown row a key, all commands' keys in the order of declaration."""
    rows = {}
    for settings in config.COMMANDS.values():
        for key, field in config.keys(settings).items():
            default = "required" if field.is_required() else f"`{default_of(field)}`"
            rows.setdefault(key, f"| `{key}` | `{config.kind(field)}` | {default} | {field.description} |")
    return HEAD + "\n".join(rows.values()) + "\n"


def written(guide: str) -> str:
    """The guide's text with the table as it should be."""
    before, rest = guide.split(HEAD)
    return before + table() + re.sub(r"\A(\|.*\n)*", "", rest)


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
