"""Run one daemon and, when it ends, end everything that it started.

    keep.py PID_FILE COMMAND...

PID_FILE stays locked as long as anything runs, and holds the daemon's process id. slurmd detaches
the processes of its jobs on purpose; here they are adopted, so that a slurmd that is killed takes
its jobs along, like a machine that loses its power.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def children() -> list[int]:
    """Process ids of this process's children, adopted ones included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            _, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def main(pid_file: str, *command: str) -> None:
    with Path(pid_file).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the one before to clear up
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(daemon.pid, signal.SIGTERM))
        print(daemon.pid, file=lock, flush=True)
        while os.wait()[0] != daemon.pid:
            pass  # reaps the adopted
        lock.truncate(0)
        with contextlib.suppress(ChildProcessError):  # none is left
            while True:
                for child in children():
                    os.kill(child, signal.SIGKILL)
                os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
