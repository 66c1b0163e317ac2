"""README says what the code does."""

import re
from pathlib import Path

from tests.readme_keys import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_keys_is_the_configs():
    assert table() in README, "run `python -m tests.readme_keys` and paste its output into README"


def test_every_file_it_names_is_there():
    named = set(re.findall(r"(?:ds_configs|dpo_ds|launch_scripts|tests)/[\w./-]*\w\.\w+", README))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_the_two_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
