"""DeepSpeed's keys and defaults as we write them down, against the version that is installed: a new one fails here, so
that somebody decides whether it touches the mathematics (then it joins MATHEMATICS) or not (then a list below).
"""

from __future__ import annotations

import pytest
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import ValidationError

from dpo_ds.config import TrainSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from dpo_ds.config.deepspeed_keys import (
    ADAMW,
    BF16,
    IMPLEMENTATION,
    MATHEMATICS,
    REFUSED,
    TOP_KEYS,
    ZERO_KEYS,
    DataTypes,
    LeafModule,
    OffloadOptimizer,
    OffloadParam,
    Zero,
)  # fmt: skip
from dpo_ds.errors import ConfigError

# Attributes of DeepSpeedConfig. What fill_policy always sets, what MATHEMATICS holds, and what decides nothing that is
# computed: files, logs, timing, layouts, parsers of sections that ours does not use or that are off unless written.
FILLED = set(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer_name
    optimizer_params steps_per_print timers_config checkpoint_tag_validation_enabled checkpoint_tag_validation_fail
    zero_enabled zero_optimization_stage""".split()
)
MATHEMATICAL = set(
    """gradient_allreduce_op prescale_gradients gradient_predivide_factor managed_gradient_accumulation
    communication_data_type grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules float16_config
    bfloat16_config torch_autocast_enabled torch_autocast_dtype torch_autocast_lower_precision_safe_modules
    data_efficiency_config data_efficiency_enabled hybrid_engine zero_config""".split()
)
INDIFFERENT = set(
    """_param_dict activation_checkpointing_config aio_config autotuning_config checkpoint_config
    checkpoint_parallel_write_pipeline comms_config compile_config dataloader_drop_last datastates_config
    disable_allgather disable_python_gc dump_state expert_parallel_config flops_profiler_config global_rank
    load_universal_checkpoint log_level memory_breakdown monitor_config optimizer_legacy_fusion pipeline scheduler_name
    scheduler_params seq_parallel_communication_data_type tensor_parallel_config use_data_before_expert_parallel_
    use_node_local_storage wall_clock_breakdown weight_quantization_config world_size zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer""".split()
)


def seen_by_deepspeed(given: dict, **run) -> DeepSpeedConfig:
    filled, _ = ds_config.fill_policy(given, "ds.json", TrainSection(**run), Machine(2, "cpu", False), hidden_size=64)
    return DeepSpeedConfig(filled | {"train_batch_size": 1})


PAIRS = [
    (Zero, DeepSpeedZeroConfig), (BF16, DeepSpeedBF16Config), (OffloadParam, DeepSpeedZeroOffloadParamConfig),
    (OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig), (LeafModule, DeepSpeedZeroLeafModuleConfig),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda model: model.__name__)
def test_sections_have_deepspeeds_keys(ours, theirs):
    def names(model):
        return {(name, field.alias) for name, field in model.model_fields.items()}

    assert names(ours) == names(theirs)


@pytest.mark.parametrize(
    "section",
    [
        {"overlap_comm": True, "reduce_bucket_size": 5e8, "sub_group_size": 10, "stage3_max_live_parameters": 7},
        {"offload_param": {"device": "cpu", "pin_memory": True, "buffer_size": 3}},
        {"offload_param": {"device": "nvme", "nvme_path": "/nvme"}, "leaf_module": {"classes": "Block"}},
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5, "fast_init": False}},
        {"overlap_comm": "maybe"}, {"reduce_bucket_size": 1.5}, {"reduce_bucket_size": "much"}, {"sub_group_size": -1},
        {"offload_param": "cpu"}, {"offload_param": {"device": "gpu"}}, {"offload_param": {"buffer_count": "x"}},
        {"offload_optimizer": {"device": "cpu", "ratio": 2}}, {"offload_optimizer": {"buffer_size": 3}},
        {"leaf_module": "Block"}, {"leaf_module": {"class": "Block"}}, {"zero_quantized_weights": 3},
        {"mics_shard_size": 4}, {"stage3_prefetch_bucket_size": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_deepspeed_takes_we_take_and_what_it_refuses_we_refuse_before_it_is_imported(section):
    def refusal_of(call) -> str | None:
        try:
            call()
        except (ValidationError, ConfigError, TypeError, DeepSpeedConfigError) as error:
            return str(error)

    theirs = refusal_of(lambda: DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3} | section}))
    ours = refusal_of(lambda: seen_by_deepspeed({"zero_optimization": section}))
    assert (ours is None) == (theirs is None), (ours, theirs)
    if ours is not None:
        key = next(iter(section))
        assert ours.startswith("ds.json: ") and f"zero_optimization.{key}" in ours and "\n" not in ours


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param needs nvme_path"]),
        ({"zero_optimization": {"offload_param": "cpu"}}, ["offload_param is 'cpu', should be an object"]),
        ({"zero_optimization": {"leaf_module": "Block"}}, ["leaf_module is 'Block', should be an object"]),
        ({"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}}, ["are one key"]),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, ["zenflow is refused"]),
        ({"optimizer": {"params": {"momentum": 0.9}}}, ["unknown key 'optimizer.params.momentum' of AdamW"]),
        ({"optimizer": {"params": {"beta": [0.9, 0.9]}}}, ["did you mean 'betas'?"]),
        ({"optimizer": {"params": {"amsgrad": True}}}, ["optimizer.params.amsgrad must be false"]),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, ["optimizer.params.adam_w_mode must be true"]),
        ({"elasticity": {"enabled": True}}, ["elasticity is refused", "any number of ranks"]),
        ({"tensor_parallel": {"autotp_size": 4}}, ["tensor_parallel is refused"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency is refused"]),
        ({"sparse_gradients": True}, ["sparse_gradients is refused"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op 'sum' is refused"]),
        ({"bf16": {"immediate": True}}, ["unknown key 'bf16.immediate'; did you mean 'immediate_grad_update'?"]),
        ({"data_types": {"grad_accum_dtype": "double"}}, ["data_types.grad_accum_dtype is 'double'", "'fp32'"]),
        ({"aio": 3}, ["aio is 3", "object"]),
    ],
)
def test_what_would_fail_in_deepspeed_is_one_line_before_it(given, parts):
    with pytest.raises(ConfigError) as caught:
        seen_by_deepspeed(given)
    line = str(caught.value)
    assert [part for part in ["ds.json", *parts] if part not in line] == [], line


def test_what_asks_for_nothing_passes_and_what_is_left_out_is_told():
    off = {"elasticity": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}, "sparse_gradients": False}
    given = off | {"wandb": {"enabled": True}, "csv_monitor": {"enabled": False}, "_comment": "mine"}
    filled, notes = ds_config.fill_policy(given, "ds.json", TrainSection(), Machine(2, "cpu", False), 64)
    assert not {*given} & filled.keys()
    assert notes[0].startswith("ds.json: wandb is not used: DeepSpeed's monitors know the learning rate")
    assert notes[1:] == ["ds.json: '_comment' is no key of DeepSpeed's and is not used"]


def test_both_names_of_a_stage_3_key_are_one():
    filled, _ = ds_config.fill_policy(
        {"zero_optimization": {"prefetch_bucket_size": 7}}, "ds.json", TrainSection(), Machine(2, "cpu", False), 64
    )
    assert filled["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert "prefetch_bucket_size" not in filled["zero_optimization"]


def test_fused_is_torchs():
    with pytest.raises(ConfigError, match="fused is torch's; give torch_adam true"):
        ds_config.fill_policy(
            {"optimizer": {"params": {"fused": True}}}, "ds.json", TrainSection(), Machine(8, "cuda", True), 64
        )


def test_every_setting_of_deepspeeds_is_known():
    """DeepSpeed 0.19.3 gave gradient_clipping a default; the next such change shall not pass unseen."""
    assert set(vars(seen_by_deepspeed({}))) == FILLED | MATHEMATICAL | INDIFFERENT
    assert set(DeepSpeedBF16Config.model_fields) == {"enabled", *MATHEMATICS["bf16"]}


def test_all_that_decides_what_is_computed_is_written_out():
    config = seen_by_deepspeed({})
    averaging = (config.gradient_allreduce_op, config.prescale_gradients, config.gradient_predivide_factor)
    assert averaging == ("mean", False, 1)
    for section, ours in ((config.bfloat16_config, "bf16"), (config.zero_config, "zero_optimization")):
        assert {key: getattr(section, key) for key in MATHEMATICS[ours]} == MATHEMATICS[ours]
        assert set(MATHEMATICS[ours]) <= section.model_fields_set, "written, not left to the default"


@pytest.mark.parametrize("norm", [0.0, 1.0, 0.3])
def test_clipping_is_what_max_grad_norm_says(norm):
    assert seen_by_deepspeed({}, max_grad_norm=norm).gradient_clipping == norm
    assert seen_by_deepspeed({"gradient_clipping": norm}, max_grad_norm=norm).gradient_clipping == norm
    assert seen_by_deepspeed({"gradient_clipping": "auto"}, max_grad_norm=norm).gradient_clipping == norm


def test_what_the_file_says_stands_beside_what_is_filled_in():
    given = {"communication_data_type": "fp32", "zero_optimization": {"zero_quantized_weights": True}}
    config = seen_by_deepspeed(given)
    assert str(config.communication_data_type) == "torch.float32"
    assert (config.zero_config.zero_quantized_weights, config.zero_config.zero_quantized_gradients) == (True, False)


ODD = [0, -1, 1.5, 10**30, True, False, "", "x", "auto", [1], {}, {"a": 1}, {"enabled": "yes"}, "9" * 5000]
SECTIONS_OF = {"offload_param": OffloadParam, "offload_optimizer": OffloadOptimizer, "leaf_module": LeafModule}
OPTIMIZER = ("lr", "betas", *IMPLEMENTATION, *ADAMW, "other")


def odd_files():
    """Yields a file for every key that there is and every odd value."""
    for value in ODD:
        yield from ({key: value} for key in (*TOP_KEYS, *REFUSED, "other") if key != "compile")
        yield from ({"zero_optimization": {key: value}} for key in ZERO_KEYS)
        for section, model in SECTIONS_OF.items():
            yield from ({"zero_optimization": {section: {key: value}}} for key in (*model.model_fields, "other"))
        yield from ({"bf16": {key: value}} for key in (*BF16.model_fields, "other"))
        yield from ({"data_types": {key: value}} for key in (*DataTypes.model_fields, "other"))
        yield from ({"optimizer": {"params": {key: value}}} for key in OPTIMIZER)
        yield from ({section: {key: value}} for section in ("optimizer", "scheduler") for key in ("type", "params"))


def test_what_is_not_refused_with_one_line_deepspeed_takes():
    for given in odd_files():
        try:
            filled, _ = ds_config.fill_policy(given, "ds.json", TrainSection(), Machine(2, "cpu", False), 64)
        except ConfigError as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 900, given
        else:
            DeepSpeedConfig(filled | {"train_batch_size": 1})
