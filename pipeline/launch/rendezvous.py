"""Where the ranks of a job meet: a port that follows from the job's id and restart, the next one where it is taken.

Ports cannot be fixed: two jobs may share a node, and after a requeue the old one may still be closing. Each candidate
is tried by rank 0 in turn, and by the others until one answers with the name of this very attempt.
"""

import time
import zlib
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.launch.attempts import Attempt

FIRST_PORT, PORTS = 20_000, 12_000  # below Linux's ephemeral ports
CANDIDATES = 16
LIMIT_S = 300
STORE_TIMEOUT = timedelta(minutes=10)


def ports(attempt: Attempt) -> list[int]:
    """The candidates of an attempt, in order."""
    return [FIRST_PORT + (zlib.crc32(f"{attempt} {turn}".encode()) % PORTS) for turn in range(CANDIDATES)]


def meet(rank: int, size: int, host: str, attempt: Attempt) -> dist.TCPStore:
    """The store over which the ranks of `attempt` find one another.

    Raises:
        UserError: no candidate port is free on `host`, or its rank 0 did not turn up.
    """
    name = str(attempt)
    if rank == 0:
        for port in ports(attempt):
            try:
                store = dist.TCPStore(host, port, size, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
            except dist.DistError:
                continue
            store.set("attempt", name)
            return store
        raise UserError(f"none of {CANDIDATES} ports from {FIRST_PORT} on is free on {host}")
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for port in ports(attempt):
            if (found := _at(host, port, size, name)) is not None:
                return found
        time.sleep(0.2)
    raise UserError(f"rank 0 on {host} did not open any of this job's ports within {LIMIT_S} s")


def _at(host: str, port: int, size: int, name: str) -> dist.TCPStore | None:
    """The store at a port, if it is this attempt's."""
    import socket

    try:
        socket.create_connection((host, port), timeout=2).close()  # torch's own attempt waits much longer
        store = dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        if store.check(["attempt"]) and store.get("attempt").decode() == name:
            store.set_timeout(STORE_TIMEOUT)
            return store
    except (OSError, dist.DistError):
        pass
    return None
