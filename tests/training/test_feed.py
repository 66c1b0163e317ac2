"""The next batch is prepared while one is used, in order, and what goes wrong there is told here."""

import threading

import numpy as np
import pytest
import torch

from dpo_ds.data.batching import Layout
from dpo_ds.training.feed import Feed
from tests.tiny import random_pairs

CPU = torch.device("cpu")


class Data(list):
    """Pairs that tell when they are read."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.read = []
        self.prompt_lengths = np.array([len(pair.prompt) for pair in pairs])
        self.completion_lengths = np.array([[len(ids) for ids in pair.completions] for pair in pairs])

    def __getitem__(self, row):
        self.read.append((row, threading.current_thread().name))
        return super().__getitem__(row)


def feed(batches, data, rank=0, ranks=1) -> Feed:
    return Feed(batches, data, Layout("packed", 100, 32), rank, ranks, CPU)


def test_batches_come_in_order_and_one_ahead_of_their_use():
    data = Data(random_pairs(6))
    fed = feed([(1, np.array([0, 1])), (2, np.array([2, 3])), (3, np.array([4, 5]))], data)
    for step, batch in enumerate(fed, start=1):
        following = fed.following()
        assert batch.step == step and sorted(row for row, _ in data.read) == list(range(min(6, 2 * step + 2)))
        assert (following is None) == (step == 3)
        assert sorted(i for micro in batch.micro_batches for i in micro.indices) == batch.rows.tolist()
    assert step == 3 and fed.following() is None and fed.waited > 0
    assert {name.startswith("batches") for _, name in data.read} == {True}
    fed.close()


def test_ranks_get_as_many_micro_batches_and_all_pairs_between_them():
    parts = []
    for rank in range(3):
        fed = feed([(1, np.arange(5))], Data(random_pairs(5)), rank, 3)
        parts += list(fed)
        fed.close()
    assert len({len(part.micro_batches) for part in parts}) == 1
    assert sorted(i for part in parts for micro in part.micro_batches for i in micro.indices) == list(range(5))


def test_a_mistake_in_the_data_comes_out_where_the_batch_is_used():
    fed = feed([(1, np.array([0])), (2, np.array([7]))], Data(random_pairs(3)))
    with pytest.raises(IndexError):
        list(fed)
    fed.close()
