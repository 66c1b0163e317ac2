"""Scores of completions: by a Python function, by a regular expression, or by a reward model.

    module:function     your own: function(prompts, completions) -> one number each
    regex:PATTERN       1.0 where PATTERN is found in the completion, else 0.0
    FOLDER or Hub id    a sequence classification model with one label, such as `dpo-ds reward` makes

Higher is better. Numbers are taken as they come; a reward model's stored mean is subtracted.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_ds.cluster.foreign import SHOWN_BY, Limit, Raised, guarded, refusing, time_limit
from dpo_ds.cluster.process_group import on_gpu
from dpo_ds.config import FUNCTION, REGEX, ModelSection, did_you_mean
from dpo_ds.data.formats import Conversation
from dpo_ds.data.tokenize import GroupTokenizer, Tokenized
from dpo_ds.errors import ConfigError, ModelError, UserError, shorten
from dpo_ds.models.fingerprint import weights_digest
from dpo_ds.models.loading import check_complete, check_folder, load_tokenizer
from dpo_ds.models.reward_model import REWARD_MEAN, RewardHead

REWARD_BATCH = 32
NO_LIMIT = 1 << 20  # tokens, for a model that names no number of positions


class Scorer(Protocol):
    """Gives every completion a number, the same whatever else is in the call."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:  # [n] float64
        """UserError, one line, for a score that cannot be had or is not finite."""

    def identity(self) -> str:
        """Returns what the scores depend on, as text: another one means other scores."""


def load_scorer(spec: str, key: str, seconds: float) -> Scorer:
    """The scorer that `--KEY SPEC` names; a reward model's weights are loaded at its first call.

    seconds: for a call of a function or pattern, as the key beside `key` says, its _timeout.

    Raises:
        UserError: one line that names the spec, what is wrong with it and the remedy.
    """
    limit = Limit(seconds, f"{key.rpartition('.')[0]}.score_timeout")
    if spec.startswith(REGEX):
        try:
            return RegexScorer(re.compile(spec.removeprefix(REGEX), re.DOTALL), limit)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"--{key} {spec}: not a regular expression ({error})") from None
    named = FUNCTION.fullmatch(spec)
    if named:
        return FunctionScorer(spec, load_function(*named.groups(), f"--{key} {spec}", limit), limit)
    return ScoringModel(spec, key)


@dataclass(frozen=True)
class RegexScorer:
    """1.0 where the pattern is found, else 0.0; `.` matches line ends too."""

    pattern: re.Pattern
    limit: Limit

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """UserError where the search takes too long, as of a pattern that tries ever more ways on a longer text."""
        scores = []

        def late() -> UserError:
            text = shorten(completions[len(scores)])
            return UserError(f"{self.identity()} did not end {self.limit}; it was at row {len(scores)}, {text}")

        with time_limit(self.limit.seconds, late):
            for text in completions:
                scores.append(float(self.pattern.search(text) is not None))
        return np.array(scores)

    def identity(self) -> str:
        return f"{REGEX}{self.pattern.pattern}"


@dataclass(frozen=True)
class FunctionScorer:
    """A user's function, called with two lists of text; its answer is checked before it counts."""

    spec: str
    function: Callable[[list[str], list[str]], Any]
    limit: Limit

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        prompts, completions = list(prompts), list(completions)
        if not completions:
            return np.zeros(0)
        try:
            with guarded(self.spec, self.limit):
                answer = self.function(prompts, completions)
        except Raised as error:
            raise UserError(f"{error} ({self._where(prompts, completions)})") from error.__cause__
        return checked(answer, self.spec, completions, self.limit)

    def identity(self) -> str:
        """With the module's file; what that imports is not looked at."""
        source = getattr(sys.modules[self.function.__module__], "__file__", None)
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12] if source else "built in"
        return f"{self.spec} {digest}"

    def _where(self, prompts: list[str], completions: list[str]) -> str:
        """Names the first row that fails alone, where one does."""
        row = 0
        try:
            with guarded(self.spec, self.limit):
                for row in range(len(completions)):
                    self.function([prompts[row]], [completions[row]])
        except UserError:
            return f"row {row}, completion {shorten(completions[row])}"
        return f"on {len(completions)} rows together, on none alone"


def forwards_for(count: int) -> int:
    """Returns how many forwards `count` texts take."""
    return math.ceil(count / REWARD_BATCH)


def by_length(ids: Sequence[np.ndarray], forward: Callable, forwards: int) -> np.ndarray:  # [n] float64
    """Gives texts to `forward`, so many times, those of like lengths together; the last times none, where other ranks
    have more texts and need this one.
    """
    order, outputs = sorted(range(len(ids)), key=lambda row: -len(ids[row])), np.zeros(len(ids))
    for turn in range(forwards):
        rows = order[turn * REWARD_BATCH :][:REWARD_BATCH]
        outputs[rows] = forward([ids[row] for row in rows])
    return outputs


class ScoringModel:
    """A classifier of one label over prompt, completion and EOS, read at the last token; scores are float32.

    The text is tokenised as for training. Of one that is longer than the model has positions for, a line says so, and
    the prompt is cut from its start, to half of them at the least, then the completion from its end.
    """

    def __init__(self, path: str, key: str):
        self.path = path
        self.section = ModelSection(path=path)
        self.config = config = _classifier_config(path, key)
        tokenizer = load_tokenizer(self.section, config, path, key)
        self._tokenize = GroupTokenizer(tokenizer, NO_LIMIT, NO_LIMIT - 1)
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
        self._mean = float(getattr(config, REWARD_MEAN, 0.0))
        self._model = None
        self._has_cut = False

    def tokens(self, prompts: Sequence[str], completions: Sequence[str]) -> list[np.ndarray]:
        """Returns each text as the model reads it."""
        conversations = [Conversation.of(*texts) for texts in zip(prompts, completions, strict=True)]
        whole = self._tokenize(conversations) if conversations else []
        return [self._fitting(*both) for both in zip(conversations, whole, strict=True)]

    def scores(self, outputs: np.ndarray, completions: Sequence[str]) -> np.ndarray:
        """Returns the model's outputs as scores: their mean is taken off. UserError where one is not finite."""
        return as_scores(outputs - self._mean, self.path, completions)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        ids = self.tokens(prompts, completions)
        return self.scores(by_length(ids, self._forward, forwards_for(len(ids))), completions)

    def identity(self) -> str:
        return f"{self.path} {weights_digest(self.section, self.path)[:12]} mean {self._mean!r}"

    def _fitting(self, conversation: Conversation, whole: Tokenized) -> np.ndarray:
        group = whole.group
        tokens = group.num_tokens
        if tokens > self._positions:
            room = max(self._positions // 2, self._positions - len(group.chosen))
            group = self._tokenize.within(self._positions, room)([conversation])[0].group
            if not self._has_cut:
                what = f"a text of {tokens} tokens, {shorten(conversation.chosen)}, and others"
                print(f"dpo-ds: {self.path}: cuts {what} longer than its {self._positions} positions", flush=True)
            self._has_cut = True
        return np.concatenate([group.prompt, group.chosen])

    @torch.no_grad()
    def _forward(self, ids: list[np.ndarray]) -> np.ndarray:
        self._model = self._model or self._load()
        device = self._model.device
        # transformers reads the last token that is not this one
        pad = next(token for token in range(len(ids) + 1) if all(token != row[-1] for row in ids))
        self._model.config.get_text_config().pad_token_id = pad
        input_ids = torch.full((len(ids), max(map(len, ids))), pad)
        mask = torch.zeros_like(input_ids)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.from_numpy(tokens)
            mask[row, : len(tokens)] = 1
        logits = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].double().cpu().numpy()

    def _load(self):
        dtype = "auto" if on_gpu() else torch.float32
        with refusing(lambda what: ModelError(f"{self.path}: cannot be loaded: {what}{SHOWN_BY}")):
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=dtype, output_loading_info=True
            )
        check_complete(self.path, set(loading["missing_keys"]))
        if type(getattr(model, "score", None)) is nn.Linear:
            model.score.__class__ = RewardHead  # else bfloat16 weights would round scores, and make ties
        return model.requires_grad_(False).eval().to("cuda" if on_gpu() else "cpu")


def load_function(module: str, name: str, given: str, limit: Limit) -> Callable:
    """MODULE:NAME, imported; given: how the user wrote it, for the message.

    Raises:
        ConfigError: it is not there, or is async.
        UserError: the module raises or does not end (foreign.guarded).
    """
    if module.endswith(".py"):
        raise ConfigError(f"{given}: a module is named without .py; write {module.removesuffix('.py')}:{name}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # the dpo-ds script does not bring it
    try:
        with guarded(f"{given}: importing {module}", limit):  # a module is a program
            found = importlib.import_module(module)
    except Raised as error:
        lacking = error.__cause__
        if not isinstance(lacking, ModuleNotFoundError):
            raise
        if lacking.name is None or not f"{module}.".startswith(f"{lacking.name}."):
            raise ConfigError(f"{given}: module {module} needs {lacking.name}, which is not installed") from None
        where = f"start in the folder of {module.split('.')[0]}.py or set PYTHONPATH to it"
        problem = f"there is no module {lacking.name} in {os.getcwd()} or on PYTHONPATH"
        raise ConfigError(f"{given}: {problem}; {where}") from None
    function = getattr(found, name, None)
    if not callable(function):
        there = [other for other in vars(found) if callable(getattr(found, other)) and not other.startswith("_")]
        problem = "is not a function" if hasattr(found, name) else "is not there"
        raise ConfigError(f"{given}: {name} {problem} in {found.__file__}; {did_you_mean(name, there)}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{given}: {name} is async; write a plain function, with asyncio.run in it")
    return function


def _classifier_config(path: str, key: str):
    folder, given = Path(path), f"--{key} {path}"
    forms = "expected module:function, regex:PATTERN, or a reward model's folder or Hub id"
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(f"{given}: no config.json there, so it is no reward model; {forms}")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1 or ":" in path):
        raise ModelError(f"{given}: does not exist; {forms}")
    with refusing(lambda what: ModelError(f"{given}: no usable model config: {what}; {forms}")):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not any("SequenceClassification" in name for name in config.architectures or []):
        kind = ", ".join(config.architectures or ["unknown"])
        raise ModelError(f"{given}: is a {kind}, no sequence classification model; dpo-ds reward trains one")
    if config.num_labels != 1:
        raise ModelError(f"{given}: has {config.num_labels} labels; a reward model has one (num_labels 1)")
    if folder.is_dir():
        check_folder(folder, path, key)
    return config


def checked(answer: Any, who: str, completions: Sequence[str], limit: Limit) -> np.ndarray:
    """What a function returned, read as `as_scores` does; it may be an object that fails at that in any way."""
    try:
        with guarded(f"{who} returned an object that", limit):
            try:
                return as_scores(answer, who, completions)
            except UserError as error:
                mistake = error
    except Raised as error:
        raise UserError(f"{error}, where {len(completions)} numbers are read from it") from error.__cause__
    raise mistake


def as_scores(answer: Any, who: str, completions: Sequence[str]) -> np.ndarray:
    """float64 [n]; UserError for another count, or for a score that is no finite number."""
    wanted = len(completions)
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu()
        answer = answer.numpy() if answer.is_complex() else answer.double().numpy()
    if inspect.iscoroutine(answer):
        answer.close()  # else Python warns that nobody has waited for it
    try:
        if isinstance(answer, (dict, str)):
            raise TypeError
        count = len(answer)
    except TypeError:
        rule = f"it must return {wanted} numbers, one for each completion"
        raise UserError(f"{who} returned {shorten(answer)}; {rule}") from None
    if count != wanted:
        raise UserError(f"{who} returned {count} scores for {wanted} completions; it must return one for each")
    values = list(itertools.islice(answer, wanted + 1))  # an object may say one thing and do another, without end
    if len(values) != wanted:
        raise UserError(f"{who} returned an object of length {wanted} that holds another number of scores")
    scores = np.zeros(wanted)
    for row, value in enumerate(values):
        try:
            scores[row] = math.nan if _is_complex(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            scores[row] = math.nan
        if not math.isfinite(scores[row]):
            where = f"row {row}, completion {shorten(completions[row])}"
            raise UserError(f"{who} returned {shorten(value)} for {where}; a score must be a finite number")
    return scores


def _is_complex(value: Any) -> bool:
    """numpy's would lose their imaginary part with a warning."""
    return isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
