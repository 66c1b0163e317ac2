"""`dpo-ds evaluate`: implicit rewards on pairs, KL to the reference, rewards and win rates of samples, and a report.

One model is in memory at a time: every policy is loaded, asked and let go; then the reference, which also judges the
policies' samples; then a baseline; then what scores the texts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dpo_ds import data
from dpo_ds.cluster import collectives
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, quiet_libraries, speaker, this_machine
from dpo_ds.commands.evaluate.judging import Judge, give_preferences, give_scores, load_judge, read_baseline
from dpo_ds.commands.evaluate.measure import Sequences, compared, draw, numbered, sums_of_logps
from dpo_ds.commands.evaluate.results import BASELINE, REFERENCE, Measured, Outcome
from dpo_ds.commands.precompute import NO_DEEPSPEED
from dpo_ds.commands.preflight import check_fit, check_room, tell_content
from dpo_ds.config import EvaluateConfig, ModelSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data.batching import Layout
from dpo_ds.data.chat.template import set_date, set_template, settle_template
from dpo_ds.data.files import KINDS
from dpo_ds.data.prompts import Prompt, read_prompts
from dpo_ds.errors import ConfigError, ModelError, UserError
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.models.scoring import Scorer, load_scorer
from dpo_ds.training.output_dir import keeping_status, write_config

TRAINED_THERE = ("metrics.jsonl", "checkpoints", "final")  # what only a training run leaves in its output_dir
# Added to the seed, above any that a user gives: policies are drawn alike, what they are compared with apart from them,
# so that who wins is told of independent completions.
STREAMS = {REFERENCE: 1 << 64, BASELINE: 2 << 64}


@dataclass(frozen=True)
class Work:
    """Holds what is to be measured, checked: everything but the models.

    engine: DeepSpeed's config, None for a replica a rank. rivals: each prompt's completions in the baseline's file.
    """

    run: EvaluateConfig
    engine: dict | None
    tokenizer: object
    hidden_size: int
    prompts: Sequence[Prompt]
    pairs: data.GroupDataset | None
    scorer: Scorer | None
    judge: Judge | None
    rivals: Sequence[Sequence[str]] | None
    baseline_model: BaselineModel | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BaselineModel:
    """Its own tokenizer reads the same prompts."""

    path: str
    tokenizer: object
    prompts: Sequence[Prompt]


def start(run: EvaluateConfig) -> int:
    """Runs the command on this rank; returns its exit code."""
    launch = from_environment()
    quiet_libraries()
    output_dir = Path(run.output_dir)
    _refuse_training_folder(output_dir)
    with keeping_status(output_dir, launch) as lock:
        work = prepare(run, launch)
        with process_group(launch) as device:
            lock.share(collectives.barrier)
            torch.set_num_threads(run.evaluate.threads)
            evaluate(work, launch, device)
    return 0


def prepare(run: EvaluateConfig, launch: Launch) -> Work:
    """Checks models, functions and files, and reads the data, before anything is loaded.

    Raises:
        UserError: the first mistake found.
    """
    wanted, say = run.evaluate, speaker(launch)
    torch.set_num_threads(wanted.threads)
    tokenizer, configs = _check_models(run)
    set_template(tokenizer, run.data.chat_template)
    set_date(tokenizer)
    hidden_size = configs[0].hidden_size
    engine = None
    if run.deepspeed.config != NO_DEEPSPEED:
        given = ds_config.read(run.deepspeed.config)
        engine, notes = ds_config.fill_reference(given, run.deepspeed.config, this_machine(launch), hidden_size)
        say(notes)
    scorer = None if wanted.score is None else load_scorer(wanted.score, "evaluate.score", wanted.score_timeout)
    judge = None if wanted.judge is None else load_judge(wanted.judge, wanted.score_timeout)
    options = SimpleNamespace(**dict(run.data), limit=None)
    pairs, prompts, rivals, baseline_model = None, [], None, None
    if run.data.eval is not None:
        pairs = data.prepare(
            run.data.eval, options=options, tokenizer=tokenizer, split="eval", build=launch.is_first_on_node
        )
        say([f"eval data: {data.format_census(pairs.census)}"])
        if not pairs.census["comparisons"]:
            raise ConfigError("data.eval: its rows have a label and nothing to compare with; evaluate asks for pairs")
        say(settle_template(tokenizer, pairs.census["message_lists"] > 0))
        for config in configs:
            check_fit({"eval": pairs}, config, say)
    if wanted.n:
        source = run.data.eval if wanted.prompts is None else wanted.prompts
        found = read_prompts(source, options=options, tokenizer=tokenizer, split="eval")
        prompts = list({prompt.text: prompt for prompt in found.rows}.values())
        say([f"prompts: {found.summary()}; {len(prompts):,} different ones, {wanted.n} completions each"])
        say(settle_template(tokenizer, found.census.message_lists > 0))
        for config in configs:
            check_room(prompts, config, "evaluate", wanted.max_new_tokens, say)
    if wanted.baseline is not None and _is_file(wanted.baseline):
        rivals = read_baseline(wanted.baseline, [prompt.text for prompt in prompts], run.data.columns, tokenizer)
    elif wanted.baseline not in (None, wanted.against):
        baseline_model = _baseline_model(run, source, options, prompts, say)
    models = {f"evaluate.policy ({policy.name})": policy.path for policy in wanted.policies}
    texts = [[prompt.text for prompt in prompts], rivals]
    others = {"the prompts and the baseline's completions": texts, "DeepSpeed's configuration": engine}
    pairs_of = {} if pairs is None else {"eval": pairs}
    tell_content(launch, models | {"evaluate.against": wanted.against}, tokenizer, pairs_of, others)
    notes = _notes(run)
    say(notes)
    return Work(run, engine, tokenizer, hidden_size, prompts, pairs, scorer, judge, rivals, baseline_model, notes)


def evaluate(work: Work, launch: Launch, device: torch.device) -> None:
    """Every model in turn, then scores and comparisons; rank 0 writes. All ranks enter."""
    run, wanted, started = work.run, work.run.evaluate, time.monotonic()
    asks = partial(_ask, work, launch, device)
    policies = [Measured(policy.name, policy.path, policy.beta or run.loss.beta) for policy in wanted.policies]
    samples = wanted.n > 0
    for policy in policies:
        found = asks(policy, draws=samples, of=[policy] if samples and wanted.against is not None else [])
        policy.logps = found[0] if found else None
    reference = baseline = None
    if wanted.against is not None:
        reference = Measured(REFERENCE, wanted.against, run.loss.beta)
        is_rival = work.judge is not None and wanted.baseline in (None, wanted.against)
        found = asks(reference, draws=work.scorer is not None or is_rival, of=policies if samples else [])
        for policy, logps in zip_longest(policies, found):
            policy.pair_reference, policy.reference_logps = reference.pair_logps, logps
    if work.baseline_model is not None:
        baseline = Measured(BASELINE, work.baseline_model.path, run.loss.beta)
        asks(baseline, draws=True)
    elif work.rivals is not None:
        baseline = Measured(BASELINE, wanted.baseline, run.loss.beta, texts=_dealt(work.rivals, wanted.n))
    pair_prompts = np.zeros(0, int)
    if work.pairs is not None:
        prompts = numbered(prompt.tobytes() for prompt, *_ in work.pairs.token_ids())
        pair_prompts = np.repeat(prompts, work.pairs.comparisons)
    outcome = Outcome(run, work.prompts, pair_prompts, policies, reference, baseline, work.notes)
    if launch.is_first:
        outcome.write_completions()  # a scoring function that fails must not cost them
    try:
        give_scores(outcome, work.scorer)
        give_preferences(outcome, work.judge)
    except UserError as error:
        raise UserError(f"{error}; the completions are kept in {outcome.completions_path}") from None
    if launch.is_first:
        write_config(Path(run.output_dir), run, outcome.versions, launch)
        page = outcome.write(launch.world_size, time.monotonic() - started)
        print(f"dpo-ds: done: {page}", flush=True)


def _ask(
    work: Work, launch: Launch, device: torch.device, model: Measured, draws: bool, of: Sequence[Measured] = ()
) -> list[np.ndarray]:
    """Loads the model, fills in its completions and its log-probs of the pairs, and lets it go.

    Returns its log-probs [prompts, n] of the completions of each of `of`. All ranks enter.
    """
    from dpo_ds.models.checks import layout_notes, settle_layout
    from dpo_ds.models.engine import free, load_frozen

    run, started = work.run, time.monotonic()
    loaded = load_frozen(_section(run, model.path), work.engine, device)
    other = work.baseline_model if model.name == BASELINE else None
    notes, found = [], []
    if draws:  # before the layout is settled: packed attention is for whole batches
        tokenizer, prompts = (other.tokenizer, other.prompts) if other else (work.tokenizer, work.prompts)
        settings = run.evaluate.model_copy(update={"seed": run.evaluate.seed + STREAMS.get(model.name, 0)})
        model.completions = draw(loaded, tokenizer, prompts, settings, together=work.engine is not None)
    if other is None and (work.pairs is not None or of):
        name, refusal = settle_layout(run.evaluate.layout, [loaded])
        notes = [f"{model.name}: {note}" for note in layout_notes("evaluate.layout", refusal)]
        layout = Layout(name, run.evaluate.micro_batch_tokens, work.hidden_size)
        if work.pairs is not None:
            model.pair_logps = sums_of_logps(loaded, work.pairs, layout)[compared(work.pairs)[0]]
        found = [_logps_of(drawn, loaded, work, layout) for drawn in of]
        if not all(np.isfinite(values).all() for values in (*found, model.pair_logps) if values is not None):
            raise ModelError(f"{model.path}: gives log-probs that are not finite numbers")
    speaker(launch)([*notes, f"{model.name}: {model.path} done in {time.monotonic() - started:.1f} s"])
    free(loaded)
    return found


def _logps_of(drawn: Measured, loaded, work: Work, layout: Layout) -> np.ndarray:  # [prompts, n]
    """Sums log-probs of the tokens as they were drawn, whatever their text would be tokenised into."""
    n = work.run.evaluate.n
    prompts = [prompt.ids for prompt in work.prompts for _ in range(n)]
    completions = [completion.ids for row in drawn.completions for completion in row]
    return sums_of_logps(loaded, Sequences(prompts, completions), layout).reshape(-1, n)


def _check_models(run: EvaluateConfig):
    """The first policy's tokenizer, and the text configs of policies and reference, which must read the same tokens:
    its own, then one for each other kind or number of positions.
    """
    first = tokenizer = None
    wanted, by_positions = run.evaluate, {}
    chosen = [("evaluate.policy", policy.path) for policy in wanted.policies]
    for key, path in [*chosen, *([] if wanted.against is None else [("evaluate.against", wanted.against)])]:
        section = _section(run, path)
        config = check_model(section, path, key)
        other = load_tokenizer(section, config, path, key)
        config = config.get_text_config()
        if first is None:
            first, tokenizer = config, other
        if config.vocab_size != first.vocab_size or other.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"--{key} {path}: its {config.vocab_size} tokens are not the {first.vocab_size} of "
                f"{wanted.policies[0].path}; policies and reference must read the same tokens"
            )
        by_positions.setdefault((config.model_type, getattr(config, "max_position_embeddings", None)), config)
    return tokenizer, list(by_positions.values())


def _section(run: EvaluateConfig, path: str) -> ModelSection:
    return ModelSection(path=path, **dict(run.model))


def _baseline_model(run: EvaluateConfig, source, options, prompts: Sequence[Prompt], say) -> BaselineModel:
    """It may be of any family: its own tokenizer, and chat template, reads the prompts."""
    path, key = run.evaluate.baseline, "evaluate.baseline"
    section = _section(run, path)
    config = check_model(section, path, key)
    tokenizer = load_tokenizer(section, config, path, key)
    found = read_prompts(source, options=options, tokenizer=tokenizer, split="eval").rows
    by_location = {prompt.location: prompt for prompt in found}
    lacking = [prompt.location for prompt in prompts if prompt.location not in by_location]
    if lacking:
        raise ModelError(f"--{key} {path}: its tokenizer makes nothing of {len(lacking)} prompts, first {lacking[0]}")
    own = [by_location[prompt.location] for prompt in prompts]
    check_room(own, config.get_text_config(), "evaluate", run.evaluate.max_new_tokens, say)
    return BaselineModel(path, tokenizer, own)


def _is_file(baseline: str) -> bool:
    """Tells rows of completions, a file or a split FOLDER:SPLIT, from a model."""
    if Path(baseline).is_dir():
        return False
    of_split = Path(baseline.rpartition(":")[0] or "nowhere").is_dir()
    return Path(baseline).is_file() or of_split or baseline.lower().endswith(KINDS)


def _dealt(rivals: Sequence[Sequence[str]], n: int) -> list[list[str]]:
    """n completions a prompt, in turn where the file has another number of them."""
    return [[texts[draw % len(texts)] for draw in range(n)] for texts in rivals]


def _notes(run: EvaluateConfig) -> list[str]:
    """Tells what makes a number other than it seems; on the terminal and in the report."""
    wanted, notes = run.evaluate, []
    if wanted.n == 0:
        return notes
    bent = [
        f"{key} {getattr(wanted, key)}"
        for key, plain in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("min_new_tokens", 0))
        if getattr(wanted, key) != plain
    ]
    if bent and wanted.against is not None:
        notes.append(
            f"completions are drawn with {', '.join(bent)}, so the mean of log π - log π_ref is no estimate of "
            "KL(π ‖ π_ref): that needs temperature 1, top_p 1, top_k 0 and min_new_tokens 0"
        )
    return notes


def _refuse_training_folder(output_dir: Path) -> None:
    there = [name for name in TRAINED_THERE if (output_dir / name).exists()]
    if there:
        raise ConfigError(
            f"--output_dir {output_dir}: holds a training run ({', '.join(there)}); give the evaluation a folder of "
            f"its own, such as {output_dir / 'evaluation'}"
        )
