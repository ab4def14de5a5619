"""Ranks for tests: processes that join a real gloo group, kept for a module's tests so that each imports torch once.

A test module that wants them says `pytest_plugins = "rank_pool"` and asks for `on_ranks`.
PYTEST_DONT_REWRITE: such a module imports this one before pytest could.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest

MOST_RANKS = 4
RANKS_A_NODE = 2
RunOnRanks = Callable[..., list[Any]]


@contextmanager
def rank_pool() -> Iterator[RunOnRanks]:
    """Yields `run(size, function, *arguments)`: `function(world, *arguments)` on `size` ranks, results by rank.

    The function is named by a test module, and its arguments and results are pickled. Four ranks are numbered as on
    two nodes.
    """
    with ProcessPoolExecutor(MOST_RANKS, get_context("spawn")) as pool:

        def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            # Each waits for the others, so that no process takes two ranks.
            jobs = [pool.submit(_as_rank, rank, size, port, function, arguments) for rank in range(size)]
            return [job.result() for job in jobs]

        yield run


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[RunOnRanks]:
    """See `rank_pool`."""
    with rank_pool() as run:
        yield run


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from torch.distributed import TCPStore

    from pipeline import device as ranks

    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    with ranks.join(rank, size, rank % RANKS_A_NODE, 1, store) as world:
        return function(world, *arguments)
