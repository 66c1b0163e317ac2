"""The guides say what is there: their links, paths, keys and settings exist, and their commands pass the parsers that
will read them.
"""

import ast
import json
import re
import runpy
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from typing import Annotated, NoReturn

import pytest
import yaml
from pydantic import TypeAdapter

from dpo_ds import config, losses
from dpo_ds.commands import cli
from dpo_ds.data.formats import FORMATS, SUPERVISED
from tests.guides import FOLDERS, GUIDES, ROOT, Guide, read
from tests.readme_keys import GUIDE as KEYS_GUIDE
from tests.readme_keys import written
from tests.test_house import ORDER

KEYS = {key: field for settings in config.COMMANDS.values() for key, field in config.keys(settings).items()}
SECTIONS = {key.rsplit(".", depth)[0] for key in KEYS for depth in range(1, key.count(".") + 1)}
EVERY = pytest.mark.parametrize("guide", [read(path) for path in GUIDES], ids=lambda guide: guide.name)
README = read(ROOT / "README.md")


def test_the_table_of_keys_is_the_configs():
    text = KEYS_GUIDE.read_text(encoding="utf-8")
    assert written(text) == text, "run `python -m tests.readme_keys`"


@EVERY
def test_links_lead_somewhere(guide: Guide):
    for link in guide.links():
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (guide.path.parent / name).resolve() if name else guide.path
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in read(target).anchors(), link


def test_every_guide_is_reached_from_readme():
    reached, todo = set(), [README.path]
    while todo:
        guide = read(todo.pop())
        reached.add(guide.path)
        targets = ((guide.path.parent / link.partition("#")[0]).resolve() for link in guide.links())
        todo += [path for path in targets if path.suffix == ".md" and path not in reached]
    assert reached == set(GUIDES)


@EVERY
def test_files_it_names_are_there(guide: Guide):
    named = re.findall(rf"(?<![\w./-])(?:\.\./)*((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", guide.text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    ours = [name for name in guide.code() if re.fullmatch(r"\w+\.(sh|sbatch)|zero3_\w+\.json", name)]
    known = {path.name for folder in ("ds_configs", "launch_scripts") for path in (ROOT / folder).iterdir()}
    assert set(ours) <= known


def test_files_that_code_and_comments_name_are_there():
    """Whole paths alone: `dpo_ds/batch.py`, not `batch.py`."""
    suffixes = ("py", "sh", "sbatch", "yaml", "json")
    path_to_file = rf"(?<![\w./$-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:md|png|{'|'.join(suffixes)}))\b"
    wrong = []
    for source in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*")):
        if source.suffix[1:] in suffixes:
            named = re.findall(path_to_file, source.read_text(encoding="utf-8"))
            wrong += [f"{source.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert wrong == []


@EVERY
def test_keys_it_names_are_keys_and_take_the_values_it_gives(guide: Guide):
    """As in `train.max_steps`, or `--loss.wpo true`."""
    first = "|".join(section for section in SECTIONS if "." not in section)
    for code in guide.code():
        for key in re.findall(rf"(?<![\w./])(?:{first})(?:\.[a-z_]+)+(?!/)", code):
            is_file = key.rsplit(".", 1)[-1] in ("yaml", "json", "jsonl", "py", "parquet")
            assert is_file or key in KEYS or key in SECTIONS, code
        key, _, value = code.removeprefix("--").partition(" ")
        if key in KEYS and value:
            _takes(key, value.strip("'"))


def _takes(key: str, value: str) -> None:
    """Raises ValidationError where the key's type, choices or range do not allow the value."""
    given = yaml.safe_load(value) if value[0] in "[{" or value == "null" else value
    TypeAdapter(Annotated[KEYS[key].annotation, KEYS[key]]).validate_python(given)


def test_variables_that_guides_name_are_read():
    named = {name for path in GUIDES for name in re.findall(r"DPO_DS_[A-Z_]+", read(path).text)}
    code = "".join(path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert [name for name in named if f'"{name}"' not in code] == []


@EVERY
def test_blocks_are_what_they_say(guide: Guide):
    assert {block.language for block in guide.all_blocks()} <= {"", "sh", "yaml", "json", "python", "mermaid"}
    for block in guide.blocks("python"):
        ast.parse(block)
    for block in guide.blocks("json"):
        assert all(isinstance(json.loads(line), dict) for line in block.splitlines())
    for block in guide.blocks("yaml"):
        assert set(config.flatten(yaml.safe_load(block))) <= set(KEYS)


@EVERY
def test_commands_are_read_by_their_parsers(guide: Guide, tmp_path, monkeypatch):
    """In a folder where README's run.yaml lies; nothing is started."""
    for name in ("launch_scripts", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (run_yaml,) = README.blocks("yaml")
    (tmp_path / "run.yaml").write_text(run_yaml)
    monkeypatch.chdir(tmp_path)
    for words in guide.commands():
        _read(words, monkeypatch)


def _read(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "dpo-ds":
        cli.parse(rest)
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        given = parse_args(rest)
        _read(["python", *["-m"][: given.module], given.user_script, *given.user_args], monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        _read(["python", *["-m"][: given.module], given.training_script, *given.training_script_args], monkeypatch)
    elif program == "srun":
        _read(rest[rest.index("python") :], monkeypatch)
    elif program == "sbatch":
        script = next(index for index, word in enumerate(rest) if not word.startswith("-"))
        _read(rest[script:], monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "dpo_ds"]:
        cli.parse(rest[2:])
    elif program == "python":
        _read_by_argparse(rest, monkeypatch)
    elif program.startswith("launch_scripts/"):
        text = (ROOT / program).read_text()
        if "HOSTFILE COMMAND" in text:
            rest = rest[1:]
        if "RUN.YAML OUT" not in text:  # of a pipeline's own jobs the keys are tried by tests/two_hosts/test_slurm.py
            cli.parse(rest)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            name, is_variable, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.M), word
    elif program in ("docker", "kubectl", "sky"):
        files = [word for word in rest if word.startswith("launch_scripts/")]
        assert files and all((ROOT / file).is_file() for file in files), words
    elif program == "pip":
        extras = re.findall(r"\[(.+)\]", " ".join(rest))
        assert extras and all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
    else:
        assert program == "kill" or (ROOT / program).is_file(), program


class _WasRead(Exception):
    pass


def _read_by_argparse(words: list[str], monkeypatch) -> None:
    """`python -m MODULE ...` or `python FILE ...` as far as its own parser; where none reads, the test fails."""

    def stop(parser, argv=None, namespace=None) -> NoReturn:
        parse(parser, argv, namespace)
        raise _WasRead

    with monkeypatch.context() as patch:
        parse = ArgumentParser.parse_args
        patch.setattr(ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        with pytest.raises(_WasRead):
            if words[0] == "-m":
                assert find_spec(words[1]), words
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("folder", ["ds_configs", "launch_scripts", "launch_scripts/recipes"])
def test_files_to_choose_from_stand_in_their_guide(folder):
    there = {path.name for path in (ROOT / folder).iterdir() if path.is_file() and path.suffix != ".md"}
    assert there <= set(read(ROOT / folder / "README.md").links())


def test_tables_of_losses_and_formats_are_whole():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| \[", read(ROOT / "dpo_ds/training/README.md").text, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(losses.LOSSES)
    rows = re.findall(r"^\| `(\w+)`(?: \(`sft`\))? \|", read(ROOT / "dpo_ds/data/README.md").text, re.M)
    assert set(rows) == {*FORMATS, *SUPERVISED}


def test_contributing_has_a_line_for_every_entry_in_the_order_of_imports():
    (tree,) = [block for block in read(ROOT / "CONTRIBUTING.md").blocks("") if block.startswith("dpo_ds/\n")]
    told = re.findall(r"^  ([\w.]+/?) ", tree, re.M)
    assert [name.removesuffix("/").removesuffix(".py") for name in told] == [name for name in ORDER if name[0] != "_"]
    assert [name for name in told if not (ROOT / "dpo_ds" / name).exists()] == []
