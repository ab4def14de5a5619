"""Where the ranks of a job meet: at a port that the first rank's system picks, written into the run folder.

A fixed or computed port may be taken, by another job on the node or by the attempt before, and a rank that asks a
stranger's port waits without end. The run folder is shared, or there would be no checkpoints.
"""

import json
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipeline import paths
from pipeline.errors import UserError
from pipeline.launch.attempts import Attempt

LIMIT_S = 300
STORE_TIMEOUT = timedelta(minutes=10)


def meet(folder: Path, attempt: Attempt, host: str, rank: int, size: int) -> dist.TCPStore:
    """The store over which the ranks of `attempt` find one another; rank 0 runs on `host`.

    Raises:
        UserError: rank 0 did not turn up.
    """
    place = folder / f"meeting-{attempt}.json"
    if rank == 0:
        for old in folder.glob("meeting-*.json"):
            old.unlink()
        store = dist.TCPStore(host, 0, size, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
        with paths.written_atomically(place) as temporary:
            temporary.write_text(json.dumps({"host": host, "port": store.port}))
        return store
    deadline = time.monotonic() + LIMIT_S
    while place not in folder.iterdir():  # a listing has a network file system look again
        if time.monotonic() > deadline:
            raise UserError(f"rank 0 on {host} did not open a port within {LIMIT_S} s: {place} is missing")
        time.sleep(0.1)
    at = json.loads(place.read_text())
    return dist.TCPStore(at["host"], at["port"], size, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
