"""Says what `sft`, `reward` and `train` do differently; all else is the same run.

A task is made from its config, before any model is loaded: deepspeed comes in only where a task builds something.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.config import ReferenceSection, RewardConfig, RlConfig, SftConfig, TrainConfig, reference_section
from dpo_ds.errors import ConfigError
from dpo_ds.training.tracking import ChosenFalls

if TYPE_CHECKING:
    from torch import device as Device

    from dpo_ds.data.prompts import Prompt
    from dpo_ds.models.engine import Policy
    from dpo_ds.reference import Reference
    from dpo_ds.reference.cached import CachedRows
    from dpo_ds.training.objectives.objective import Objective
    from dpo_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """Holds all that a run needs but its models, as the checks found or made it.

    candidates are the checkpoints to resume from, best first, and identity what the config's paths stand for;
    policy_config and reference_config are DeepSpeed's, filled; reference_config belongs to a live reference, cached to
    one that was computed before. calibration_data is a reward model's own, if it has any; prompts are completed
    while the policy trains.
    """

    tokenizer: object
    hidden_size: int
    policy_config: dict
    reference_config: dict | None
    data: object
    evaluation_data: object | None
    candidates: list[Checkpoint]
    identity: dict[str, str]
    cached: CachedRows | None
    calibration_data: object | None = None
    prompts: list[Prompt] = field(default_factory=list)


@dataclass(frozen=True)
class Supervised:
    """Fits the chosen completions by maximum likelihood."""

    run: SftConfig
    merges_adapters = False  # into final/, which holds peft's two files otherwise

    @property
    def reference(self) -> ReferenceSection | None:
        """The section of the frozen model that is compared with; None where there is none."""
        section = getattr(self.run, "reference", None)  # sft and reward have no such section
        return None if section is None or section.kind == "none" else section

    @property
    def margin_column(self) -> str | None:
        """A column of the rows that the objective needs."""
        return None

    def check_data(self, split: str, census: dict) -> None:
        """Raises ConfigError for rows that hold nothing which the objective could learn from."""

    @property
    def calibration(self) -> object:
        """Data that is read for the end of the run alone; None for none."""
        return None

    def check_model(self, model_config) -> None:
        """Raises ModelError for a model that this task cannot train."""
        from dpo_ds.models.layers.routers import check_wanted

        check_wanted(self.run.model.router_aux_loss, model_config)

    def load(self, ds_config: dict):
        """Returns the module that DeepSpeed's engine wraps, with adapters where the run has any. All ranks enter."""
        from dpo_ds.models.causal_lm import LogProbModel
        from dpo_ds.models.loading import load_causal_lm

        return LogProbModel(self._adapted(load_causal_lm(self.run.model, ds_config), "CAUSAL_LM"))

    def objective(self, policy: Policy, prepared: Prepared, device: Device) -> Objective:
        """Returns what is minimised. All ranks enter."""
        from dpo_ds.training.objectives.supervised import SupervisedObjective

        return SupervisedObjective()

    def watch(self) -> ChosenFalls | None:
        """Returns what looks at every step's metrics for something that the user should be told."""
        return None

    def finish(self, trainer: Trainer, prepared: Prepared) -> list[str]:
        """Completes model and tokenizer after the last update; returns lines for the user. All ranks enter."""
        return []

    def _adapted(self, model, peft_task: str):
        from dpo_ds.models import lora
        from dpo_ds.models.layers.activations import save_activation_memory

        if self.run.model.lora.r:
            lora.add_adapters(model, self.run.model.lora, self.run.train.seed, peft_task)
        save_activation_memory(model, self.run.train.activations)
        return model


class Reward(Supervised):
    """Fits a Bradley-Terry reward model to pairs."""

    run: RewardConfig
    merges_adapters = True  # adapters alone would lack the head

    @property
    def margin_column(self) -> str | None:
        return self.run.reward.margin_column

    @property
    def calibration(self) -> object:
        return self.run.reward.calibration

    def check_data(self, split: str, census: dict) -> None:
        _require_comparisons(split, census)

    def check_model(self, model_config) -> None:
        from dpo_ds.models.reward_model import check_reward_model

        super().check_model(model_config)
        check_reward_model(self.run.model, model_config)

    def load(self, ds_config: dict):
        from dpo_ds.models.reward_model import RewardModel, load_classifier

        return RewardModel(self._adapted(load_classifier(self.run.model, ds_config, self.run.train.seed), "SEQ_CLS"))

    def objective(self, policy: Policy, prepared: Prepared, device: Device) -> Objective:
        from dpo_ds.training.objectives.reward import BradleyTerry, Ranking, RewardObjective

        kinds = {"bradley_terry": BradleyTerry, "plackett_luce": Ranking}
        return RewardObjective(kinds[self.run.reward.loss](self.run.reward.centering))

    def finish(self, trainer: Trainer, prepared: Prepared) -> list[str]:
        from dpo_ds.training.objectives.reward import finish

        data = prepared.data if prepared.calibration_data is None else prepared.calibration_data
        return finish(trainer, self.run.reward, data, prepared.tokenizer)


class Preference(Supervised):
    """Optimises a policy on pairs, against a frozen reference where the loss has one."""

    run: TrainConfig

    @property
    def margin_column(self) -> str | None:
        return self.run.loss.margin_column

    def check_data(self, split: str, census: dict) -> None:
        from dpo_ds.losses import make_loss

        if not make_loss(self.run.loss).of_labels:
            _require_comparisons(split, census)
        elif census["groups"]:
            problem = f"{census['groups']} rows rank more than two completions, which does not say what is desirable"
            remedy = f"loss.name {self.run.loss.name} takes pairs, or rows with a label"
            raise ConfigError(f"data.{split}: {problem}; {remedy}")

    def objective(self, policy: Policy, prepared: Prepared, device: Device) -> Objective:
        from dpo_ds.losses import make_loss
        from dpo_ds.training.objectives.labelled import LabelledObjective
        from dpo_ds.training.objectives.preference import PreferenceObjective
        from dpo_ds.training.objectives.shaping import Shaping

        loss, reference = make_loss(self.run.loss), None
        if self.reference is not None:
            reference = load_reference(self.run, policy, prepared.reference_config, device, prepared.cached)
        if loss.of_labels:
            return LabelledObjective(loss, reference)
        return PreferenceObjective(loss, reference, Shaping.of(self.run.loss))

    def watch(self) -> ChosenFalls | None:
        return ChosenFalls(self.run.loss.beta, self.reference is not None)


def load_reference(
    run: TrainConfig | RlConfig, policy: Policy, reference_config: dict | None, device: Device,
    rows: CachedRows | None = None,
) -> Reference:  # fmt: skip
    """Returns the strategy that reference.kind names, which is not none. All ranks enter.

    reference_config: DeepSpeed's, of a live one; rows: of one that was computed before.
    """
    from dpo_ds.models.engine import load_frozen
    from dpo_ds.reference.adapter import AdapterReference
    from dpo_ds.reference.cached import CachedReference
    from dpo_ds.reference.live import LiveReference

    if run.reference.kind == "cached":
        return CachedReference(rows, device)
    if run.reference.kind == "adapter":
        return AdapterReference(policy)
    frozen = load_frozen(reference_section(run), reference_config, device)
    return LiveReference(frozen, policy, run.reference)


def _require_comparisons(split: str, census: dict) -> None:
    if labelled := census["desirable"] + census["undesirable"]:
        problem = f"{labelled} rows have a label and nothing to compare with"
        raise ConfigError(f"data.{split}: {problem}; they are for loss.name kto or bco")


TASKS: dict[type[SftConfig], type[Supervised]] = {SftConfig: Supervised, RewardConfig: Reward, TrainConfig: Preference}


def task_of(run: SftConfig) -> Supervised:
    return TASKS[type(run)](run)
