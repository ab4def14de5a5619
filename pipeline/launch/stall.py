"""Ends a rank that makes no step any more, with the stacks of all its threads in the log.

A thread of FFCV or CUDA may die or hang without an error: nothing else would end the job before its time limit.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.launch import attempts
from pipeline.launch.attempts import Attempt, StallError

STATUS = 3
"""The exit status of a rank that was ended for this."""
OTHERS_S = 10.0
"""How long a rank stays for the others to write their stacks; srun ends them when the first exits."""


@contextmanager
def ended_without_steps(
    last_step: Callable[[], float], limit_s: float, folder: Path, attempt: Attempt, rank: int
) -> Iterator[None]:
    """End this process if `last_step()`, a time of any clock, stays the same for `limit_s`; 0: never.

    The time in which a suspended job stands still does not count: this thread stands still then, too.
    """
    over = threading.Event()
    wait_s = min(limit_s / 4, 10.0)

    def watch() -> None:
        seen, idle_s, woke = last_step(), 0.0, time.monotonic()
        while idle_s <= limit_s and not over.wait(wait_s):
            last, now = last_step(), time.monotonic()
            idle_s = idle_s + min(now - woke, 2 * wait_s) if last == seen else 0.0
            seen, woke = last, now
        if over.is_set():
            return
        with suppress(StallError), attempts.errors_of_rank(folder, attempt, rank):
            raise StallError(f"no step for {limit_s / 60:.1f} min; the stacks of all threads are in the ranks' logs")
        print(f"no step for {limit_s / 60:.1f} min; all threads of rank {rank}:", flush=True)
        faulthandler.dump_traceback(file=sys.__stdout__ or sys.stdout, all_threads=True)
        over.wait(OTHERS_S)
        os._exit(STATUS)

    if limit_s:
        threading.Thread(target=watch, daemon=True, name="stall").start()
    try:
        yield
    finally:
        over.set()
