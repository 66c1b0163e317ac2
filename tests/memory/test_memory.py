"""Expected memory against what torch allocated in real runs of two ranks, and the arithmetic behind it."""

import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from dpo_ds.batch import Segment
from dpo_ds.config import DataSection, TrainConfig, load
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.errors import ModelError
from dpo_ds.memory import allocations, fetching, trace, zero3
from dpo_ds.memory.drawing import cached_numbers, drawing, longest_groups
from tests.families import tiny_config_of
from tests.ranks import ROOT

MACHINE = Machine(2, "cpu", False)
MODELS = {
    "3M": {"vocab_size": 3000, "hidden": 192, "layers": 4},
    "7M": {"vocab_size": 4000, "hidden": 256, "layers": 6},
}
SMALL_BUCKETS = {
    "reduce_bucket_size": 500_000,
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}
SHAPE, PAIRS = (64, 32, 32), 4  # 512 tokens
CASES = {
    f"{model}{'-live' * live}-{activations}": {
        "family": "llama", "model": MODELS[model], "quantize": None, "lora": {"r": 0},
        "ds": {"zero_optimization": SMALL_BUCKETS}, "live": live,
        "activations": activations, "spread": 1, "pairs": PAIRS, "shape": SHAPE,
    }
    for model, live, activations in (("3M", False, "none"), ("3M", False, "checkpoint"), ("7M", True, "checkpoint"))
}  # fmt: skip
CASES["3M-experts"] = CASES["3M-none"] | {"family": "qwen3_moe"}
CASES["3M-lora-checkpoint"] = CASES["3M-checkpoint"] | {"lora": {"r": 8}}
CASES["3M-4bit-checkpoint"] = CASES["3M-lora-checkpoint"] | {"quantize": "4bit"}
CASES["3M-offload-spread"] = CASES["3M-none"] | {"activations": "offload", "spread": 2, "pairs": 4 * PAIRS}
CASES["3M-selective"] = CASES["3M-none"] | {"activations": "selective"}
CASES["3M-spread"] = CASES["3M-none"] | {"spread": 2}
CASES["3M-group-of-4"] = CASES["3M-none"] | {"shape": (64, 32, 32, 32, 32)}
ON_HOST = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CASES["3M-offload-optimizer"] = CASES["3M-none"] | {"ds": {"zero_optimization": SMALL_BUCKETS | ON_HOST}}
CASES["3M-large-buckets"] = CASES["3M-none"] | {"ds": {"zero_optimization": {"reduce_bucket_size": 4_000_000}}}
for name, case in CASES.items():
    case["name"] = name
TOLERANCE = 0.05  # of the peak
OF_4_BITS = 0.10  # the head is held longer than these weights, which are as small as they are few


@pytest.fixture(scope="module")
def measured(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    found = {}
    for name, case in CASES.items():
        out = folder / f"{name}.json"
        codes, output = forks.run([str(out), json.dumps(case)], 2, folder, module="tests.workers.memory")
        assert codes == [0, 0], output[-2000:]
        found[name] = json.loads(out.read_text())
    return found


def expected(case: dict) -> allocations.Memory:
    config = tiny_config(case["family"], **case["model"])
    run = TrainConfig.model_validate(
        {
            "model": {"path": "m", "quantize": case["quantize"], "lora": case["lora"]}, "reference": {"kind": "none"},
            "loss": {"name": "orpo"}, "data": {"train": "d"}, "output_dir": "o", "deepspeed": {"config": "ds"},
            "train": {
                "activation_memory": case["activations"], "global_batch_size": 2, "sequence_parallel": case["spread"],
            },
        }
    )  # fmt: skip
    policy, _ = fill_policy(case["ds"], "ds", run.train, MACHINE, config.hidden_size)
    reference = fill_reference(case["ds"], "ds", MACHINE, config.hidden_size)[0] if case["live"] else None
    prompt, *completions = case["shape"]
    length = sum(case["shape"])
    segments = tuple(Segment(length * i, prompt, tuple(completions)) for i in range(case["pairs"]))
    return allocations.expected(run, config, MACHINE, 1, policy, reference, segments=segments)


@pytest.mark.distributed
def test_peaks_and_state_are_those_of_real_runs(measured):
    """State exactly: weights, master weights, two moments and gradients, 4 bytes each, the reference's weights and one
    bucket; and up to 1 % of what nobody counts: batches, rotary tables. What is offloaded is in the same memory here,
    half of a node's for either rank.
    """
    errors = {}
    for name, case in CASES.items():
        found = expected(case)
        offloaded = sum(found.host.values()) // 2
        errors[name] = round((found.allocated + offloaded) / measured[name]["peak"] - 1, 3)
        assert measured[name]["state"] == pytest.approx(sum(found.state.values()) + offloaded, rel=0.01), name
    allowed = {name: OF_4_BITS if case["quantize"] == "4bit" else TOLERANCE for name, case in CASES.items()}
    assert {name: error for name, error in errors.items() if abs(error) > allowed[name]} == {}, errors


def test_the_meter_is_torchs_own_accounting():
    """The profiler and PeakMemory, which does not see what a kernel takes for itself, on a forward and backward.

    In one process: what gloo's threads free of the main thread's, the profiler does not see.
    """
    model = random_model(tiny_config("llama", 500, hidden=64))
    ids = torch.arange(256)[None]

    def passes() -> None:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        model.zero_grad()

    passes()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    with trace.PeakMemory([*model.parameters(), *model.buffers(), ids]) as meter:
        passes()
    assert meter.peaks["forward"] == pytest.approx(max(accumulate(changes)), rel=0.08)


def shape(name: str):
    return AutoConfig.for_model(**json.loads((ROOT / f"tests/shapes/{name}.json").read_text()))


def tiny_run(ds: dict, ranks: int, nodes: int = 1, **model) -> allocations.Memory:
    """A bf16 model of 64 x 64 embeddings and one layer on GPUs: 4096 + 16384 + 128 + 4096 + 64 weights."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=1, **model)
    run = TrainConfig.model_validate(
        {
            "model": {"path": "m"}, "data": {"train": "d", "max_length": 4, "max_prompt_length": 2},
            "output_dir": "o", "deepspeed": {"config": "ds"}, "train": {"micro_batch_tokens": 6},
            "checkpoint": {"asynchronous": False},
        }
    )  # fmt: skip
    machine = Machine(ranks, "cuda", True)
    policy, _ = fill_policy({"zero_optimization": ds}, "ds", run.train, machine, 64)
    return allocations.expected(run, config, machine, nodes, policy, None)


NUMEL = 4096 + 4 * 4096 + 3 * 4096 + 2 * 64 + 64 + 4096  # embedding, attention, MLP, norms, last norm, head


def test_the_state_of_a_bf16_run():
    state = tiny_run({"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 64}, ranks=4).state
    assert state == {
        "policy: weights": 2 * NUMEL // 4,
        "policy: small weights, whole": 2 * 3 * 64,
        "fp32 master weights": 4 * NUMEL // 4,
        "Adam's moments": 8 * NUMEL // 4,
        "gradient shards": 4 * NUMEL // 4,
        "reduce bucket": 2 * 1000,
    }


def test_hpz_keeps_the_weights_once_a_node():
    phases = [tiny_run({"zero_hpz_partition_size": size}, ranks=8, nodes=2).phases for size in (1, 4)]
    plain, hpz = (phase["forward and backward"] for phase in phases)
    assert hpz == plain | {"hpZ: the node's own copy of the weights": 2 * NUMEL // 4}


def test_offload_moves_the_state_to_the_host_and_doubles_the_gradients():
    device = {"device": "cpu", "pin_memory": False}
    found = tiny_run({"offload_optimizer": device, "stage3_param_persistence_threshold": 0}, ranks=4, nodes=2)
    assert "fp32 master weights" not in found.state and "optimizer step" not in found.phases
    host = {name: size for name, size in found.host.items() if name != "processes"}
    assert host == {
        "fp32 master weights": 2 * NUMEL,  # 4 bytes, 2 of 4 ranks a node
        "Adam's moments": 4 * NUMEL,
        "gradient shards": 2 * NUMEL,
        "their gradients": 2 * NUMEL,
    }


def test_pinned_buffers_are_powers_of_two():
    assert [zero3.pinned(size) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]


def test_the_largest_micro_batch_is_full_of_the_longest_pairs():
    """Prompt 10, completions 20 each: two whole pairs of 50 tokens and the beginning of a third in 120."""
    section = DataSection(train="d", max_length=30, max_prompt_length=10)
    segments = allocations.longest_pairs(section, 120, 2)
    assert segments == (Segment(0, 10, (20, 20)), Segment(50, 10, (20, 20)), Segment(100, 4, (8, 8)))
    assert allocations.longest_pairs(section, 40, 2) == (Segment(0, 10, (20, 20)),)
    assert allocations.longest_pairs(section, 30, 1) == (Segment(0, 10, (20,)),)


def test_sub_groups_are_deepspeeds():
    """Elements of one of two ranks, cut where 30 are reached; matrices and vectors apart."""
    trained = [allocations.Parameter(numel, True, numel > 10) for numel in (40, 24, 8, 20, 41)]
    assert zero3.subgroups(trained, 30, 2) == [32, 31, 4]


def test_weights_are_whole_as_deepspeeds_coordinator_has_them():
    """An embedding of 50, two layers of two weights of 10, a head of 50. Prefetched is until 15 are reached: beside the
    embedding a layer's 20 in one buffer, beside the second layer the head. At the head's backward the second layer
    waits since its forward, and the first one is fetched; at the second layer's, the first and the embedding wait."""
    modules = {"embedding": (0,), "one": (1, 2), "two": (3, 4), "head": (5,)}
    order = [("forward", name) for name in modules]
    order += [("head", "head"), ("layers", "two"), ("layers", "one"), ("layers", "embedding")]
    uses = [fetching.Use(phase, modules[name], len(modules[name]) > 1) for phase, name in order]
    sizes = [50, 10, 10, 10, 10, 50]
    found = fetching.Coordinator(uses, sizes, fetching.Limits(15, 1000, 0)).peaks()
    assert found == {"forward": (50, 20), "head": (50, 40), "layers": (20, 70)}
    kept = fetching.Coordinator(uses, sizes, fetching.Limits(15, 1000, 1000)).peaks()
    assert kept["head"] == (50 + 2 * 20 + 50, 0), "what is needed again within 1000 is never given back"


def test_experts_rows_are_tokens_times_experts_a_token_however_they_are_shared_out():
    """JetMoE reads how many rows each of its four experts has, to cut 60 tokens' 120 apart; what backward keeps of them
    in float32 is twice what it keeps in bfloat16, but for indices and norms."""
    config = tiny_config_of("jetmoe")
    run = trace.Pass((Segment(0, 20, (20, 20)),), 40, torch.float32)
    whole, half = (trace.peaks(config, replace(run, dtype=dtype))["saved"] for dtype in (run.dtype, torch.bfloat16))
    assert 1.5 < whole / half < 2


def test_a_model_that_needs_values_costs_one_line():
    """The indexer of DeepSeek 3.2 cuts its mask, and of a packed row there is none."""
    run = trace.Pass((Segment(0, 20, (20, 20)),), 40, torch.float32)
    with pytest.raises(ModelError, match="its code does not run on shapes alone: TypeError") as refused:
        trace.peaks(tiny_config_of("deepseek_v32"), run)
    assert "\n" not in str(refused.value)


def test_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Param

    for fields, ours in (
        (DeepSpeedZeroConfig, zero3.DEFAULTS), (Param, zero3.NVME_PARAM),
        (Optimizer, zero3.NVME_OPTIMIZER),
    ):  # fmt: skip
        assert {name: fields.model_fields[name].default for name in ours} == ours


def test_the_heads_kept_exponentials_are_counted(monkeypatch):
    """1000 rows of 20,000 columns, padded to 79 * 256 = 20,224, of 2 bytes, and 79 tops of 4 bytes a row: alive from
    the forward to the end of the head's backward, whose gradient takes their place; without them that is as large a
    tile of its own, which is gone when the gradient of 1000 hidden states of width 8 is rounded to 2 bytes."""
    config = AutoConfig.for_model(
        "llama", vocab_size=20_000, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
    )
    run = trace.Pass((Segment(0, 10, (500, 500)),), 1000, torch.bfloat16)
    kept = trace.peaks(config, run)
    monkeypatch.setitem(trace.TILES, "triton", trace.TILES["triton"]._replace(kept_bytes=0))
    recomputed = trace.peaks(config, run)
    assert kept["forward"] - kept["saved"] == pytest.approx(1000 * (20_224 * 2 + 79 * 4), rel=0.01)
    assert recomputed["forward"] < 2_000_000
    assert kept["head"] - recomputed["head"] == 1000 * (79 * 4 + 8 * 2)
    config.final_logit_softcapping = 30.0  # its gradient needs the logits themselves
    assert trace.peaks(config, run) == recomputed


RECIPES = sorted((ROOT / "launch_scripts/recipes").glob("*.yaml"))
CLAIM = r"# expected: ([\d.]+) GiB a GPU, ([\d.]+) GiB of host memory a node \((\d+) GPUs?, (\d+) nodes?, shape (\w+)\)"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_the_function_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    script, command = re.search(r"(launch_scripts/\w+\.sh) (?:HOSTFILE )?(\w+)", text).groups()
    run, notes = load(command, str(path), {})
    device, host, ranks, nodes, name = re.search(CLAIM, text).groups()
    found = allocations.of_run(run, int(ranks), int(nodes), shape(name))
    expected = tuple(f"{size / allocations.GIB:.1f}" for size in (found.device, sum(found.host.values())))
    assert expected == (device, host)
    assert notes == [] or "precompute" in notes[0]
    assert (ROOT / script).exists() and f"launch_scripts/recipes/{path.name}" in text
    for file in (run.deepspeed.config, run.deepspeed.reference_config):
        assert file is None or Path(file).is_file()


def test_the_command_prints_a_table_and_names_mistakes(tmp_path, capsys):
    random_model(tiny_config("llama", 300)).save_pretrained(tmp_path / "model")
    config = f"""
    model: {{path: {tmp_path}/model}}
    data: {{train: pairs.jsonl, max_length: 64, max_prompt_length: 32}}
    reference: {{kind: cached, cache: folder}}
    train: {{micro_batch_tokens: 128}}
    precompute: {{micro_batch_tokens: 128}}
    deepspeed: {{config: {ROOT}/ds_configs/zero3_bf16.json}}
    output_dir: out
    """
    path = str(tmp_path / "run.yaml")
    Path(path).write_text(config)
    for command in ("train", "sft", "reward", "precompute"):
        allocations.main([path, "--ranks", "2", "--command", command])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{path}: expected on 2 GPUs, not measured"
        assert lines[2].endswith("reference: weights" if command == "precompute" else "policy: weights")
    own = config.replace("kind: cached, cache: folder", "kind: live")
    Path(path).write_text(f"{own}\n    rl: {{prompts: p, score: 'm:f', n: 3, max_new_tokens: 32, batch_size: 100}}")
    allocations.main([path, "--ranks", "2", "--command", "rl"])
    table = capsys.readouterr().out
    assert all(f"  {what}" in table for what in ("policy: weights", "reference: weights", "critic: Adam's moments"))
    size = 2 * 2 * 2 * 2 * 16 * 100 * 64  # keys and values, 2 bytes, 2 layers, 2 heads of 16, 100 of 64 tokens
    drawn = drawing(load("rl", path, {})[0], tiny_config("llama", 300), 2)
    assert list(drawn.values()) == [size, 3 * 4 * 100 * 300]
    random_model(tiny_config("llama", 300)).save_pretrained(tmp_path / "judge")
    judged = {"rl.score": str(tmp_path / "judge"), "rl.replica": "true", "rl.critic": str(tmp_path / "model")}
    found = allocations.of_run(load("rl", path, judged)[0], 2, 1, tiny_config("llama", 300))
    assert {"replica: weights", "reward model: weights", "critic: weights"} <= found.state.keys()
    assert found.state["replica: weights"] == pytest.approx(2 * found.state["policy: weights"], rel=0.01)
    segments = longest_groups(load("rl", path, {})[0])
    assert segments == (Segment(0, 32, (32, 32, 32)),), "128 tokens, as train.micro_batch_tokens"
    with pytest.raises(SystemExit) as stopped:
        allocations.main([path, "--ranks", "3", "--nodes", "2"])
    assert stopped.value.code == 2 and "not a multiple of --nodes 2" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_token_takes_in_the_cache_what_transformers_keeps_of_it(family):
    config = tiny_config_of(family)
    kept = random_model(config).eval()(input_ids=torch.arange(1, 11)[None], use_cache=True).past_key_values.layers
    assert cached_numbers(config) == sum(x.numel() for layer in kept for x in (layer.keys, layer.values)) / 10
