"""Three ranks that watch each other; rank 1 hangs, fails alone, or ends as the others do: usage peers.py WHAT.

In the last case they take 3 s before their first step.
"""

import threading
import time

import torch.distributed as dist

from dpo_ds.cluster import rendezvous
from dpo_ds.cluster.launch import from_environment


def main(what: str) -> None:
    meeting = rendezvous.meet(from_environment())
    meeting.compare({})
    rendezvous.wait_for_all()
    dist.init_process_group("gloo")
    peers = rendezvous.peers()
    if what == "end":
        time.sleep(3)
    if what == "load" and dist.get_rank() == 1:
        threading.Event().wait()
    if what == "load":
        dist.barrier()
    if what == "steps":
        print("began", flush=True)
        for step in range(60):
            time.sleep(0.05)
            peers.progress(step)
            dist.barrier()
    peers.progress(7)
    try:
        if what == "hang" and dist.get_rank() == 1:
            threading.Event().wait()
        if what == "fail" and dist.get_rank() == 1:
            raise KeyError("lost")
        dist.barrier()
    except Exception as error:
        peers.fault(error)
        raise
    dist.destroy_process_group()
    meeting.close(0)
