"""DeepSpeed's keys and defaults as we write them down, against the version that is installed: a new one fails here, so
that somebody decides whether it touches the mathematics (then it joins MATHEMATICS) or not (then a list below).
"""

from __future__ import annotations

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_ds.config import TrainSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from dpo_ds.config.deepspeed_keys import MATHEMATICS, ZERO_KEYS

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


def test_zero_keys_are_deepspeeds():
    fields = DeepSpeedZeroConfig.model_fields
    assert set(fields) | {field.alias for field in fields.values() if field.alias} == ZERO_KEYS


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
