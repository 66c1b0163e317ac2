"""Whole jobs of two ranks with compiled layers: the same losses as without, and no compiler is no obstacle."""

import json

import pytest

from tests import small_jobs
from tests.small_jobs import steps

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # compilers beside other work
STEPS = 20
COMPARED = ("loss", "rewards/margins", "logps/chosen", "grad_norm")
ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of processes, which would import torch first


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_jobs.make_world(tmp_path_factory.mktemp("compiled"))


def run(forks, world, out, env=ONE_COMPILER, **settings) -> tuple[list[int], str]:
    settings = {"train__max_steps": STEPS, "train__micro_batch_tokens": 300} | settings
    return small_jobs.run(forks, world, out, env=env, data__eval=world / "eval.jsonl", **settings)


@pytest.fixture(scope="module")
def runs(forks, world):
    """The folders and what was printed of an eager and of a compiled run."""
    found = {}
    for name, wanted in (("eager", "auto"), ("compiled", "true")):
        codes, output = run(forks, world, name, model__compile=wanted)
        assert codes == [0, 0], output
        found[name] = world / name, output
    return found


def test_twenty_steps_have_the_same_losses(runs):
    eager, compiled = (steps(folder) for folder, _ in runs.values())
    assert len(eager) == len(compiled) == STEPS
    assert compiled[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and compiled[0]["rewards/margins"] == 0
    for name in COMPARED:
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in eager], rel=1e-5, abs=1e-5)


def test_a_graph_to_train_one_of_the_reference_and_one_to_evaluate(runs):
    output = runs["compiled"][1]
    assert output.count("dpo-ds: compiled a decoder layer in") == 3, output
    assert "compiled a" not in runs["eager"][1] and "cannot be compiled" not in output


def test_without_a_compiler_layers_are_eager_and_a_line_says_so(forks, world, runs, tmp_path):
    env = ONE_COMPILER | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    codes, output = run(forks, world, "without", env=env, train__max_steps=3, model__compile="true")
    assert codes == [0, 0], output
    assert output.count("LlamaForCausalLM is not compiled: ") == 2  # policy and reference
    assert [line["loss"] for line in steps(world / "without")] == [
        line["loss"] for line in steps(runs["eager"][0])[:3]
    ]


def test_compile_may_change_on_resume(forks, world, runs):
    folder = runs["compiled"][0]
    codes, output = run(forks, world, "compiled", train__max_steps=22, model__compile="false")
    assert codes == [0, 0], output
    assert "changed on resume: model.compile True -> False" in output and len(steps(folder)) == 22


def test_adapters_and_recomputed_layers_compile(forks, world):
    adapters = {"model__lora__r": 4, "reference__kind": "adapter"}
    for name, changes in {
        "eager": {"model__compile": "false", "train__activation_checkpointing": "true"},
        "compiled": {"model__compile": "true", "train__activation_memory": "selective"},
    }.items():
        codes, output = run(forks, world, f"lora-{name}", train__max_steps=4, **adapters, **changes)
        assert codes == [0, 0] and "cannot be compiled" not in output and "context_fn" not in output, output
    eager, compiled = (steps(world / f"lora-{name}") for name in ("eager", "compiled"))
    for name in COMPARED:
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in eager], rel=1e-5, abs=1e-5)


def test_a_cache_remembers_how_its_layers_ran(forks, world):
    for name, wanted in (("eager", "false"), ("compiled", "true")):
        argv = [
            "precompute", "--model.path", world / "model", "--data.train", world / "train.jsonl", "--reference.cache",
            world / f"cache-{name}", "--deepspeed.config", "none", "--model.compile", wanted,
        ]  # fmt: skip
        codes, output = forks.run(argv, 1, world / "logs", DPO_DS_CACHE=str(world / "derived"), **ONE_COMPILER)
        assert codes == [0] and "cannot be compiled" not in output, output
        manifest = json.loads((world / f"cache-{name}" / "MANIFEST.json").read_text())
        assert manifest["builds"][0].get("layers") == {"eager": None, "compiled": "compiled"}[name]
    settings = {"reference__kind": "cached", "reference__cache": world / "cache-compiled", "train__max_steps": 2}
    codes, output = small_jobs.run(forks, world, "cached", **settings)
    assert codes == [0, 0], output
    assert "computed with layers compiled, this run has eager" in output
    assert steps(world / "cached")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
