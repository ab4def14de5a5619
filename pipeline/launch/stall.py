"""Ends a rank whose training makes no step any more, with the stacks of all its threads in the log.

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
    """End this process if `last_step()` (of `time.monotonic`) is more than `limit_s` ago; 0: never."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(limit_s / 4, 10.0)):
            if time.monotonic() - last_step() > limit_s:
                break
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
