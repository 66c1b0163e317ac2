"""What `load_scorer` makes of a spec, and the line for each mistake in a scoring function or a reward model."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from dpo_ds.cluster.signals import Stopped, taken
from dpo_ds.demo.tiny import save_tiny_model, tiny_config, train_tokenizer
from dpo_ds.errors import UserError
from dpo_ds.models.scoring import load_scorer

FUNCTIONS = Path(__file__).with_name("scoring_functions.py").read_text()
PROMPTS, COMPLETIONS = ["ab", "abcd", "a"], ["fine", "bad", "very fine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "scoring_functions.py").write_text(FUNCTIONS)
    (folder / "broken_functions.py").write_text("import no_such_package_at_all\n")
    (folder / "failing_functions.py").write_text("1 / 0\n")
    (folder / "leaving_functions.py").write_text("raise SystemExit(2)\n")
    return folder


@pytest.fixture(autouse=True)
def _in_that_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def test_functions_and_patterns_give_one_float_each():
    scores = load_scorer("scoring_functions:length", "sample.score", 60)(PROMPTS, COMPLETIONS)
    assert scores.dtype == np.float64 and scores.tolist() == [4, 3, 9]
    assert load_scorer("scoring_functions:tensor", "sample.score", 60)(PROMPTS, COMPLETIONS).tolist() == [1, 2, 0.5]
    assert load_scorer("regex:f.ne$", "sample.score", 60)(PROMPTS, COMPLETIONS).tolist() == [1, 0, 1]
    assert load_scorer("scoring_functions:number", "sample.score", 60)([], []).tolist() == []


def test_the_identity_changes_with_the_functions_file(folder):
    before = load_scorer("scoring_functions:length", "sample.score", 60).identity()
    assert before == load_scorer("scoring_functions:length", "sample.score", 60).identity()
    (folder / "scoring_functions.py").write_text(FUNCTIONS + "\n")
    assert load_scorer("scoring_functions:length", "sample.score", 60).identity() != before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("short", ["scoring_functions:short", "1 scores for 3 completions"]),
        ("text", ["scoring_functions:text returned '123'", "3 numbers"]),
        ("by_row", ["scoring_functions:by_row", "3 numbers"]),
        ("number", ["scoring_functions:number", "3.5", "3 numbers"]),
        ("nan", ["scoring_functions:nan", "nan", "row 1", "'bad'", "finite"]),
        ("huge", ["scoring_functions:huge", "1000", "row 0", "finite"]),
        ("words", ["scoring_functions:words", "'good'", "row 0"]),
        ("one_by_one", ["scoring_functions:one_by_one", "KeyError", "no such", "row 1", "'bad'"]),
        ("leaves", ["scoring_functions:leaves raised SystemExit: no licence"]),
        ("no_length", ["scoring_functions:no_length returned an object that raised KeyError: 'length'", "3 numbers"]),
        ("no_items", ["scoring_functions:no_items returned an object that raised KeyError: 'items'"]),
        ("endless", ["scoring_functions:endless", "of length 3 that holds another number of scores"]),
        ("no_number", ["scoring_functions:no_number returned an object that raised SystemExit: 0"]),
        ("no_text", ["scoring_functions:no_text returned an object that raised KeyError: 'text'"]),
        ("mute", ["scoring_functions:mute raised Mute (row 0"]),
        ("imaginary", ["scoring_functions:imaginary returned 2j for row 1", "finite"]),
        ("imaginary_array", ["scoring_functions:imaginary_array returned", "1+0j", "row 0", "finite"]),
        ("imaginary_tensor", ["scoring_functions:imaginary_tensor returned", "1+0j", "row 0", "finite"]),
        ("coroutine", ["scoring_functions:coroutine returned <coroutine object", "3 numbers"]),
        ("sleeps", ["sleeps is async", "plain function"]),
        ("interrupts", ["scoring_functions:interrupts raised KeyboardInterrupt (row 0"]),
        ("generator_exits", ["scoring_functions:generator_exits raised GeneratorExit: bye"]),
        ("forks", ["scoring_functions:forks forked", "os._exit"]),
        ("forks_and_fails", ["scoring_functions:forks_and_fails forked"]),
        ("together", ["scoring_functions:together", "ValueError: one at a time", "3 rows together"]),
    ],
)
def test_a_function_that_fails_is_one_line(name, parts):
    with pytest.raises(UserError) as mistake, taken():
        load_scorer(f"scoring_functions:{name}", "sample.score", 60)(PROMPTS, COMPLETIONS)
    line = str(mistake.value)
    assert "\n" not in line and [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("name", ["signalled", "swallows"])
def test_a_signal_that_comes_within_a_function_is_not_the_functions_mistake(name):
    with pytest.raises(Stopped, match="SIGTERM"), taken():
        load_scorer(f"scoring_functions:{name}", "sample.score", 60)(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("name", ["never_returns", "never_returns_and_catches_all"])
def test_a_function_that_does_not_return_is_one_line(name):
    started = time.monotonic()
    with pytest.raises(UserError) as mistake:
        load_scorer(f"scoring_functions:{name}", "evaluate.score", 0.2)(PROMPTS, COMPLETIONS)
    rule = "did not return within 0.2 s (evaluate.score_timeout)"
    assert str(mistake.value) == f"scoring_functions:{name} {rule}"
    assert time.monotonic() - started < 10


def test_a_pattern_that_tries_ever_more_ways_is_one_line():
    """(a+)+$ on 40 a's and a b tries 2^40 ways."""
    rule = r"regex:\(a\+\)\+\$ did not end within 0.2 s \(sample.score_timeout\); it was at row 1, 'aa"
    with pytest.raises(UserError, match=rule):
        load_scorer("regex:(a+)+$", "sample.score", 0.2)(PROMPTS, ["a", "a" * 40 + "b", "a"])
    assert signal.getitimer(signal.ITIMER_REAL)[0] in (0, pytest.approx(300, abs=300)), "the alarm is off again"


def test_a_child_that_ends_itself_is_nobodys_business():
    assert load_scorer("scoring_functions:has_a_child", "sample.score", 60)(PROMPTS, COMPLETIONS).tolist() == [0, 0, 0]


PROGRAMS = {
    "closes": ("import sys; sys.stdout.close()", 2, "mine:score closed stdout, which it has to leave open"),
    "closes both": ("import os; os.close(1); os.close(2)", 2, "mine:score closed stdout and stderr"),
    "threads": ("import threading, time; threading.Thread(target=time.sleep, args=[99]).start()", 0, "done"),
    "deaf": ("import signal, time; signal.pthread_sigmask(0, [14]); time.sleep(99)", 2, "dpo-ds: error: mine:score"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_process_ends_well_whatever_a_function_does_to_it(name, tmp_path):
    """deaf: no alarm reaches it; a thread of ours ends the process then."""
    body, code, said = PROGRAMS[name]
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions):\n    {body}\n    return [0.0]\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done
    assert "Traceback" not in done.stderr


PROGRAM = """
import sys

from dpo_ds.__main__ import end
from dpo_ds.cluster import foreign, terminal
from dpo_ds.errors import UserError

terminal.protect()
foreign.LAST_SECONDS = 0.5
import mine
try:
    with foreign.guarded("mine:score", foreign.Limit(0.2 if "sleep(99)" in open("mine.py").read() else 60, "key")):
        mine.score(["p"], ["c"])
except UserError as mistake:
    print(f"error: {mistake}", file=sys.stderr)
    end(2)
print("done")
end(0)
"""


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("no_such_module:score", ["no module no_such_module", "PYTHONPATH"]),
        ("scoring_functions:lenght", ["lenght is not there", "did you mean 'length'?"]),
        ("scoring_functions:constant", ["constant is not a function"]),
        ("scoring_functions.py:length", ["write scoring_functions:length"]),
        ("broken_functions:score", ["needs no_such_package_at_all"]),
        ("failing_functions:score", ["importing failing_functions raised ZeroDivisionError"]),
        ("leaving_functions:score", ["importing leaving_functions raised SystemExit: 2"]),
        ("regex:(", ["not a regular expression"]),
        ("./nowhere", ["does not exist", "module:function"]),
        (".", ["no config.json", "module:function"]),
    ],
)
def test_a_spec_that_names_nothing_is_one_line(spec, parts):
    with pytest.raises(UserError) as mistake:
        load_scorer(spec, "sample.score", 60)
    line = str(mistake.value)
    assert line.startswith(f"--sample.score {spec}: ") and "\n" not in line
    assert [part for part in parts if part not in line] == [], line


@pytest.fixture(scope="module")
def made(folder):
    """A random classifier of one label and its tokenizer, whose EOS is token 1 and pad token 0."""
    tokenizer = train_tokenizer(["good bad fine and long"], vocab_size=270)
    config = tiny_config("llama", len(tokenizer), hidden=16, layers=1, eos_token_id=1, num_labels=1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    save_tiny_model(folder / "reward", tokenizer, model)
    return tokenizer, model.eval()


class TestRewardModel:
    TEXTS = ["good bad and rather long", "bad", "good"]

    def test_it_reads_the_last_token_and_subtracts_the_mean(self, folder, made):
        tokenizer, model = made
        wanted = []
        for text in self.TEXTS:  # one by one, without padding
            ids = torch.tensor([tokenizer("p:" + text)["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                wanted.append(model.score(model.model(ids).last_hidden_state)[0, -1, 0].item())
        scorer = load_scorer(str(folder / "reward"), "sample.score", 60)
        assert scorer(["p:"] * 3, self.TEXTS) == pytest.approx(wanted, abs=1e-6)
        path = folder / "reward" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"reward_mean": 0.25}))
        centred = load_scorer(str(folder / "reward"), "sample.score", 60)
        assert centred(["p:"] * 3, self.TEXTS) == pytest.approx(np.array(wanted) - 0.25, abs=1e-6)
        assert centred.identity() != scorer.identity()

    def test_a_text_is_cut_only_where_the_whole_does_not_fit(self, folder, made, capsys):
        """20 positions: 14 of prompt, 3 of completion and EOS fit; 21 are cut to the last tokens of the prompt."""
        tokenizer, model = made
        shutil.copytree(folder / "reward", folder / "short")
        path = folder / "short" / "config.json"
        settings = {"max_position_embeddings": 20, "reward_mean": 0.0}
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        scorer = load_scorer(str(folder / "short"), "sample.score", 60)

        def by_hand(ids):
            with torch.no_grad():
                return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()

        eos, letters = tokenizer.eos_token_id, tokenizer("qwrtypsdfghjklzxcvbm")["input_ids"]
        assert len(letters) == 20
        prompt, completion = "qwrtypsdfghjkl", "zxc"
        assert scorer([prompt], [completion]) == pytest.approx([by_hand([*letters[:17], eos])], abs=1e-6)
        assert capsys.readouterr().out == ""
        long = scorer([prompt + "zxc"], ["vbm"])
        assert long == pytest.approx([by_hand([*letters[1:20], eos])], abs=1e-6)
        assert "cuts a text of 21 tokens, 'vbm', and others longer than its 20 positions" in capsys.readouterr().out
        endless = scorer(["q"], ["w" * 40])
        assert endless == pytest.approx([by_hand([letters[0], *[letters[1]] * 19])], abs=1e-6)
        assert capsys.readouterr().out == "", "told once"

    def test_weights_that_are_missing_are_not_drawn_at_random(self, folder, made):
        shutil.copytree(folder / "reward", folder / "headless")
        file = folder / "headless" / "model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if name != "score.weight"}
        save_file(kept, file, {"format": "pt"})
        with pytest.raises(UserError, match="lacks the weights score.weight"):
            load_scorer(str(folder / "headless"), "sample.score", 60)(["p"], ["c"])
        file.unlink()
        with pytest.raises(UserError, match="--sample.score .*headless: no weights"):
            load_scorer(str(folder / "headless"), "sample.score", 60)

    def test_other_models_are_refused(self, folder, made):
        tokenizer, _ = made
        config = tiny_config("llama", len(tokenizer), hidden=16, layers=1, eos_token_id=1, num_labels=3)
        save_tiny_model(folder / "three", tokenizer, AutoModelForSequenceClassification.from_config(config))
        with pytest.raises(UserError, match="has 3 labels; a reward model has one"):
            load_scorer(str(folder / "three"), "sample.score", 60)
        path = folder / "three" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
        with pytest.raises(UserError, match="LlamaForCausalLM, no sequence classification model; dpo-ds reward"):
            load_scorer(str(folder / "three"), "sample.score", 60)
