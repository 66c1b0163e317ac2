"""Two ranks and a row that they compute together: its log-probs and gradients are those of one rank."""

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from dpo_ds.batch import Batch, Group, packed_batch
from dpo_ds.cluster import collectives
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.layers.activations import save_activation_memory
from dpo_ds.models.loading import switch_dropout_off
from tests.families import VOCABULARY, tiny_config_of

LENGTHS = ((9, 4, 7, 3), (1, 1, 5), (0, 3, 2, 6, 4), (40, 1, 30))  # prompt and completions
CASES = (  # family, what layers keep, changes of its config
    ("gemma2", "checkpoint", {"sliding_window": 6}),  # soft-caps, too
    ("llama", "offload", {"num_key_value_heads": 1}),
    ("deepseek_v3", "none", {}),  # values narrower than keys
    (
        "phi3",
        "none",
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20,
                "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            },
        },
    ),
)  # fmt: skip


def batch() -> Batch:
    numbers, groups = np.random.default_rng(0), []
    for prompt, *completions in LENGTHS:
        ids = [numbers.integers(3, VOCABULARY, size=length) for length in completions]
        groups.append(
            Group(numbers.integers(3, VOCABULARY, size=prompt), tuple(ids), tuple(np.ones(len(y), bool) for y in ids))
        )
    return packed_batch(groups)


def model_of(family: str, how: str, changes: dict) -> LogProbModel:
    config = tiny_config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    switch_dropout_off(config)
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    assert use_packed_attention(causal_lm) is None
    save_activation_memory(causal_lm, how)
    return LogProbModel(causal_lm)


def found(model: LogProbModel, row: Batch) -> list[torch.Tensor]:
    """Log-probs, entropies and the like, then gradients, summed over the ranks that share the row."""
    model.zero_grad()
    outputs = model(row, with_statistics=True)
    (outputs[0] * torch.linspace(-1, 1, len(outputs[0]))).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*(output.detach() for output in outputs), *map(collectives.reduce_sequence, gradients)]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for family, how, changes in CASES:
        model = model_of(family, how, changes)
        for row in (batch(), packed_batch([])):
            collectives.form_sequence_groups(1)
            alone = found(model, row)
            collectives.form_sequence_groups(2)
            for ours, theirs in zip(found(model, row.spread(2, rank)), alone, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{family}: {ours} {theirs}")
    dist.destroy_process_group()
