"""Takes the guides apart, README.md and every other Markdown file: headings, links, blocks of commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("dpo_ds", "ds_configs", "launch_scripts", "tests")
GUIDES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)


class Block(NamedTuple):
    """What stands between two fences; language is "" where it is what a program prints."""

    language: str
    text: str


class Guide(NamedTuple):
    path: Path
    text: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def blocks(self, language: str) -> list[str]:
        return [block.text for block in self.all_blocks() if block.language == language]

    def all_blocks(self) -> list[Block]:
        found = _BLOCK.findall(self.text)
        return [Block(language, re.sub(f"^{indent}", "", text, flags=re.M)) for indent, language, text in found]

    @property
    def prose(self) -> str:
        return _BLOCK.sub("", self.text)

    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", self.prose)

    def anchors(self) -> set[str]:
        """What `#...` may name, as GitHub makes it of a heading: lower case, punctuation gone, hyphens for spaces."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def code(self) -> list[str]:
        """Every `inline code`."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def commands(self) -> list[list[str]]:
        """The words of every command in a block of shell, without comments and without VARIABLE=value before them."""
        lines = "".join(self.blocks("sh")).replace("\\\n", " ").splitlines()
        found = []
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if ">" in words:  # the shell's
                words = words[: words.index(">")]
            found += [words] if words else []
        return found


def read(path: Path) -> Guide:
    return Guide(path, path.read_text(encoding="utf-8"))
