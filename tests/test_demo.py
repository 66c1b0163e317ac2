"""The demo's corpus keeps its rule, its tiny models are real Hugging Face folders, and a job's end is told truly."""

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.demo import __main__ as demo
from dpo_ds.demo import corpus, job, report, tiny

PROMPT = "Write a positive review of the Nova tent that mentions the price.\nReview:"


def test_score_counts_the_demands_that_are_met():
    assert corpus.score(PROMPT, " The Nova tent is great. Its price is lovely. Buy it.") == 1.0
    assert corpus.met(PROMPT, " The Nova lamp is great. Its price is lovely. Buy it.") == {
        "product": False,
        "sentiment": True,
        "feature": True,
        "no repetition": True,
    }
    assert corpus.score(PROMPT, " The Nova tent is great. Its price is awful. Buy it.") == 0.75  # moods contradict
    assert corpus.score(PROMPT, " The Nova tent is awful. Its weight is awful. Its weight is awful.") == 0.25
    assert corpus.score(PROMPT, "") == 0.0


def test_a_text_of_another_kind_has_no_score():
    with pytest.raises(ValueError, match="no instruction of the demo's grammar"):
        corpus.score("Tell me a joke.", " No.")


def test_every_pair_breaks_exactly_one_demand_and_all_of_them_occur():
    broken = []
    for row in corpus.preference_rows(400, seed=3):
        assert corpus.score(row["prompt"], row["chosen"]) == 1.0
        failed = [name for name, met in corpus.met(row["prompt"], row["rejected"]).items() if not met]
        assert len(failed) == 1, row
        broken += failed
    counts = {name: broken.count(name) for name in corpus.DEMANDS}
    assert min(counts.values()) > 60, counts  # 100 expected of each, standard deviation 9


def test_held_out_instructions_are_never_trained_on():
    asked = {corpus.Demand.parse(row["prompt"]) for row in corpus.preference_rows(1500, seed=1)}
    held_out = {corpus.Demand.parse(row["prompt"]) for row in corpus.preference_rows(300, seed=2, held_out=True)}
    assert not asked & held_out
    assert held_out <= corpus.HELD_OUT and len(corpus.HELD_OUT) == 6 * 8 * 2 * 8 // 8


def test_rows_depend_on_the_seed_alone(tmp_path):
    corpus.write_jsonl(tmp_path / "a", corpus.preference_rows(20, seed=5))
    corpus.write_jsonl(tmp_path / "b", corpus.preference_rows(20, seed=5))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(corpus.preference_rows(20, seed=5)) != list(corpus.preference_rows(20, seed=6))


def test_half_of_the_written_reviews_are_flawed():
    rows = list(corpus.written_rows(400, seed=5))
    scores = corpus.scores(*([row[key] for row in rows] for key in ("prompt", "completion")))
    assert set(scores) == {0.75, 1.0} and 160 < scores.count(1.0) < 240  # 200 expected, standard deviation 10


def test_prompts_come_once_and_held_out_ones_nowhere_else():
    asked = [row["prompt"] for row in corpus.prompt_rows(300, seed=1)]
    held_out = [row["prompt"] for row in corpus.prompt_rows(100, held_out=True)]
    assert len(set(asked)) == len(asked) == 300 and len(set(held_out)) == 100
    assert not {corpus.Demand.parse(prompt) for prompt in asked} & corpus.HELD_OUT
    assert {corpus.Demand.parse(prompt) for prompt in held_out} <= corpus.HELD_OUT


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizer_survives_its_folder(tmp_path, bos):
    text = "Ein kurzer Text, naïve ☃."
    tokenizer = tiny.train_tokenizer(["Ein kurzer Text."] * 3, 300, bos=bos)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) <= 300
    ids = again(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert (ids[0] == again.bos_token_id) == bos
    assert again.eos_token_id not in ids
    assert again.decode(ids, skip_special_tokens=True) == text
    assert again.eos_token == tiny.EOS and again.pad_token == tiny.PAD


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tiny_models_open_and_run(tmp_path, family):
    tokenizer = tiny.train_tokenizer(["a b c"], 260)
    config = tiny.tiny_config(family, len(tokenizer), hidden=32, **tiny.special_ids(tokenizer))
    folder = tiny.save_tiny_model(tmp_path, tokenizer, tiny.random_model(config, seed=1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == family
    assert model.num_parameters() < 100_000
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("a b c")["input_ids"]])).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_random_models_leave_the_callers_rng_alone():
    tokenizer = tiny.train_tokenizer(["a"], 260)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (tiny.tiny_llama(tokenizer, hidden=32, seed=seed) for seed in (0, 0))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def _launcher(folder, body: str):
    """Stands for the deepspeed program: a script that ignores its arguments."""
    path = folder / "deepspeed"
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, subprocess, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def _status(state: str, **fields) -> str:
    status = {"state": state, "reason": "", "step": 0, "exit_code": None} | fields
    return f"os.makedirs('run', exist_ok=True); open('run/STATUS.json', 'w').write({json.dumps(status)!r})"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (_status("running", step=0) + "; sys.exit(247)", ["a rank was killed by SIGKILL", "running, step 0"]),
        (_status("failed", step=7, reason="loss is nan") + "; sys.exit(1)", ["exit code 1", "step 7: loss is nan"]),
        ("os.kill(os.getpid(), signal.SIGTERM)", ["the launcher was killed by SIGTERM", "before rank 0 began"]),
        (_status("running", step=3), ["before its work was done", "running, step 3"]),
    ],
)
def test_a_failed_job_is_told_with_its_log_and_status(tmp_path, monkeypatch, capfd, body, told):
    monkeypatch.chdir(tmp_path)
    path = _launcher(tmp_path, "print('out of the rank', flush=True)\n" + body)
    monkeypatch.setattr(job, "launcher", lambda: path)
    with pytest.raises(job.JobFailed) as failure:
        job.run("train", {"loss.beta": 0.1}, tmp_path / "run")
    message = str(failure.value)
    for part in [*told, "`dpo_ds train`", "--loss.beta 0.1", str(tmp_path / "run.log")]:
        assert part in message
    assert (tmp_path / "run.log").read_text() == "out of the rank\n"
    assert "out of the rank" in capfd.readouterr().out


def test_a_job_that_is_done_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _launcher(tmp_path, _status("done"))
    monkeypatch.setattr(job, "launcher", lambda: path)
    job.run("sft", {}, tmp_path / "run")


def test_interrupting_the_demo_ends_what_the_launcher_started(tmp_path, monkeypatch):
    child = "import time; time.sleep(600)"
    body = (
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "open('pid', 'w').write(str(child.pid)); print('started', flush=True); child.wait()"
    )
    monkeypatch.chdir(tmp_path)
    argv = [_launcher(tmp_path, body)]

    class Interrupted:
        buffer = property(lambda self: self)

        def write(self, line):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        job._teed(argv, tmp_path / "log")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20  # a signal that was sent is acted on at the process's next turn on a core
    while (alive := _is_alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_demo_empties_only_its_own_folder(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert demo.main(["--to", str(tmp_path)]) == 1
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_table_and_completions_come_from_the_evaluation(tmp_path):
    estimate = {"mean": 0.75, "standard_error": 0.01}
    models = [
        {"name": name, "samples": {"kl": {"mean": kl, "standard_error": 0.5}, "reward": estimate | {"mean": reward}}}
        for name, kl, reward in (("reference", 0.0, 0.75), ("DPO", 3.0, 0.95))
    ]
    evaluation = {"reference": models[0], "baseline": None, "policies": models[1:]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [
        {"model": model, "row": row, "draw": draw, "prompt": f"P{row}\nReview:", "completion": f" {model} {row} {draw}",
         "reward": reward}
        for model, reward in (("reference", 0.5), ("DPO", 1.0)) for row in range(2) for draw in range(2)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "completions.parquet")
    lines = report.table(tmp_path).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["SFT", "DPO"] and "0.950" in lines[3] and "3.000" in lines[3]
    assert report.before_and_after(tmp_path, count=1).splitlines() == [
        "  P0 Review:",
        "    before 0.50  reference 0 0",
        "    after  1.00  DPO 0 0",
    ]


def test_a_command_without_a_status_is_done_with_its_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "launcher", lambda: _launcher(tmp_path, "print('drawn')"))
    with pytest.raises(job.JobFailed, match="MANIFEST.json: not there"):
        job.run("sample", {}, tmp_path / "samples")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "MANIFEST.json").write_text("{}")
    job.run("sample", {}, tmp_path / "samples")
