"""Lists what DeepSpeed 0.19.8 knows, because reading it there would import deepspeed: its keys, and its defaults of all
that decides what is computed. tests/config/test_deepspeed_keys.py compares it with the version that is installed.
"""

from __future__ import annotations

from typing import Any

# DeepSpeedZeroConfig's fields.
ZERO_KEYS = frozenset(
    """allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
    cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings
    max_live_parameters max_reuse_distance memory_efficient_linear module_granularity_threshold offload_optimizer
    offload_param override_module_apply overlap_comm param_persistence_threshold parameter_alignment
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients stage
    stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save stage3_gather_16bit_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
    sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights model_persistence_threshold
    stage3_model_persistence_threshold save_muon_momentum_buffer_in_memory gather_16bit_weights_on_model_save""".split()
)
SECTIONS = ("zero_optimization", "bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler", "data_types")
# What people misspell; DeepSpeed itself ignores a top-level key that it does not know.
TOP_KEYS = frozenset(
    """activation_checkpointing aio amp bf16 checkpoint comms_logger communication_data_type compile csv_monitor
    data_types dump_state flops_profiler fp16 gradient_accumulation_steps gradient_clipping
    gradient_predivide_factor memory_breakdown optimizer prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)
# Written out in what the engine gets, so that another version's other default changes nothing: DeepSpeed's clipping was
# off where nothing was said until 0.19.3 made it 1. What the user's file says stands; null is DeepSpeed's own choice by
# the model's type.
MATHEMATICS: dict[str, Any] = {
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "communication_data_type": None,
    "data_types": {"grad_accum_dtype": None, "param_dtype": None, "buffer_dtype": None, "keep_in_fp32_modules": "auto"},
    "fp16": {"enabled": False},
    "bf16": {
        "immediate_grad_update": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    },
    "torch_autocast": {"enabled": False},
    "data_efficiency": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "zero_optimization": {
        "zenflow": None,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
    },
}


def with_defaults(given: dict, defaults: dict) -> dict:
    """Returns `given` with what it lacks of `defaults`, section by section."""
    filled = defaults | given
    for key, default in defaults.items():
        if isinstance(default, dict):
            filled[key] = with_defaults(given.get(key, {}), default)
    return filled
