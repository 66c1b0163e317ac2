"""The commands of the experiment and their keys; what all of a kind share stands in the YAML files beside this one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ds.losses import LOSSES
from launch_scripts.recipes.sentiment.runner import Step

HERE = Path("launch_scripts/recipes/sentiment")
SCORE = "launch_scripts.recipes.sentiment.reward:positive"
COMMANDS = {"reference": "sft", "preferred": "sft"}  # YAML file -> command, where it is not the file's name
OUTPUT_KEYS = {"sample": "sample.to", "precompute": "reference.cache"}  # else output_dir


REINFORCED = ("ppo", "rloo", "online_dpo")  # what rl trains


@dataclass(frozen=True)
class Policy:
    """What is trained and evaluated. loss: a preference loss, or an algorithm of rl; beta: of it; without one: SFT on
    the preferred completions. learned: rl asks a reward model of the pairs, and not the ground truth.
    """

    loss: str
    learning_rate: float
    beta: float | None = None
    learned: bool = False

    @property
    def name(self) -> str:
        name = f"{self.loss}-{self.learning_rate if self.beta is None else self.beta:g}"
        return f"{name}-learned" if self.learned else name


@dataclass(frozen=True)
class Size:
    """changes: name of a YAML file -> keys that win over it."""

    seeds: int
    vocabulary: int
    hidden: int
    layers: int
    prompts: int
    held_out: int
    policies: Sequence[Policy]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FULL = Size(
    seeds=3,
    vocabulary=2048,
    hidden=64,
    layers=2,
    prompts=3000,
    held_out=400,
    policies=(
        Policy("dpo", 2e-4, beta=0.1),
        Policy("dpo", 2e-4, beta=0.3),
        Policy("dpo", 2e-4, beta=1.0),
        Policy("dpo", 1e-4, beta=3.0),
        Policy("ipo", 2e-4, beta=1.0),
        Policy("orpo", 2e-4, beta=1.0),
        Policy("preferred", 1e-4),
        Policy("preferred", 4e-4),
        Policy("preferred", 1.6e-3),
        Policy("ppo", 5e-4, beta=0.3),
        Policy("ppo", 5e-4, beta=0.1),
        Policy("ppo", 5e-4, beta=0.03),
        Policy("ppo", 5e-4, beta=0.01),
        Policy("rloo", 5e-4, beta=0.03),
        Policy("online_dpo", 5e-4, beta=0.5),
        Policy("online_dpo", 5e-4, beta=0.1),
        Policy("ppo", 5e-4, beta=1.0, learned=True),
        Policy("ppo", 5e-4, beta=0.3, learned=True),
        Policy("ppo", 5e-4, beta=0.1, learned=True),
        Policy("rloo", 5e-4, beta=0.3, learned=True),
        Policy("online_dpo", 5e-4, beta=0.5, learned=True),
    ),
)
SMALL = Size(
    seeds=1,
    vocabulary=400,
    hidden=64,
    layers=2,
    prompts=400,
    held_out=200,
    policies=(
        Policy("dpo", 6e-4, beta=0.1),
        Policy("dpo", 6e-4, beta=1.0),
        Policy("preferred", 2e-3),
        Policy("ppo", 2e-3, beta=0.03),
        Policy("ppo", 2e-3, beta=0.3, learned=True),
        Policy("rloo", 2e-3, beta=0.3, learned=True),
        Policy("online_dpo", 2e-3, beta=0.3, learned=True),
    ),
    changes={
        "reference": {"train.max_steps": 150},
        "preferred": {"train.epochs": 4},
        "sample": {"sample.max_new_tokens": 48, "sample.n": 3},
        "evaluate": {"evaluate.max_new_tokens": 48, "evaluate.n": 4},
        "rl": {"rl.max_new_tokens": 48, "train.max_steps": 24},
    },
)


@dataclass(frozen=True)
class Plan:
    """All commands of an experiment into `folder`. A step's name is its output's path below that."""

    folder: Path
    size: Size
    seeds: Sequence[int]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def evaluations(self) -> list[Path]:
        """The output_dir of every seed's."""
        return [self.folder / f"seed-{seed}/evaluation" for seed in self.seeds]

    def steps(self) -> Iterator[Step]:
        """Each behind those that it needs; seed beside seed, so that few have to wait for the one before."""
        data, pi_ref = self.data, {"model.path": self.folder / "reference/final"}
        base = {"model.path": data / "base", "data.train": data / "train.jsonl", "data.eval": data / "held_out.jsonl"}
        yield self._step("reference", "reference", (), base, reads=tuple(base.values()))
        drawn = pi_ref | {"sample.prompts": data / "train_prompts.jsonl", "sample.score": SCORE}
        asked = (data / "train_prompts.jsonl", *self._scored_by)
        for seed in self.seeds:
            yield self._step(f"seed-{seed}/sample", "sample", ("reference",), drawn | {"sample.seed": seed}, asked)
        if any(policy.learned for policy in self.size.policies):
            for seed in self.seeds:
                of_seed = {"data.train": self.folder / f"seed-{seed}/sample/pairs", "train.seed": seed}
                yield self._step(f"seed-{seed}/reward", "reward", (f"seed-{seed}/sample",), pi_ref | of_seed)
        pairs = {seed: pi_ref | {"data.train": self.folder / f"seed-{seed}/sample/pairs"} for seed in self.seeds}
        for seed in self.seeds:
            yield self._step(f"seed-{seed}/precompute", "precompute", (f"seed-{seed}/sample",), pairs[seed])
        for seed in self.seeds:
            for policy in self.size.policies:
                yield self._training(f"seed-{seed}", policy, pairs[seed] | {"train.seed": seed})
        for seed in self.seeds:  # behind all trainings: between them, one of two jobs would wait for the other's
            yield self._evaluation(f"seed-{seed}", {"evaluate.seed": seed, "evaluate.against": pi_ref["model.path"]})

    def _training(self, at: str, policy: Policy, keys: Mapping[str, Any]) -> Step:
        if policy.loss in REINFORCED:
            return self._reinforcement(at, policy, keys)
        needs, name = f"{at}/sample", f"{at}/{policy.name}"
        keys = keys | {"train.learning_rate": policy.learning_rate}
        if policy.beta is None:
            return self._step(name, policy.loss, (needs,), keys)
        keys |= {"loss.name": policy.loss, "loss.beta": policy.beta}
        if LOSSES[policy.loss].needs_reference:
            needs = f"{at}/precompute"
            keys |= {"reference.kind": "cached", "reference.cache": self.folder / needs}
        return self._step(name, "train", (needs,), keys)

    def _reinforcement(self, at: str, policy: Policy, keys: Mapping[str, Any]) -> Step:
        prompts, judge = self.data / "train_prompts.jsonl", self.folder / f"{at}/reward/final"
        keys = {
            "model.path": keys["model.path"], "train.seed": keys["train.seed"], "rl.prompts": prompts,
            "rl.algorithm": policy.loss, "rl.beta": policy.beta, "rl.score": judge if policy.learned else SCORE,
            "train.learning_rate": policy.learning_rate,
        }  # fmt: skip
        keys |= {"rl.center_scores": "true"} if policy.learned else {}
        needs = (f"{at}/reward",) if policy.learned else ("reference",)
        return self._step(f"{at}/{policy.name}", "rl", needs, keys, (prompts, *self._scored_by))

    def _evaluation(self, at: str, keys: Mapping[str, Any]) -> Step:
        names = [policy.name for policy in self.size.policies]
        models = [{"path": f"{self.folder}/{at}/{name}/final", "name": name} for name in names]
        prompts = self.data / "held_out_prompts.jsonl"
        asked = {"evaluate.policy": json.dumps(models), "evaluate.prompts": prompts, "evaluate.score": SCORE, **keys}
        needs = [f"{at}/{name}" for name in names]
        return self._step(f"{at}/evaluation", "evaluate", needs, asked, (prompts, *self._scored_by))

    @property
    def _scored_by(self) -> tuple[Path, ...]:
        return HERE / "reward.py", self.data / "train.jsonl"

    def _step(
        self, name: str, recipe: str, needs: Sequence[str], keys: Mapping[str, Any], reads: Sequence[Path] = ()
    ) -> Step:
        output, config = self.folder / name, HERE / f"{recipe}.yaml"
        keys = {**keys, **self.size.changes.get(recipe, {}), OUTPUT_KEYS.get(recipe, "output_dir"): output}
        argv = [COMMANDS.get(recipe, recipe), "--config", str(config)]
        argv += [text for key, value in keys.items() for text in (f"--{key}", str(value))]
        return Step(name, tuple(argv), output, tuple(needs), (config, *reads))
