"""The sections of commands that draw completions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from dpo_ds.config.section import FilePath, Section, above_zero, checked_source
from dpo_ds.errors import shorten

LEAST_TEMPERATURE = 1e-3
# A score is a pattern, a function, or else a reward model's folder or Hub id.
REGEX = "regex:"
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class GenerationSection(Section):
    """How completions are drawn (dpo_ds/models/generation.py)."""

    max_new_tokens: int = Field(256, gt=0, le=2**20, description="tokens of a completion at most")
    min_new_tokens: int = Field(0, ge=0, description="no end of text before so many tokens")
    temperature: float = Field(1.0, ge=0, le=1000, description="divides the logits; 0: always the likeliest token")
    top_k: int = Field(0, ge=0, description="draw among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the fewest tokens of this total probability")
    seed: int = Field(0, ge=0, description="of the draws")
    batch_size: int = Field(64, gt=0, le=65536, description="completions a rank draws together")


    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature):
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"{temperature} is as good as 0, and logits over it overflow; give 0")
        return temperature


PROMPTS = "file, folder or Hub id of prompts or preference data, or list of them with weights"


class CompletionsSection(GenerationSection):
    """What training shows of itself: completions of a few prompts."""

    prompts: str | list[str | dict[str, Any]] | None = Field(
        None, description=f"{PROMPTS}; sample needs them, train.sample_every shows completions of some"
    )

    @field_validator("prompts")
    @classmethod
    def _weights(cls, source):
        return checked_source(source)

    @model_validator(mode="after")
    def _ends_in_order(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sample.min_new_tokens {self.min_new_tokens} is above sample.max_new_tokens {self.max_new_tokens}"
            )
        return self


class SampleSection(CompletionsSection):
    prompts: str | list[str | dict[str, Any]] = Field(description=PROMPTS)
    to: FilePath = Field(min_length=1, description="sample: the folder to fill")
    n: int = Field(2, gt=0, le=65536, description="sample: completions a prompt")
    score: str | None = Field(
        None, description="module:function, regex:PATTERN or a reward model; null: no scores, no pairs"
    )
    score_timeout: float = Field(
        600, gt=0, le=10**6, description="seconds a call of the score's function or pattern may take"
    )
    pairs: Literal["best_worst", "bradley_terry", "groups"] = Field(
        "best_worst",
        description="one pair a prompt; bradley_terry: every two completions, the better one drawn; "
        "groups: one row a prompt with all completions and scores",
    )
    pair_temperature: float = Field(
        1.0, gt=0, description="bradley_terry: a is chosen over b with probability σ((score_a - score_b) / this)"
    )
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="completions that ran into max_new_tokens: not in pairs, or as if they had ended there"
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm: where it is installed")
    shard_rows: int = Field(256, gt=0, le=2**20, description="prompts a file: the most that a killed rank draws again")
    threads: int = Field(1, gt=0, le=1024, description="CPU threads a rank; decides last bits, so not by the ranks")

    @model_validator(mode="after")
    def _can_differ(self):
        if self.score is not None and self.n < 2:
            raise ValueError(f"sample.n {self.n}: a pair needs two completions of a prompt; give 2 or more")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"sample.temperature 0 draws {self.n} equal completions; give it --sample.n 1")
        return self


def names_model(score: str) -> bool:
    """Tells whether a score is a reward model, and neither a function nor a pattern."""
    return not score.startswith(REGEX) and FUNCTION.fullmatch(score) is None


class PolicyChoice(NamedTuple):
    """One of evaluate.policy; beta is the one it was trained with, None for loss.beta."""

    path: str
    name: str
    beta: float | None


ROWS = ("reference", "baseline")  # names of their own in an evaluation


class EvaluateSection(GenerationSection):
    policy: str | list[str | dict[str, Any]] = Field(
        description="model to evaluate, or a list of them, each a path or {path: ..., name: ..., beta: ...}"
    )
    against: FilePath | None = Field(None, description="the reference π_ref; null: only what needs none")
    prompts: str | list[str | dict[str, Any]] | None = Field(
        None, description="prompts to complete, given as sample.prompts, each once; null: those of data.eval"
    )
    n: int = Field(1, ge=0, le=65536, description="evaluate: completions a prompt; 0: none, data.eval alone")
    score: str | None = Field(None, description="rewards of completions, given as sample.score; null: none")
    baseline: FilePath | None = Field(
        None, description="win rate against this model, or a file of prompt, completion; null: evaluate.against"
    )
    judge: str | None = Field(
        None, description="module:function(prompts, first, second) -> preference for first, 0 to 1; null: higher score"
    )
    score_timeout: float = Field(
        600, gt=0, le=10**6, description="seconds a call of the score's function or pattern, or of the judge, may take"
    )
    bootstrap: int = Field(1000, gt=0, le=10**6, description="resamples behind the win rate's interval")
    layout: Literal["packed", "padded"] = Field("packed", description="of log-probs, as train.layout")
    micro_batch_tokens: int = Field(16384, gt=0, description="tokens a rank holds in one forward, padding included")
    threads: int = Field(1, gt=0, le=1024, description="CPU threads a rank; decides last bits, so not by the ranks")

    @field_validator("prompts")
    @classmethod
    def _weights(cls, source):
        return checked_source(source)

    @field_validator("policy")
    @classmethod
    def _policies(cls, given):
        if not given:
            raise ValueError("an empty list; name at least one model")
        for item in given if isinstance(given, list) else []:
            if not isinstance(item, dict):
                continue
            if set(item) - {"path", "name", "beta"} or not isinstance(item.get("path"), str):
                raise ValueError(f"{shorten(item)} is not a policy; write {{path: ..., name: ..., beta: 0.1}}")
            if not isinstance(item.get("name", ""), str):
                raise ValueError(f"name {shorten(item['name'])} of {item['path']} must be text; put it in quotes")
            if "beta" in item:
                item["beta"] = above_zero("beta", item["beta"], item["path"])
        return given

    @model_validator(mode="after")
    def _parts_fit(self):
        names = [policy.name for policy in self.policies]
        for index, name in enumerate(names):
            if name in (*names[:index], *ROWS):
                raise ValueError(f"evaluate.policy: {name!r} names two models; give names: {{path: ..., name: ...}}")
        if self.min_new_tokens > self.max_new_tokens:
            limits = f"{self.min_new_tokens} is above evaluate.max_new_tokens {self.max_new_tokens}"
            raise ValueError(f"evaluate.min_new_tokens {limits}")
        if self.n == 0 and (self.score or self.judge or self.baseline):
            raise ValueError("evaluate.n 0 draws no completions, so there is nothing to score or to compare")
        if self.judge and not (self.baseline or self.against):
            raise ValueError(f"evaluate.judge {self.judge[:60]} compares with evaluate.baseline or .against; give one")
        if self.baseline and not (self.judge or self.score):
            raise ValueError(f"evaluate.baseline {self.baseline} is compared by evaluate.score or .judge; give one")
        return self

    @property
    def policies(self) -> list[PolicyChoice]:
        """A name not given is that of the folder, or of the run for its final/; the whole path where two are equal."""
        items = [self.policy] if isinstance(self.policy, str) else self.policy
        items = [{"path": item} if isinstance(item, str) else item for item in items]
        short = [item.get("name") or _short_name(item["path"]) for item in items]
        names = [
            item["path"] if "name" not in item and short.count(name) > 1 else name
            for item, name in zip(items, short, strict=True)
        ]
        return [PolicyChoice(i["path"], name, i.get("beta")) for i, name in zip(items, names, strict=True)]


def _short_name(path: str) -> str:
    *folders, name = Path(path).parts or (path,)
    return folders[-1] if name == "final" and folders else name
