"""The head under ZeRO-3, two real ranks: one launch, this file itself being what each rank runs."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

V, LENGTH = 61, 9
CASES = [(False, False), (True, True)]  # (head tied, activation checkpointing)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("head_zero3")
    codes = run_ranks([sys.executable, __file__, str(folder)], ranks=2, folder=folder)
    assert codes == [0, 0], "\n".join((folder / f"rank-{r}.log").read_text()[-4000:] for r in range(2))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("tied,checkpointed", CASES)
def test_gradients_equal_the_unsharded_ones(results, tied, checkpointed):
    for step in results[f"{tied}-{checkpointed}"]:  # rank 1 has no token in the first step, rank 0 none in the second
        assert step["tokens"] in ([5, 0], [0, 3])
        assert step["parameters"] == (11 if tied else 12)
        assert step["largest_gradient_error"] < 1e-6


@pytest.mark.parametrize("tied,checkpointed", CASES)
def test_policy_and_reference_agree_bit_for_bit(results, tied, checkpointed):
    first, second = results[f"{tied}-{checkpointed}"]
    assert first["bit_equal"] == [True, True]
    assert second["bit_equal"] == [True, False]  # after an update, and rank 0 has nothing to compare


class LogProbs(nn.Module):
    """As the trainer uses the head: an engine's module whose forward returns token log-probs."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, ids, rows, targets):
        hidden = self.causal_lm.base_model(ids, use_cache=False).last_hidden_state
        return self.causal_lm.get_output_embeddings()(hidden.flatten(0, 1)[rows], targets)


def batch_of(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    count = {(0, 0): 5, (1, 1): 3}.get((rank, step), 0)
    ids = torch.randint(V, (1, LENGTH), generator=generator)
    rows, targets = (torch.randint(limit, (count,), generator=generator) for limit in (LENGTH, V))
    return (ids, rows, targets), torch.randn(count, generator=generator)


def run_case(tied, checkpointed, rank, ranks):
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_ds.logprobs.head import install_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, tie_word_embeddings=tied,
    )  # fmt: skip
    unsharded = LogProbs(LlamaForCausalLM(config))
    policy_model, reference_model = copy.deepcopy(unsharded), copy.deepcopy(unsharded)
    for model in (unsharded, policy_model, reference_model):
        install_head(model.causal_lm, backend="eager" if model is unsharded else "chunked")
    if checkpointed:
        policy_model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    zero = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}}
    policy, *_ = deepspeed.initialize(
        model=policy_model, model_parameters=policy_model.parameters(), config=zero | adam
    )
    reference, *_ = deepspeed.initialize(model=reference_model, config=zero)
    policy.train()
    reference.eval()
    steps = []
    for step in range(2):
        batches = [batch_of(r, step) for r in range(ranks)]
        inputs, grad = batches[rank]
        with torch.no_grad():
            reference_logps = reference(*inputs)
        logps = policy(*inputs)
        policy.backward((logps * grad).sum())

        unsharded.zero_grad()
        sum((unsharded(*i) * g).sum() / ranks for i, g in batches).backward()
        errors = []
        for ours, oracle in zip(policy_model.parameters(), unsharded.parameters(), strict=True):
            got = safe_get_full_grad(ours)  # all ranks enter
            errors.append(((got - oracle.grad).norm() / oracle.grad.norm()).item())
        equal = [None] * ranks
        dist.all_gather_object(equal, torch.equal(logps.detach(), reference_logps))
        steps.append({
            "tokens": [len(g) for _, g in batches],
            "parameters": len(errors),
            "largest_gradient_error": max(errors),
            "bit_equal": equal,
        })  # fmt: skip
        policy.step()
        with torch.no_grad():
            for ours, oracle in zip(policy_model.parameters(), unsharded.parameters(), strict=True):
                oracle.copy_(safe_get_full_fp32_param(ours))
    return steps


def main(folder):
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built by a C++ compiler otherwise
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {f"{tied}-{checkpointed}": run_case(tied, checkpointed, rank, ranks) for tied, checkpointed in CASES}
    if rank == 0:
        with open(f"{folder}/results.json", "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    from dpo_ds.__main__ import end

    main(sys.argv[1])
    end(0)
