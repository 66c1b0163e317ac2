"""`dpo-ds --completion`: what a shell offers."""

import subprocess
import sys

import pytest

from dpo_ds.commands import cli

ASK = """
source {script}
function=$(complete -p dpo-ds | sed "s/.*-F \\([^ ]*\\).*/\\1/")
offered() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $function; echo "${{COMPREPLY[@]}}"; }}
offered dpo-ds tr
offered dpo-ds train --train.sched
offered dpo-ds train --train.layout ""
offered dpo-ds export --merge ""
offered dpo-ds sft --config {script}
"""


def test_bash_offers_commands_keys_choices_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--completion", "bash"])
    script = tmp_path / "dpo-ds.bash"
    script.write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "-c", ASK.format(script=script)], capture_output=True, text=True, timeout=60)
    expected = ["train", "--train.schedule", "packed padded", "true false", str(script)]
    assert (end.value.code, done.stdout.splitlines()) == (0, expected), done.stderr


def test_it_brings_no_torch_in_and_other_shells_are_a_mistake(capsys):
    code = "import sys; from dpo_ds.commands import cli\ntry: cli.main(['--completion', 'zsh'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--train.schedule" in done.stdout, done.stderr
    assert cli.main(["--completion", "ksh"]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err
