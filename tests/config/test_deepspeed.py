"""DeepSpeed's JSON: what is filled, what is refused, and that our shipped files load."""

import json
from pathlib import Path

import pytest

from dpo_ds.config import TrainSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import ConfigError

CPU, GPU = Machine(2, "cpu", False), Machine(8, "cuda", True)
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def fill(given: dict, machine: Machine = CPU, **run) -> dict:
    return ds_config.fill_policy(given, "ds.json", TrainSection(**run), machine, hidden_size=64)[0]


def refusal(given: dict, **run) -> str:
    with pytest.raises(ConfigError) as caught:
        fill(given, **run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_filled_from_the_run_config():
    filled = fill({}, learning_rate=1e-4, adam_betas=(0.8, 0.9), adam_eps=1e-6, weight_decay=0.1, max_grad_norm=0.5)
    params = {"lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True, "fused": True}
    assert filled["optimizer"] == {"type": "AdamW", "params": params}
    assert filled["gradient_clipping"] == 0.5
    zero = filled["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]) == (3, 2**24, 640)
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"]) == (2, 1)


def test_a_bucket_holds_a_layer_up_to_half_a_gib_in_bf16():
    for width, bucket in ((64, 2**24), (2048, 16 * 2048**2), (4096, 2**28), (8192, 2**28), (20480, 20480**2)):
        zero = ds_config.fill_policy({}, "ds.json", TrainSection(), GPU, width)[0]["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == bucket


def test_a_single_ranks_weights_stay_in_place_unless_they_are_offloaded():
    offloaded = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    for given, ranks, threshold in (({}, 1, 2**62), ({}, 2, 640), (offloaded, 1, 640)):
        machine = Machine(ranks, "cpu", False)
        zero = ds_config.fill_policy(given, "ds.json", TrainSection(), machine, 64)[0]["zero_optimization"]
        assert zero["stage3_param_persistence_threshold"] == threshold


def test_bf16_follows_the_json_then_the_machine():
    assert fill({}, GPU)["bf16"]["enabled"] is True
    assert fill({"bf16": {"enabled": False}}, GPU)["bf16"]["enabled"] is False
    assert fill({"bf16": {"enabled": "auto"}}, CPU)["bf16"]["enabled"] is False
    assert fill({"bf16": {"enabled": True}}, GPU)["data_types"]["grad_accum_dtype"] == "fp32"


def test_a_hugging_face_file_works_unchanged():
    given = {
        "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "steps_per_print": 2000,
        "optimizer": {"type": "AdamW",
                      "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                     "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}},
    }  # fmt: skip
    filled, notes = ds_config.fill_policy(given, "ds.json", TrainSection(), CPU, 64)
    assert '"auto"' not in json.dumps(filled | {"data_types": {}})
    assert "scheduler" not in filled and filled["fp16"] == {"enabled": False}
    assert notes == ["ds.json: scheduler WarmupLR is not used; the learning rate follows train.schedule linear"]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"train_batch_size": 32}, ["train_batch_size 32", "train.global_batch_size 64"]),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}, ["4 x", "2 ranks", "64"]),
        ({"gradient_clipping": 0.3}, ["gradient_clipping 0.3", "train.max_grad_norm 1.0"]),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ["optimizer.params.lr 0.001", "train.learning_rate 5e-07"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["[0.9, 0.95]", "[0.9, 0.999]"]),
        ({"optimizer": {"type": "Lion"}}, ["'Lion'", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}, ["warmup_num_steps 7", "0"]),
        ({"zero_optimization": {"stage": 2}}, ["stage 2 is refused", "set it to 3"]),
        ({"zero_optimization": {"stage": 0}}, ["stage 0 is refused"]),
        ({"zero_optimization": {"stagee": 3}}, ["'zero_optimization.stagee'", "'stage'?"]),
        ({"zero_optimization": 3}, ["zero_optimization is 3", "object"]),
        ({"fp16": {"enabled": True}}, ["fp16 is refused", "bf16"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            ["offload_optimizer.device nvme is refused", "checkpoints would hold no weights"],
        ),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled is \"yes\""]),
        ({"fp16": {"enabled": 1}}, ["fp16.enabled is 1"]),
        ({"zero_optimization": {"stage": "3"}}, ['stage "3" is refused', "the number 3"]),
        ({"zero_optimisation": {"stage": 3}}, ["'zero_optimisation'", "did you mean 'zero_optimization'?"]),
        ({"train_batch_size": "64"}, ['batch size "64"', "whole number"]),
        ({"optimizer": {"params": [1]}}, ["optimizer.params is [1]"]),
        ({"amp": {"enabled": True}}, ["amp", "refused"]),
        ({"amp": True}, ["amp is True", "object"]),
    ],
)
def test_contradictions_name_both_sides(given, parts):
    line = refusal(given)
    assert [part for part in ["ds.json", *parts] if part not in line] == [], line


def test_literals_that_agree_pass():
    fill(
        {"train_batch_size": 64, "gradient_clipping": 1.0, "optimizer": {"params": {"lr": 5e-7, "betas": [0.9, 0.999]}}}
    )
    notes = ds_config.fill_policy(
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}, "ds.json", TrainSection(), CPU, 64
    )[1]
    assert notes == [
        "ds.json: train_micro_batch_size_per_gpu 4 and gradient_accumulation_steps 8 not used: a micro-batch holds "
        "train.micro_batch_tokens 8192 tokens, and as many of them as train.global_batch_size 64 takes make an update"
    ]
    fill({"amp": {"enabled": "auto", "opt_level": "auto"}, "torch_autocast": {"enabled": False}})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"{", "ds.json:1:2: not JSON"),
        (b"[]", "holds a list"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"bf16": {}, "bf16": {}}', "'bf16' is given twice"),
    ],
)
def test_broken_files_are_named(tmp_path, text, part):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=part.replace("[", r"\[")):
        ds_config.read(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        ds_config.read(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="needs a DeepSpeed engine"):
        ds_config.read("none")


def test_the_reference_has_nothing_of_training():
    given = {"optimizer": {"type": "AdamW"}, "scheduler": {}, "gradient_clipping": 1.0,
             "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 8}}  # fmt: skip
    filled, _ = ds_config.fill_reference(given, "ds.json", GPU, 64)
    assert not {"optimizer", "scheduler", "gradient_clipping"} & filled.keys()
    assert filled["data_types"]["grad_accum_dtype"] is None
    assert not {"offload_optimizer", "zero_hpz_partition_size"} & filled["zero_optimization"].keys()
    assert filled["bf16"]["enabled"] is True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_load(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    given = json.loads(path.read_text())
    for filled in (fill(given), ds_config.fill_reference(given, path.name, CPU, 64)[0]):
        assert '"auto"' not in json.dumps(filled | {"data_types": {}})
        assert DeepSpeedConfig(filled | {"train_batch_size": 1}).zero_config.stage == 3
    assert SHIPPED, "ds_configs/ is empty"
