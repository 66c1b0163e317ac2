"""Lists what DeepSpeed 0.19.8 knows, because reading it there would import deepspeed: its keys and their types, and its
defaults of all that decides what is computed. tests/config/test_deepspeed_keys.py compares with the installed version.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, create_model, model_validator

from dpo_ds.config.section import did_you_mean
from dpo_ds.errors import ConfigError, shorten

AUTO = "auto"
TOP_KEYS = frozenset(
    """activation_checkpointing aio amp bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_types dataloader_drop_last datastates disable_allgather disable_python_gc dump_state flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level
    managed_gradient_accumulation memory_breakdown optimizer prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_node_local_storage vocabulary_size wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
SECTIONS = tuple(
    """zero_optimization bf16 fp16 amp torch_autocast optimizer scheduler data_types activation_checkpointing aio
    checkpoint comms_logger compile flops_profiler timers tensorboard wandb csv_monitor comet""".split()
)
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_SHARDS = "weights are spread by ZeRO-3 alone"
_REMOVED = "DeepSpeed 0.19 has it no more"
REFUSED = {
    "autotuning": "its tuner would start runs of its own",
    "elasticity": f"{_REMOVED}, and a run here resumes on any number of ranks",
    "tensor_parallel": _SHARDS,
    "expert_parallel": _SHARDS,
    "pipeline": _SHARDS,
    "sequence_parallel_size": "packed rows are not cut over ranks",
    "data_efficiency": "which pairs come when is said by data.train and train.seed",
    "curriculum_learning": "which pairs come when is said by data.train and train.seed",
    "hybrid_engine": "completions are drawn by dpo-ds sample",
    "weight_quantization": "it would change the log-probs",
    "compression_training": _REMOVED,
    "eigenvalue": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
}
# AdamW's beside lr, betas, eps and weight_decay: how it is computed, or fixed by what it is.
IMPLEMENTATION = ("torch_adam", "fused", "foreach", "fp32_optimizer_states")
ADAMW = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}

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


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Type = Literal["fp32", "bf16", "fp16"]


class Offload(Options):
    """Takes the keys of both offload sections; NVMe needs to know where."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: Count = 5
    pin_memory: bool = True

    @model_validator(mode="after")
    def _has_a_folder(self):
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError("needs nvme_path where device is nvme: a folder on the NVMe of each node")
        return self


class OffloadParam(Offload):
    buffer_size: Count = 0
    max_in_cpu: Count = 0


class OffloadOptimizer(Offload):
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0, le=1)
    super_offload: bool = False
    cpuadam_cores_perc: float = Field(0.8, ge=0, le=1)


class LeafModule(Options):
    classes: str | list[str] = []
    names: str | list[str] = []
    name_suffixes: str | list[str] = []


STAGE_3 = """prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params
    allgather_sequential""".split()  # their own names; they go by stage3_NAME as well
SWITCHES = """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
    compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param cpu_offload_use_pin_memory cpu_offload
    gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential
    stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients
    parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
    memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
    enable_sanity_checks save_muon_momentum_buffer_in_memory""".split()
COUNTS = """stage allgather_bucket_size sub_group_size prefetch_bucket_size
    param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
    module_granularity_threshold zero_hpz_partition_size""".split()


def _named(name: str):
    return Field(None, alias=f"stage3_{name}") if name in STAGE_3 else None


Zero = create_model(
    "Zero",
    __base__=Options,
    **{name: (bool, _named(name)) for name in SWITCHES},
    **{name: (Count, _named(name)) for name in COUNTS},
    reduce_bucket_size=(Annotated[Count, Field(gt=0)], 1),
    offload_param=(OffloadParam, None),
    offload_optimizer=(OffloadOptimizer, None),
    leaf_module=(LeafModule, None),
    zenflow=(dict, None),
)
BF16 = create_model(
    "BF16", __base__=Options, enabled=(bool, False), **dict.fromkeys(MATHEMATICS["bf16"], (bool, False))
)


class DataTypes(Options):
    grad_accum_dtype: Type | None = None
    param_dtype: Type | None = None
    buffer_dtype: Type | None = None
    keep_in_fp32_modules: list[str] = []


class CommsLogger(Options):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list = []
    verbose: bool = False
    debug: bool = False


_PLAIN = {
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type"), (Type | None, None)),
    "gradient_predivide_factor": (Annotated[float, Field(gt=0, allow_inf_nan=False)], 1.0),
    **dict.fromkeys(("steps_per_print", "vocabulary_size"), (Count | None, None)),
    "log_level": (str | None, None),
    **dict.fromkeys(
        """dataloader_drop_last disable_allgather disable_python_gc dump_state memory_breakdown prescale_gradients
        use_node_local_storage wall_clock_breakdown zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer""".split(),
        (StrictBool, False),
    ),
}
Plain = create_model("Plain", __base__=Options, **_PLAIN)  # what is no section, beside what the run config says


class FlopsProfiler(Options):
    model_config = ConfigDict(extra="allow")
    enabled: StrictBool = False


TYPED: dict[str, type[Options]] = {
    "zero_optimization": Zero,
    "bf16": BF16,
    "data_types": DataTypes,
    "comms_logger": CommsLogger,
    "flops_profiler": FlopsProfiler,
}
ZERO_KEYS = frozenset(Zero.model_fields) | {field.alias for field in Zero.model_fields.values() if field.alias}


def check_keys(config: dict, path: str) -> list[str]:
    """Checks keys, types and what is refused of a file without "auto"; returns lines on what is left out, and leaves it
    out of `config`. A stage 3 key that has two names gets the longer one.

    Raises:
        ConfigError: what DeepSpeed would refuse once it runs, or would do behind our back.
    """
    notes = _leave_out(config, path)
    zero = config.get("zero_optimization", {})
    for name in STAGE_3:
        if name in zero and f"stage3_{name}" in zero:
            raise ConfigError(f"{path}: zero_optimization.{name} and stage3_{name} are one key; give one of them")
        if name in zero:
            zero[f"stage3_{name}"] = zero.pop(name)
    for section, model in TYPED.items():
        if section in config:
            _check_types(config[section], model, section, path)
    plain = {key: value for key, value in config.items() if key in Plain.model_fields and value != AUTO}
    _check_types(plain, Plain, "", path)
    for section in ("optimizer", "scheduler"):
        params = config.get(section, {}).get("params", {})
        if not isinstance(params, dict):
            raise ConfigError(f"{path}: {section}.params is {shorten(params)}, DeepSpeed expects an object {{...}}")
    for key in ("gradient_allreduce_op", "managed_gradient_accumulation"):
        if config.get(key, MATHEMATICS[key]) != MATHEMATICS[key]:
            given = shorten(config[key])
            raise ConfigError(f"{path}: {key} {given} is refused, the loss is a mean over the pairs of all ranks")
    bf16 = config.get("bf16", {})
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        raise ConfigError(f"{path}: bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads true beside it")
    if zero.get("zenflow"):
        raise ConfigError(f"{path}: zero_optimization.zenflow is refused, it updates some weights steps later")
    return notes


def _leave_out(config: dict, path: str) -> list[str]:
    """Takes out what is switched off, monitors and unknown keys; returns lines on those that asked for something."""
    for key in (key for key in REFUSED if key in config):
        given = config.pop(key)
        switches = (given.get("enabled"), given.get("autotp_size")) if isinstance(given, dict) else (given,)
        if given and not any(switch is False or switch == 1 and key == "tensor_parallel" for switch in switches):
            raise ConfigError(f"{path}: {key} is refused: {REFUSED[key]}; leave it out")
    notes = []
    for key in MONITORS:
        if config.pop(key, {}).get("enabled"):
            notes.append(
                f"{path}: {key} is not used: DeepSpeed's monitors know the learning rate and little else; this run's "
                "metrics are in output_dir, as metrics.jsonl and tensorboard/"
            )
    for key in sorted(config.keys() - TOP_KEYS):
        close = difflib.get_close_matches(key, TOP_KEYS, n=1, cutoff=0.75)
        if close and not key.startswith("_"):  # a comment
            raise ConfigError(f"{path}: unknown key {key!r}; did you mean {close[0]!r}?")
        del config[key]
        notes.append(f"{path}: {shorten(key)} is no key of DeepSpeed's and is not used")
    return notes


def _check_types(given: dict, model: type[Options], section: str, path: str) -> None:
    try:
        model.model_validate(given)
    except ValidationError as error:
        finding = error.errors()[0]
        branches = ("str", "list[str]")  # of a union
        key = ".".join([*filter(None, [section]), *(str(part) for part in finding["loc"] if part not in branches)])
        if finding["type"] == "extra_forbidden":
            known = model.model_fields if "." not in key.removeprefix(f"{section}.") else {}
            known = sorted(ZERO_KEYS) if model is Zero and known else known
            hint = f"; {did_you_mean(str(finding['loc'][-1]), known)}" if known else ""
            raise ConfigError(f"{path}: unknown key {key!r}{hint}") from None
        rule = finding["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if finding["type"] == "value_error":
            raise ConfigError(f"{path}: {key} {rule}") from None
        if finding["type"] == "model_type":
            rule = "an object {...}"
        raise ConfigError(f"{path}: {key} is {shorten(finding['input'])}, should be {rule}") from None
