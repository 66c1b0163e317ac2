"""One rank of one contender of train_throughput.py: contenders.py NAME WORKLOAD.json PIPE, as many processes as ranks.

It trains until stdin ends. After the warm-up and after every round it writes one line of JSON to the file descriptor
PIPE and waits for a line on stdin before it goes on: only one contender computes at a time, no start-up is measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[2]))
from dpo_ds.batch import PAIR, Batch  # noqa: E402
from dpo_ds.cluster import launch, process_group
from dpo_ds.cluster.stopping import StopFlag  # noqa: E402
from dpo_ds.cluster.watchdog import Silent  # noqa: E402
from dpo_ds.commands import preflight
from dpo_ds.data import PairDataset  # noqa: E402
from dpo_ds.data.batching import Layout, Lengths, plan  # noqa: E402
from dpo_ds.losses import DPO  # noqa: E402
from dpo_ds.models import attention, engine  # noqa: E402
from dpo_ds.models.causal_lm import LogProbModel  # noqa: E402
from dpo_ds.models.engine import load_frozen  # noqa: E402
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.reference.cached import CachedReference  # noqa: E402
from dpo_ds.reference.live import LiveReference  # noqa: E402
from dpo_ds.training.preference import PreferenceObjective  # noqa: E402
from dpo_ds.training.tasks import task_of  # noqa: E402
from dpo_ds.training.trainer import Objective, Trainer  # noqa: E402
from tests.benchmarks import precompute_pass  # noqa: E402
from tests.benchmarks.workload import BETA, Stopwatch, Workload  # noqa: E402


class Unsaved:
    """In the place of the checkpoints' writer."""

    def look(self) -> None: ...


class ReferenceFree(Objective):
    """A loss of the policy alone: what is left of a step when the reference costs nothing."""

    sides, names = PAIR, ("loss",)

    def weight(self, batch: Batch) -> int:
        return batch.num_pairs

    def __call__(self, policy, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = -logsigmoid(BETA * batch.pair_logps(policy.token_logps(batch)).logratio).sum()
        return loss, loss.detach().double()[None]


def ours(work: Workload, results: TextIO, layout: str, reference: str) -> None:
    """dpo_ds.training.trainer.Trainer with the parts that `dpo-ds train` gives it."""
    watch = Stopwatch(work, results)
    run, place = work.config(layout, reference), launch.from_environment()
    process_group.quiet_libraries()
    device = process_group.enter(place)
    prepared = preflight.prepare(task_of(run), place, Path(run.output_dir))
    causal_lm = load_causal_lm(run.model, prepared.policy_config)
    policy = engine.Policy(LogProbModel(causal_lm), prepared.policy_config, device)
    models, objective = [policy], ReferenceFree()
    if reference == "live":
        models.append(load_frozen(run.model, prepared.reference_config, device))
        objective = PreferenceObjective(DPO(BETA), LiveReference(models[1], policy, run.reference))
    if reference == "cached":
        objective = PreferenceObjective(DPO(BETA), CachedReference(prepared.cached, device))
    settled = engine.settle_layout(layout, models)
    assert settled == (layout, ""), settled
    shape = Layout(layout, PAIR, work.micro_batch_tokens, prepared.hidden_size)
    try:
        Trainer(
            policy, objective, prepared.data, None, shape, run.train, Unsaved(), 0, watch, StopFlag(), Silent()
        ).train(first_step=1)
    finally:
        process_group.leave()


def trl(work: Workload, results: TextIO, precompute: bool) -> None:
    """TRL's DPOTrainer with what it logs and checks by default; only tokenising is ours, so that pairs are equal."""
    import transformers
    from datasets import load_from_disk
    from trl import DPOConfig, DPOTrainer

    class SamePairs(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

    class Rounds(transformers.TrainerCallback):
        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                watch.step(logs)

    process_group.enter(launch.from_environment())
    args = DPOConfig(
        output_dir=work.folder,
        per_device_train_batch_size=work.pairs_per_rank,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        max_steps=work.total_steps + 1,
        train_sampling_strategy="sequential",
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=False,  # nor do we
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=work.bf16,
        use_cpu=not torch.cuda.is_available(),
        bf16=work.bf16,
        model_init_kwargs={"dtype": "bfloat16" if work.bf16 else "float32"},
        deepspeed=work.deepspeed,
    )
    watch = Stopwatch(work, results)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    dataset = load_from_disk(f"{work.folder}/trl")
    trainer = SamePairs(work.model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[Rounds()])
    try:
        trainer.train()
    finally:
        process_group.leave()


def bare(work: Workload, results: TextIO) -> None:
    """Forward and backward of this rank's packed micro-batches on a plain model: no DeepSpeed, update or other rank."""
    watch = Stopwatch(work, results)
    place, data = launch.from_environment(), work.dataset()
    torch.set_num_threads(place.threads)
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    model = LogProbModel(attention_ready(work.model, dtype)).to(device)
    layout = Layout("packed", PAIR, work.micro_batch_tokens, model.causal_lm.config.hidden_size)
    for rows in work.batches(data):
        loss_sum = 0.0
        for batch in share(data, rows, layout, place):
            batch = batch.to(device)
            loss = -logsigmoid(BETA * batch.pair_logps(model(batch)).logratio).sum()
            loss.backward()
            loss_sum += loss.item()
        model.zero_grad()
        watch.step({"loss": loss_sum / work.pairs_per_rank})


def attention_ready(path: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    refusal = attention.use_packed_attention(causal_lm)
    assert refusal is None, refusal
    return causal_lm


def share(data: PairDataset, rows: np.ndarray, layout: Layout, place: launch.Launch) -> list[Batch]:
    """The micro-batches that the trainer gives this rank."""
    lengths = Lengths.of(data, rows)
    mine = plan(lengths, layout, place.world_size)[place.rank]
    return [layout.collate([data[int(rows[position])] for position in members]) for members in mine]


@dataclass(frozen=True)
class Contender:
    """run(workload, results) trains. forwards: forward passes' worth of FLOPs that a step needs, backward counting two.
    told: what its `loss` is; those that tell the same must agree."""

    run: Callable[[Workload, TextIO], None]
    forwards: int
    told: str


CONTENDERS = {
    "packed, live reference": Contender(partial(ours, layout="packed", reference="live"), 4, "DPO loss"),
    "padded, live reference": Contender(partial(ours, layout="padded", reference="live"), 4, "DPO loss"),
    "TRL, live reference": Contender(partial(trl, precompute=False), 4, "DPO loss"),
    "TRL, precomputed reference": Contender(partial(trl, precompute=True), 3, "DPO loss"),
    "packed, cached reference": Contender(partial(ours, layout="packed", reference="cached"), 3, "DPO loss"),
    "packed, no reference": Contender(partial(ours, layout="packed", reference="none"), 3, "loss without a reference"),
    "bare forward+backward": Contender(bare, 3, "loss without a reference"),
    "precompute": Contender(precompute_pass.ours, 1, "mean log-prob of chosen"),
    "precompute, replicas": Contender(partial(precompute_pass.ours, engine="none"), 1, "mean log-prob of chosen"),
    "TRL, precompute": Contender(precompute_pass.trl, 1, "mean log-prob of chosen"),
}


def main(name: str, workload: str, pipe: str) -> None:
    with os.fdopen(int(pipe), "w") as results:
        CONTENDERS[name].run(Workload(**json.loads(Path(workload).read_text())), results)


if __name__ == "__main__":
    main(*sys.argv[1:])
