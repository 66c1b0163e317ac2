"""Says what `dpo-ds rl` trains, and builds it from the run's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_ds.config import ModelSection, RlConfig, critic_section
from dpo_ds.errors import ModelError
from dpo_ds.training.tasks import Supervised, load_reference

if TYPE_CHECKING:
    from torch import device as Device

    from dpo_ds.data.batching import Layout
    from dpo_ds.models.engine import LoadedModel, Policy, Replica
    from dpo_ds.reference import Reference
    from dpo_ds.training.rl.experience import Models
    from dpo_ds.training.rl.learners import Learner


@dataclass(frozen=True)
class Reinforcement(Supervised):
    """Raises the score of what a policy draws, held to a frozen reference; loaded as any policy is."""

    run: RlConfig

    @property
    def critic(self) -> ModelSection | None:
        """The section that the critic is loaded by; None for an algorithm without one."""
        return critic_section(self.run)

    def load_models(
        self, policy: Policy, reference: Reference | None, critic_config: dict | None, device: Device
    ) -> Models:
        """Returns the policy with its reference and, where the algorithm has one, its critic. All ranks enter."""
        from dpo_ds.models.engine import Policy
        from dpo_ds.models.layers.activations import save_activation_memory
        from dpo_ds.models.reward_model import ValueModel, load_classifier
        from dpo_ds.training.rl.experience import Models

        if self.critic is None:
            return Models(policy, reference, None)
        classifier = load_classifier(self.critic, critic_config, self.run.train.seed)
        save_activation_memory(classifier, self.run.train.activations)
        return Models(policy, reference, Policy(ValueModel(classifier), critic_config, device))

    def load_replica(self, policy_config: dict, device: Device) -> Replica | None:
        """Returns what every rank draws from; None where that is the policy itself."""
        from dpo_ds.models.causal_lm import LogProbModel
        from dpo_ds.models.engine import Replica
        from dpo_ds.models.loading import load_causal_lm

        if not self.run.rl.replica:
            return None
        return Replica(LogProbModel(load_causal_lm(self.run.model, {"bf16": policy_config["bf16"]})), device)

    def load_reference(self, policy: Policy, reference_config: dict | None, device: Device) -> Reference | None:
        """Returns the strategy that reference.kind names. All ranks enter."""
        return None if self.reference is None else load_reference(self.run, policy, reference_config, device)

    def learner(self, models: Models, layout: Layout) -> Learner:
        from dpo_ds.losses import make_loss
        from dpo_ds.training.objectives.preference import PreferenceObjective
        from dpo_ds.training.objectives.shaping import Shaping
        from dpo_ds.training.rl.algorithms import ALGORITHMS, PPO
        from dpo_ds.training.rl.learners import Critic, OnlinePreference, PolicyGradient

        rl, rate = self.run.rl, self.run.train.learning_rate
        if rl.algorithm == "online_dpo":
            loss = self.run.loss.model_copy(update={"beta": rl.beta})
            reference = models.reference if make_loss(loss).needs_reference else None
            objective = PreferenceObjective(make_loss(loss), reference, Shaping.of(loss))
            return OnlinePreference(models.policy, objective, layout, rate)
        if models.critic is None:
            return PolicyGradient(models.policy, ALGORITHMS[rl.algorithm](rl.clip), None, rate)
        critic_rate = rate if rl.critic_learning_rate is None else rl.critic_learning_rate
        critic = Critic(models.critic, critic_rate, rl.value_clip)
        return PolicyGradient(models.policy, PPO(rl.clip, rl.gae_lambda), critic, rate)

    def set_temperature(self, models: list[LoadedModel]) -> None:
        """Lets log-probs be those at rl.temperature, at which completions are drawn.

        Raises:
            ModelError: a model bounds its logits before they would be divided.
        """
        for model in models if self.run.rl.temperature != 1 else ():
            head = model.causal_lm.get_output_embeddings()
            if head.softcap is not None:
                name, wanted = type(model.causal_lm).__name__, self.run.rl.temperature
                raise ModelError(f"rl.temperature {wanted}: {name} bounds its logits (soft-cap); give 1")
            head.scale /= self.run.rl.temperature
