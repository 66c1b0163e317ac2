"""The learning rate against transformers' own schedulers, and the number of steps."""

from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from dpo_ds.config import TrainSection
from dpo_ds.training.schedule import learning_rate, total_steps

SCHEDULES = {  # ours: theirs, and how it is told the same
    "constant": ("constant_with_warmup", {}, {}),
    "linear": ("linear", {}, {}),
    "cosine": ("cosine", {}, {}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {}, {"min_lr_rate": 0.1}),
    "inverse_sqrt": ("inverse_sqrt", {}, {}),
    "wsd": ("warmup_stable_decay", {"decay_ratio": 0.4, "min_lr_ratio": 0.0}, {"num_decay_steps": 4}),
}


@pytest.mark.parametrize("ours", SCHEDULES)
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 3}, {"warmup_ratio": 0.21}])
def test_rates_are_those_of_transformers(ours, warmup):
    theirs, keys, options = SCHEDULES[ours]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    steps = 3 if warmup else 0
    scheduler = get_scheduler(theirs, optimizer, steps, num_training_steps=10, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    run = TrainSection(learning_rate=0.2, schedule=ours, **keys, **warmup)
    got = [learning_rate(step, run, 10) for step in range(1, 11)]
    assert got == pytest.approx(expected, abs=1e-15)
    assert got[steps] == 0.2


def test_wsd_ends_where_it_is_told_to():
    run = TrainSection(learning_rate=1, schedule="wsd", decay_ratio=0.2, min_lr_ratio=0.5)
    assert [learning_rate(step, run, 10) for step in range(8, 12)] == pytest.approx([1, 1, 0.75, 0.5])
    longest = TrainSection(learning_rate=1, schedule="wsd", decay_ratio=1, warmup_steps=8)
    assert [learning_rate(step, longest, 10) for step in (8, 9, 10)] == pytest.approx([7 / 8, 1, 0.55])


def test_what_a_schedule_has_not_is_a_mistake():
    for keys, said in (
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "leave one out"),
        ({"min_lr_ratio": 0.2}, "train.min_lr_ratio 0.2 is of train.schedule cosine_with_min_lr and wsd, not"),
        ({"decay_ratio": 0.2, "schedule": "cosine_with_min_lr"}, "train.decay_ratio 0.2 is of train.schedule wsd, not"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainSection(**keys)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (1.1, 11), (1.11, 12), (3, 30), (0.01, 1)])
def test_epochs_are_rounded_up_to_whole_steps(epochs, steps):
    run = SimpleNamespace(max_steps=None, epochs=epochs, global_batch_size=10)
    assert total_steps([(0, 100, 1.0)], run) == steps
