"""Three ranks that watch each other; rank 1 hangs, fails alone, or ends as the others do: usage peers.py WHAT.

In the last case they take 3 s before their first step.
"""

import threading
import time

import torch.distributed as dist

from dpo_ds.cluster.watchdog import PeerWatch


def main(what: str) -> None:
    dist.init_process_group("gloo")
    peers = PeerWatch(lambda reason: None)
    if what == "end":
        time.sleep(3)
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
    peers.close()
    dist.destroy_process_group()
