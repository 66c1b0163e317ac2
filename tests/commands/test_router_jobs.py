"""The routers' auxiliary loss in jobs of a small mixture of experts: over the global batch, whatever computes it."""

import pytest

from dpo_ds.demo.tiny import random_model, save_tiny_model, special_ids, tiny_config, train_tokenizer
from tests.small_jobs import make_world, run, steps, train_command, weights

pytestmark = pytest.mark.distributed
HEAVY = {"model__router_aux_loss": 2.0, "train__max_steps": 3, "train__learning_rate": 1e-4}
WAYS = {
    "one micro-batch a rank": {"train__micro_batch_tokens": 6000},
    "several micro-batches a rank": {"train__micro_batch_tokens": 300},
    "padded and recomputed": {"train__layout": "padded", "train__activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("routers"))
    text = (folder / "train.jsonl").read_text().splitlines()
    tokenizer = train_tokenizer(text, vocab_size=300)
    config = tiny_config("qwen3_moe", len(tokenizer), hidden=32, router_aux_loss_coef=0.25, **special_ids(tokenizer))
    model = random_model(config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(20)  # their choices are clear, and uneven
    save_tiny_model(folder / "model", tokenizer, model)
    return folder


@pytest.fixture(scope="module")
def alone(forks, world):
    """One process, one micro-batch: transformers' own formula, by the test of routers."""
    codes, output = run(forks, world, "alone", ranks=1, train__micro_batch_tokens=12000, **HEAVY)
    assert codes == [0] and "routers are kept balanced, by 2 times router_aux_loss" in output, output
    return steps(world / "alone")


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(forks, world, alone, way):
    codes, output = run(forks, world, way, **HEAVY, **WAYS[way])
    assert codes == [0, 0], output
    for ours, theirs in zip(steps(world / way), alone, strict=True):
        for key in ("loss", "router_aux_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), (ours["step"], key)


def test_routers_become_balanced(forks, world, alone):
    """By the config's own coefficient, unless it is said to be 0; and they resume bit for bit."""
    keys = {"train__max_steps": 6, "checkpoint__every": 3, "train__learning_rate": 3e-3}
    for out, last in (("own", 6), ("own in halves", 3), ("own in halves", 6)):
        codes, output = run(forks, world, out, **{**keys, "train__max_steps": last})
        assert codes == [0, 0] and "by 0.25 times router_aux_loss" in output, output
    codes, output = run(forks, world, "off", **keys, model__router_aux_loss=0)
    assert codes == [0, 0] and "balanced" not in output and "router_aux_loss" not in steps(world / "off")[0], output
    found = [line["router_aux_loss"] for line in steps(world / "own")]
    unbalanced = found[0] - 2  # two experts a token: the least is 2
    assert unbalanced > 0.02 and found[-1] - 2 < 0.8 * unbalanced, found
    assert weights(world / "own in halves") == weights(world / "own")


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_every_command_that_trains(forks, world, command):
    found = []
    for ranks, tokens in ((1, 12000), (2, 300)):
        out = f"{command} {ranks}"
        argv = train_command(world, out, command, **HEAVY, train__micro_batch_tokens=tokens)
        codes, output = forks.run(argv, ranks, world / f"{out}.logs", DPO_DS_CACHE=str(world / "cache"))
        assert codes == [0] * ranks, output
        found.append([(line["router_aux_loss"], line["grad_norm"]) for line in steps(world / out)])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_adapters_against_the_policy_without_them(forks, world):
    """The reference's forwards through the same routers are not counted."""
    keys = {**HEAVY, "model__lora__r": 4, "train__micro_batch_tokens": 300}
    for kind in ("live", "adapter"):
        codes, output = run(forks, world, kind, **keys, reference__kind=kind)
        assert codes == [0, 0], output
    for ours, theirs in zip(steps(world / "adapter"), steps(world / "live"), strict=True):
        assert ours["router_aux_loss"] == pytest.approx(theirs["router_aux_loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_model_without_routers(forks, tmp_path):
    codes, output = run(forks, make_world(tmp_path), "dense", model__router_aux_loss=0.1)
    assert codes[0] == 2 and output.count("dpo-ds: error") == 1, output
    assert "--model.router_aux_loss 0.1: LlamaForCausalLM has no routers" in output
