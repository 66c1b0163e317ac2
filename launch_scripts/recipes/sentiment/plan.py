"""The commands of the experiment and their keys; what all of a kind share stands in the YAML files beside this one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ds.config import REFERENCE_FREE
from launch_scripts.recipes.sentiment.runner import Step

HERE = Path("launch_scripts/recipes/sentiment")
SCORE = "launch_scripts.recipes.sentiment.reward:positive"
COMMANDS = {"reference": "sft", "preferred": "sft"}  # YAML file -> command, where it is not the file's name
OUTPUT_KEYS = {"sample": "sample.to", "precompute": "reference.cache"}  # else output_dir


@dataclass(frozen=True)
class Policy:
    """What is evaluated. beta: of its loss; steps: after which SFT on the preferred completions is looked at."""

    loss: str
    beta: float | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.beta:g}" if self.steps is None else f"{self.loss}-{self.steps}"


@dataclass(frozen=True)
class Size:
    """betas: of each loss of `dpo-ds train`; looks: steps after which SFT on the preferred completions is looked at,
    the last one its end; changes: name of a YAML file -> keys that win over it.
    """

    seeds: int
    vocabulary: int
    hidden: int
    layers: int
    prompts: int
    held_out: int
    betas: Mapping[str, Sequence[float]]
    looks: tuple[int, ...]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def losses(self) -> list[tuple[str, float]]:
        """By name, with their β."""
        return [(loss, beta) for loss, betas in self.betas.items() for beta in betas]

    @property
    def policies(self) -> list[Policy]:
        """All that are evaluated."""
        trained = [Policy(loss, beta=beta) for loss, beta in self.losses]
        return trained + [Policy("preferred", steps=look) for look in self.looks]


FULL = Size(
    seeds=3,
    vocabulary=2048,
    hidden=128,
    layers=3,
    prompts=2500,
    held_out=400,
    betas={"dpo": (0.1, 0.3, 1.0, 3.0), "ipo": (1.0,), "orpo": (1.0,)},
    looks=(78, 156, 312),
)
SMALL = Size(
    seeds=1,
    vocabulary=400,
    hidden=64,
    layers=2,
    prompts=400,
    held_out=200,
    betas={"dpo": (0.1, 1.0)},
    looks=(24, 120),
    changes={
        "reference": {"train.max_steps": 150},
        "train": {"train.learning_rate": 6e-4},
        "preferred": {"train.learning_rate": 5e-4},
        "sample": {"sample.max_new_tokens": 48, "sample.n": 2},
        "evaluate": {"evaluate.max_new_tokens": 48},
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
        pairs = {seed: pi_ref | {"data.train": self.folder / f"seed-{seed}/sample/pairs"} for seed in self.seeds}
        for seed in self.seeds:
            yield self._step(f"seed-{seed}/precompute", "precompute", (f"seed-{seed}/sample",), pairs[seed])
        for seed in self.seeds:
            yield from self._trainings(f"seed-{seed}", pairs[seed] | {"train.seed": seed})
            yield self._evaluation(f"seed-{seed}", {"evaluate.seed": seed, "evaluate.against": pi_ref["model.path"]})

    def _trainings(self, at: str, keys: Mapping[str, Any]) -> Iterator[Step]:
        *looks, last = self.size.looks
        saved = {"train.max_steps": last, "checkpoint.every": looks[0], "checkpoint.keep": last // looks[0]}
        whole = f"{at}/preferred-{last}"
        yield self._step(whole, "preferred", (f"{at}/sample",), keys | saved)
        for loss, beta in self.size.losses:
            chosen = keys | {"loss.name": loss, "loss.beta": beta}
            needs = f"{at}/sample"
            if loss not in REFERENCE_FREE:
                needs = f"{at}/precompute"
                chosen |= {"reference.kind": "cached", "reference.cache": self.folder / needs}
            yield self._step(f"{at}/{loss}-{beta:g}", "train", (needs,), chosen)
        for look in looks:
            output = self.folder / f"{at}/preferred-{look}"
            checkpoint = f"{self.folder / whole}/checkpoints/step-{look:08d}"
            yield Step(f"{at}/preferred-{look}", ("export", checkpoint, "--to", f"{output}/final"), output, (whole,))

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
