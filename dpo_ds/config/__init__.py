"""The run config: every key a user can set, its default, type and range; YAML and command line become one of these.

It imports no torch, so that `dpo-ds train --help` answers at once. README's table is these modules read aloud.
"""

from dpo_ds.config.commands import (
    COMMANDS,
    RECORDED,
    TRAINING,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    PlanConfig,
    PrecomputeConfig,
    RewardConfig,
    RlConfig,
    SampleConfig,
    SftConfig,
    TrainConfig,
    VerifyConfig,
    critic_section,
    reference_section,
)
from dpo_ds.config.completions import (
    FUNCTION,
    REGEX,
    ROWS,
    CompletionsSection,
    EvaluateSection,
    GenerationSection,
    SampleSection,
    names_model,
)
from dpo_ds.config.inputs import CheckpointSection, DataSection, LoraSection, ModelSection, ReferenceSection
from dpo_ds.config.loading import check, command_line, flatten, keys, known_instead, load, nested, to_plain
from dpo_ds.config.loss import Default, LossName, LossSection
from dpo_ds.config.rl import RlSection
from dpo_ds.config.section import Section, did_you_mean, is_bool, kind, path_of
from dpo_ds.config.train import HubSection, RewardSection, TrackingSection, TrainSection

__all__ = [
    "COMMANDS",
    "CheckpointSection",
    "CompletionsSection",
    "ConvertConfig",
    "DataSection",
    "Default",
    "EvaluateConfig",
    "EvaluateSection",
    "ExportConfig",
    "FUNCTION",
    "GenerationSection",
    "HubSection",
    "LoraSection",
    "LossName",
    "LossSection",
    "ModelSection",
    "PlanConfig",
    "PrecomputeConfig",
    "RECORDED",
    "REGEX",
    "ROWS",
    "ReferenceSection",
    "RewardConfig",
    "RewardSection",
    "RlConfig",
    "RlSection",
    "SampleConfig",
    "SampleSection",
    "Section",
    "SftConfig",
    "TRAINING",
    "TrackingSection",
    "TrainConfig",
    "TrainSection",
    "VerifyConfig",
    "check",
    "command_line",
    "critic_section",
    "did_you_mean",
    "flatten",
    "is_bool",
    "keys",
    "kind",
    "known_instead",
    "load",
    "nested",
    "names_model",
    "path_of",
    "reference_section",
    "to_plain",
]
