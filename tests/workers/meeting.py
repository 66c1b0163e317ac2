"""What two ranks do between meeting and their first collective. main(CASE)"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dpo_ds.cluster import rendezvous
from dpo_ds.cluster.launch import from_environment
from dpo_ds.errors import ConfigError


def main(case: str) -> int:
    launch = from_environment()
    if case == "different code" and launch.rank == 1:
        rendezvous.code = lambda: {name: "another" for name in ("dpo_ds", *rendezvous.PACKAGES)}
    try:
        meeting = rendezvous.meet(launch)
        meeting.compare({"train.seed": 5 if case == "different seed" and launch.rank == 1 else 3})
        if case == "different weights":
            rendezvous.found("the weights in /m", "abc" if launch.rank == 0 else "def")
        if launch.rank == 1:
            prepare(case, meeting)
        rendezvous.wait_for_all()
        dist.init_process_group("gloo", timeout=timedelta(seconds=3))
        ranks = torch.ones(())
        dist.all_reduce(ranks)
        print(f"rank {launch.rank}: {ranks.item():.0f} ranks")
        dist.destroy_process_group()
    except (ConfigError, RuntimeError) as error:
        print(f"rank {launch.rank}: {type(error).__name__}: {error}")
        meeting.let_rank_0_go_first()
        meeting.close(2)
        return 2
    meeting.close(0)
    return 0


def prepare(case: str, meeting: rendezvous.Meeting) -> None:
    if case == "long":
        time.sleep(5)  # longer than a collective may take, longer than a rank may be silent
    elif case == "dies":
        os._exit(9)
    elif case == "freezes":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "mistake":
        mistake = "data.train /local/pairs.jsonl: no such file"
        print("rank 1: it speaks" if meeting.speaks(mistake) else "rank 1: rank 0 speaks")
        raise ConfigError(mistake)
