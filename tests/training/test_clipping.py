"""Five updates on 16 pairs, the gradient clipped and not, against plain torch and, where it is installed, TRL.

The first two losses say nothing of clipping: the first is before any update, and Adam's first step does not see how
long the gradient is. From the third on an update that is clipped without being asked to shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.batch import PAIR
from dpo_ds.config import DataSection
from dpo_ds.data import prepare
from tests import small_jobs

STEPS, PAIRS, BETA, RATE = 5, 16, 0.5, 3e-3
NORMS = (0.0, 1.0)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_jobs.make_world(tmp_path_factory.mktemp("clipping"))


@pytest.fixture(scope="module")
def ours(forks, world):
    """Losses of two ranks by train.max_grad_norm, every step on all pairs."""
    found = {}
    for norm in NORMS:
        keys = {
            "data__limit": PAIRS, "train__global_batch_size": PAIRS, "train__max_steps": STEPS, "loss__beta": BETA,
            "train__learning_rate": RATE, "train__max_grad_norm": norm,
        }  # fmt: skip
        codes, output = small_jobs.run(forks, world, f"norm-{norm}", **keys)
        assert codes == [0, 0], output[-3000:]
        found[norm] = [line["loss"] for line in small_jobs.steps(world / f"norm-{norm}")]
    return found


@pytest.fixture(scope="module")
def pairs(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    source = str(world / "train.jsonl")
    options = DataSection(train=source, limit=PAIRS)
    data = prepare(source, options=options, tokenizer=tokenizer, sides=PAIR, split="train", build=True)
    return [data[row] for row in range(PAIRS)]


def by_torch(world, pairs, norm: float) -> list[float]:
    """The losses of AdamW on the whole batch, in one process with the model's own logits."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    texts = [np.concatenate([pair.prompt, getattr(pair, side)]) for pair in pairs for side in PAIR]
    ids = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True)
    trained = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (pair, side) in enumerate((pair, side) for pair in pairs for side in PAIR):
        trained[row, len(pair.prompt) + pair.target_positions(PAIR.index(side))] = True

    def logratios(model) -> torch.Tensor:  # [pairs]; what follows a text does not change it, as attention is causal
        logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        sums = (logps * trained[:, 1:]).sum(1)
        return sums[0::2] - sums[1::2]

    with torch.no_grad():
        anchors = logratios(reference)
    losses = []
    for _ in range(STEPS):
        loss = -logsigmoid(BETA * (logratios(policy) - anchors)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if norm > 0:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), norm)
        optimizer.step()
    return losses


@pytest.mark.parametrize("norm", NORMS)
def test_five_updates_are_plain_torchs(world, pairs, ours, norm):
    assert ours[norm] == pytest.approx(by_torch(world, pairs, norm), abs=2e-4)


def test_clipping_or_not_is_told_apart_by_these_five(ours):
    assert max(abs(a - b) for a, b in zip(ours[0.0], ours[1.0], strict=True)) > 2e-3


@pytest.mark.parametrize("norm", NORMS)
def test_five_updates_are_trls(world, pairs, ours, norm, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL comes with the extra `bench`")
    from datasets import Dataset

    class SamePairs(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    rows = [{column: getattr(pair, part).tolist() for column, part in columns.items()} for pair in pairs]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=RATE, beta=BETA,
        max_grad_norm=norm, lr_scheduler_type="constant", max_length=None, gradient_checkpointing=False, bf16=False,
        use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    trainer = SamePairs(
        str(world / "model"), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert ours[norm] == pytest.approx(theirs, abs=2e-4)
