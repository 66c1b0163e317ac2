"""What train_throughput.py and gpu.py measure: each contender trains, or computes a pass, on the ranks of a jobs.Job.

A contender gets the workload and the connection of its Stopwatch, which stops it after the warm-up and after every
round until it is told to go on: no start-up is measured. It is ended from outside. In ours rank 0 alone has a tracker,
and so a watch; the others wait for it in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ds.batch import Batch
from dpo_ds.cluster import launch, process_group
from dpo_ds.commands import cli, opening
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout, Lengths, plan
from dpo_ds.models import attention, checks
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.reference import cached
from tests.benchmarks import precompute_pass
from tests.benchmarks.workload import BETA, Stopwatch, Workload


class DrawnRows:
    """In the place of a cache's rows, for a model whose weights are on no disk: the same log-prob for every token."""

    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32, on the CPU
        return torch.full((len(batch.targets),), -10.0)


def ours(
    work: Workload, results: Connection, layout: str, reference: str, changes: dict | None = None,
    zero: dict | None = None,
) -> None:  # fmt: skip
    """`dpo-ds train` itself; the stopwatch stands in for its tracker. It is ended before it saves anything."""
    watch = Stopwatch(work, results)
    replaced = {
        (opening, "Tracker"): lambda *_: watch,
        (checks, "layout_notes"): partial(no_other_layout, checks.layout_notes),
    }
    if reference == "cached" and work.from_config:
        replaced[cached, "check_cache"] = lambda *_: SimpleNamespace(id="drawn", ids=["drawn"], values={})
        replaced[cached, "find_rows"] = lambda *_: DrawnRows()
        replaced[cached, "spot_check"] = lambda *_: []
    for (module, name), stand_in in replaced.items():
        mock.patch.object(module, name, stand_in).start()
    cli.main(work.command(layout, reference, changes or {}, zero or {}))


def no_other_layout(layout_notes: Callable, key: str, refusal: str) -> list[str]:
    """Goes before what tells the user that the model gets another layout than was asked for."""
    assert not refusal, refusal
    return layout_notes(key, refusal)


def trl(work: Workload, results: Connection, precompute: bool) -> None:
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
        output_dir=f"{work.folder}/trl-output",
        per_device_train_batch_size=work.peer_pairs,
        gradient_accumulation_steps=work.pairs_per_rank // work.peer_pairs,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        max_steps=work.total_steps + 1,
        train_sampling_strategy="sequential",
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=work.activation_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=work.bf16,
        use_cpu=not torch.cuda.is_available(),
        bf16=work.bf16,
        model_init_kwargs=None if work.from_config else {"dtype": "bfloat16" if work.bf16 else "float32"},
        deepspeed=work.deepspeed,
    )
    watch = Stopwatch(work, results)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    models = {"model": work.model}
    if work.from_config:
        models = {"model": work.drawn_model(), "ref_model": None if precompute else work.drawn_model()}
    dataset = load_from_disk(f"{work.folder}/trl")
    trainer = SamePairs(**models, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[Rounds()])
    trainer.train()


def bare(work: Workload, results: Connection, update: bool = False) -> None:
    """Forward and backward of this rank's packed micro-batches on a plain model, and AdamW's update of it if asked for:
    no DeepSpeed and no other rank.
    """
    watch = Stopwatch(work, results)
    place, data = launch.from_environment(), work.dataset()
    torch.set_num_threads(place.threads)
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    with device:
        causal_lm = work.drawn_model()
    refusal = attention.use_packed_attention(causal_lm)
    assert refusal is None, refusal
    model = LogProbModel(causal_lm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.learning_rate, fused=True)
    layout = Layout("packed", work.micro_batch_tokens, causal_lm.config.hidden_size)
    for rows in work.batches(data):
        loss_sum = 0.0
        for batch in share(data, rows, layout, place):
            batch = batch.to(device)
            loss = -logsigmoid(BETA * batch.pair_logps(model(batch)).logratio).sum()
            loss.backward()
            loss_sum += loss.item()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        watch.step({"loss": loss_sum / work.pairs_per_rank})


def share(data: GroupDataset, rows: np.ndarray, layout: Layout, place: launch.Launch) -> list[Batch]:
    """The micro-batches that the trainer gives this rank."""
    lengths = Lengths.of(data, rows)
    mine = plan(lengths, layout, place.world_size)[place.rank]
    return [layout.collate([data[int(rows[position])] for position in members]) for members in mine]


@dataclass(frozen=True)
class Contender:
    """run(workload, results) trains. forwards: forward passes' worth of FLOPs that a step needs, backward counting two.
    told: what its `loss` is; those that tell the same must agree. usual: train_throughput.py runs it unasked.
    """

    run: Callable[[Workload, Connection], None]
    forwards: int
    told: str
    usual: bool = True


EAGER = partial(ours, layout="packed", reference="live", changes={"model.compile": "false"})
SELECTIVE = {"train.activation_checkpointing": "false", "train.activation_memory": "selective"}
CONTENDERS = {
    "packed, live reference": Contender(partial(ours, layout="packed", reference="live"), 4, "DPO loss"),
    "packed, live reference, not compiled": Contender(EAGER, 4, "DPO loss", usual=False),
    "padded, live reference": Contender(partial(ours, layout="padded", reference="live"), 4, "DPO loss"),
    "TRL, live reference": Contender(partial(trl, precompute=False), 4, "DPO loss"),
    "TRL, precomputed reference": Contender(partial(trl, precompute=True), 3, "DPO loss"),
    "packed, cached reference": Contender(partial(ours, layout="packed", reference="cached"), 3, "DPO loss"),
    "packed, cached reference, attention kept": Contender(
        partial(ours, layout="packed", reference="cached", changes=SELECTIVE), 3, "DPO loss", usual=False
    ),
    "packed, no reference": Contender(partial(ours, layout="packed", reference="none"), 3, "loss without a reference"),
    "bare forward+backward": Contender(bare, 3, "loss of rank 0's share"),
    "precompute": Contender(precompute_pass.ours, 1, "mean log-prob of chosen", usual=False),
    "precompute, replicas": Contender(
        partial(precompute_pass.ours, engine="none"), 1, "mean log-prob of chosen", usual=False
    ),
    "TRL, precompute": Contender(precompute_pass.trl, 1, "mean log-prob of chosen", usual=False),
}
