"""What the contenders have in common: the work to do, its files, and the watch that cuts training into rounds."""

from __future__ import annotations

import itertools
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dpo_ds.batch import PAIR
from dpo_ds.config import DataSection
from dpo_ds.config.deepspeed import bucket_size
from dpo_ds.data import GroupDataset, prepare
from dpo_ds.data.batching import global_batches
from dpo_ds.demo.tiny import EOS, PAD, special_ids

BETA = 0.1
SHAREGPT_LENGTHS = Path(__file__).with_name("sharegpt_lengths.json")
WORDS = 4096  # of the tokenizer that makes a token of each word
AUTO = "auto"
DEEPSPEED = {  # both trainers fill what is auto or absent, from the same hyper-parameters
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": AUTO,  # ten times the width in both, all in ours on a single rank
    },
    "optimizer": {
        "type": "AdamW",
        "params": {  # torch's fused AdamW: DeepSpeed's own is built with a compiler at the first start
            "lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO, "torch_adam": True, "fused": True,
        },
    },
    "gradient_clipping": AUTO,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What every contender does: the same pairs in the same global batches through the same model.

    Everything lies in `folder`. micro_batch_tokens bounds our forward, TRL's is of peer_pairs pairs. from_config:
    weights are drawn where the model is trained, none are on disk.
    """

    folder: str
    pairs: str  # the file of raw rows
    ranks: int
    pairs_per_rank: int
    micro_batch_tokens: int
    peer_pairs: int
    bf16: bool
    warm_up: int  # steps before the first round
    steps: int  # of a round
    rounds: int
    learning_rate: float = 1e-4
    from_config: bool = False
    activation_checkpointing: bool = False

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    @property
    def deepspeed(self) -> str:
        return f"{self.folder}/zero3.json"

    @property
    def cache(self) -> str:
        """The folder of the reference's precomputed log-probs."""
        return f"{self.folder}/cache"

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.pairs_per_rank

    @property
    def total_steps(self) -> int:
        return self.warm_up + self.rounds * self.steps

    def dataset(self) -> GroupDataset:
        """The tokenised pairs, which `make` has left in DPO_DS_CACHE."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.model)
        options = DataSection(train=self.pairs, on_bad_row="skip")
        return prepare(self.pairs, options=options, tokenizer=tokenizer, sides=PAIR, split="train", build=True)

    def batches(self, data: GroupDataset) -> list[np.ndarray]:
        """Rows of every step's global batch."""
        batches = global_batches(data.sources, 0, self.global_batch_size, first_step=1)
        return [rows for _, rows in itertools.islice(batches, self.total_steps)]

    def command(self, layout: str, reference: str, changes: dict[str, str], zero: dict) -> list[str]:
        """The arguments of `dpo-ds` that train so. changes: further keys; zero: of the DeepSpeed JSON's
        zero_optimization.
        """
        output_dir = Path(self.folder, f"{layout}-{reference}-{zlib.crc32(repr((changes, zero)).encode())}")
        given = DEEPSPEED | {"bf16": {"enabled": self.bf16}}
        deepspeed = output_dir.with_suffix(".json")
        deepspeed.write_text(json.dumps(given | {"zero_optimization": given["zero_optimization"] | zero}))
        keys = {
            "model.path": self.model, "model.from_config": self.from_config, "data.train": self.pairs,
            "data.on_bad_row": "skip", "loss.beta": BETA, "train.layout": layout,
            "train.global_batch_size": self.global_batch_size, "train.micro_batch_tokens": self.micro_batch_tokens,
            "train.learning_rate": self.learning_rate, "train.schedule": "constant",
            "train.max_steps": self.total_steps + 1,  # the end is the harness's to say
            "train.activation_checkpointing": self.activation_checkpointing,
            "deepspeed.config": deepspeed, "output_dir": output_dir,
        }  # fmt: skip
        if reference == "none":  # CPO without its SFT part is DPO's loss without a reference
            keys |= {"loss.name": "cpo", "loss.alpha": 0}
        if reference == "cached":
            keys |= {"reference.kind": "cached", "reference.cache": self.cache}
        return ["train", *(word for key, value in (keys | changes).items() for word in (f"--{key}", str(value)))]

    def make(self, tokenizer: PreTrainedTokenizerFast, shape: dict) -> None:
        """Tokenizer, model, DeepSpeed JSON and tokenised pairs on disk. shape: keys of a Llama's config."""
        tokenizer.save_pretrained(self.model)
        config = LlamaConfig(**shape, max_position_embeddings=4096, architectures=["LlamaForCausalLM"])
        config.update(special_ids(tokenizer))
        config.save_pretrained(self.model)
        if not self.from_config:
            self.drawn_model().save_pretrained(self.model)
        bucket = bucket_size(config.hidden_size)  # TRL's auto is smaller, and slower
        sizes = {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
        given = DEEPSPEED | {"zero_optimization": DEEPSPEED["zero_optimization"] | sizes}
        Path(self.deepspeed).write_text(json.dumps(given | {"bf16": {"enabled": self.bf16}}, indent=1))
        data = self.dataset()
        pairs = (data[int(row)] for rows in self.batches(data) for row in rows)
        columns = ({f"{part}_ids": getattr(pair, part).tolist() for part in ("prompt", *PAIR)} for pair in pairs)
        Dataset.from_list(list(columns)).save_to_disk(f"{self.folder}/trl")

    def drawn_model(self):
        """The model with random weights, the same in every process on the same kind of device."""
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(self.model)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if self.bf16 else torch.float32)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a token of each of `rows_of_lengths`' words, so that a text has as many tokens as it has words."""
    vocabulary = {PAD: 0, EOS: 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def rows_of_lengths(lengths: Iterable[tuple[int, int, int]]) -> Iterator[dict[str, str]]:
    """A pair of random words for each (prompt, chosen, rejected) in tokens, the completions' EOS counted."""
    generator = np.random.default_rng(0)
    for row in lengths:
        prompt, chosen, rejected = (
            " ".join(f"w{word}" for word in generator.integers(WORDS, size=length - (part > 0)))
            for part, length in enumerate(row)
        )
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


class Stopwatch(AbstractContextManager):
    """Cuts training into rounds; it stands where the trainer has its tracker.

    Memory counts from where it is made: all is imported, no model is loaded yet.
    """

    def __init__(self, work: Workload, results: Connection):
        self.steps, self.left, self.results = work.steps, work.warm_up, results
        self.start_bytes = resident_bytes("VmRSS")
        self._start()

    def step(self, metrics: dict) -> None:
        """To be called after every step. A round that ends is reported, and the next begins when the harness says."""
        self.losses.append(metrics["loss"])
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        report = {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
            "memory_bytes": self.peak_bytes(),
            "losses": self.losses,
        }
        self.results.send(report)
        self.results.recv()
        self.left = self.steps
        self.reset_peak()
        self._start()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def __exit__(self, *_) -> None:
        """Keeps nothing open."""

    def _start(self) -> None:
        self.losses: list[float] = []
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def peak_bytes(self) -> int:
        """Most memory held in this round, beyond what the imports took."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.start_bytes

    def reset_peak(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here


def resident_bytes(key: str) -> int:
    """VmRSS: resident now; VmHWM: the most since the process began or the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
