"""The learning rate against transformers' own schedulers, and the number of steps."""

from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from dpo_ds.training.trainer import learning_rate, total_steps


@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_rates_are_those_of_transformers(ours, theirs, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    got = [learning_rate(step, 0.2, ours, warmup_steps, 10) for step in range(1, 11)]
    assert got == pytest.approx(expected, abs=1e-15)
    assert got[warmup_steps] == 0.2


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (1.1, 11), (1.11, 12), (3, 30), (0.01, 1)])
def test_epochs_are_rounded_up_to_whole_steps(epochs, steps):
    run = SimpleNamespace(max_steps=None, epochs=epochs, global_batch_size=10)
    assert total_steps([(0, 100, 1.0)], run) == steps
