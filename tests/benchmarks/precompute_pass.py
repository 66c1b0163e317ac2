"""The pass over the pairs that computes the reference's log-probs once: `dpo-ds precompute`'s and TRL's.

A step is a pass over a global batch, which has as many pairs as a pass is to take: --pairs-per-rank 64, say. Models are
loaded and pairs tokenised before; forwards, gathering and the files that keep the result count.
"""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.commands import precompute as command
from dpo_ds.config import PrecomputeConfig
from dpo_ds.data.batching import Layout
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import FrozenModel, Replica
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.reference.cache import SHARDS
from tests.benchmarks.workload import Stopwatch, Workload

TRL_BATCH = 8  # pairs in a forward: per_device_train_batch_size's default, which TRL takes


def ours(work: Workload, results: Connection, engine: str | None = None) -> None:
    """The command's own computing and writing, of one shard a rank. engine: DeepSpeed's JSON, as in training; none."""
    watch = Stopwatch(work, results)
    folder = Path(work.folder, f"pass-{engine}")
    sections = {"model": {"path": work.model}, "data": {"train": work.pairs, "on_bad_row": "skip"}}
    sections |= {"reference": {"cache": str(folder)}, "deepspeed": {"config": engine or work.deepspeed}}
    run, place = PrecomputeConfig.model_validate(sections), launch.from_environment()
    quiet_libraries()
    device = enter(place)
    job = command.prepare(run, place)
    model = LogProbModel(load_causal_lm(run.model, job.engine or {"bf16": {"enabled": False}}))
    model = Replica(model, device) if job.engine is None else FrozenModel(model, job.engine, device)
    settled = settle_layout(run.precompute.layout, [model])
    assert settled == ("packed", ""), settled
    layout = Layout("packed", run.precompute.micro_batch_tokens, job.hidden_size)
    try:
        for rows in work.batches(work.dataset()):
            shards = [
                shard[np.argsort(-job.lengths[shard].sum(1), kind="stable")] for shard in np.split(rows, work.ranks)
            ]
            job = replace(job, shards=shards)
            todo = range(work.ranks)
            if job.engine is None:
                command.compute_shards(model, job, todo[place.rank :: work.ranks], layout, folder, {}, 0, 1, False)
            else:
                command.compute_shards(model, job, todo, layout, folder, {}, place.rank, work.ranks, False)
            dist.barrier()
            written = [SHARDS.read(job.path(folder, shard))[0].chosen for shard in todo]
            watch.step({"loss": float(sum(logps.sum() for logps in written) / len(rows))})
    finally:
        leave()


def trl(work: Workload, results: Connection) -> None:
    """What TRL's DPOTrainer does with precompute_ref_log_probs, on token ids that are ours."""
    import transformers
    from datasets import load_from_disk
    from trl import DPOConfig, DPOTrainer

    class SamePairs(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

    enter(launch.from_environment())
    args = DPOConfig(
        output_dir=work.folder,
        per_device_train_batch_size=TRL_BATCH,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=work.bf16,
        use_cpu=not work.bf16,
        bf16=work.bf16,
        model_init_kwargs={"dtype": "bfloat16" if work.bf16 else "float32"},
        deepspeed=work.deepspeed,
    )
    watch = Stopwatch(work, results)
    pairs, size = load_from_disk(f"{work.folder}/trl"), work.global_batch_size
    passes = [pairs.select(range(start, start + size)) for start in range(0, len(pairs), size)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    try:
        trainer = SamePairs(work.model, args=args, train_dataset=passes[0], processing_class=tokenizer)  # with its pass
        watch.step({"loss": float(np.mean(trainer.train_dataset["ref_chosen_logps"]))})
        for each in passes[1:]:
            done = trainer._precompute_ref_logps(each, "train", TRL_BATCH)
            watch.step({"loss": float(np.mean(done["ref_chosen_logps"]))})
    finally:
        leave()
