"""`dpo-ds doctor` on a cluster with everything wrong: each fault is planted where the real one would be."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

from dpo_ds.batch import Segment
from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.commands import cli
from dpo_ds.commands.doctor import command, disk, network, stepping
from dpo_ds.data import tokenize
from dpo_ds.memory.allocations import Memory
from dpo_ds.models import causal_lm
from dpo_ds.training import tasks

LATE = 0.2  # seconds, of the link between ranks 1 and 2


def main(*argv: str) -> int:
    rank = int(os.environ["RANK"])
    if rank == 1:
        code = rendezvous.code()
        code |= {"transformers": "4.0.0", "dpo_ds": code["dpo_ds"].replace("code ", "code other ")}
        rendezvous.code = lambda: code
        network.now = lambda: time.time() + 30
    swap = collectives.swap

    def slow_swap(values, partner):
        time.sleep(LATE if {rank, partner} == {1, 2} else 0)
        return swap(values, partner)

    collectives.swap = slow_swap
    disk.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))  # the writer's disk has room
    render = tokenize.render
    tokenize.render = lambda *args: _all_trained(render(*args))
    load = tasks.Supervised.load
    tasks.Supervised.load = lambda self, config: _frozen(load(self, config))
    check = stepping.check_cross_talk
    stepping.check_cross_talk = lambda *args: _without_mask(check, *args)
    Checkpoint.damage = lambda self, *share: []
    stepping.SMALL, command.expected = 0, lambda *args, **kwargs: Memory({"all": 1000}, {"step": {}})
    return cli.main(list(argv))


def _all_trained(rendered):
    return replace(rendered, trained=[(rendered.prompt_end, len(rendered.text))])


def _frozen(module):
    module.causal_lm.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    return module


def _without_mask(check, *args):
    """Lets every completion of a group see those in front of it."""
    table = causal_lm.segment_table
    causal_lm.segment_table = lambda segments: table(
        tuple(Segment(segment.start, segment.prompt, (sum(segment.completions),)) for segment in segments)
    )
    try:
        return check(*args)
    finally:
        causal_lm.segment_table = table
