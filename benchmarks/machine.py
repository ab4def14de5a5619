"""Where and when something was measured."""

import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import NoReturn

import torch


def machine_row() -> dict[str, str | int]:
    """The first columns of a row of results."""
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "cores": cores,
        "device": device,
    }


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, with a + if files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def peak_memory_gb() -> float:
    """Of the device, or on a CPU this process's largest resident set, in 2**30 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def leave(status: int) -> NoReturn:
    """Exit as a worker does: threads of the loader still run, and may abort in the interpreter's shutdown."""
    sys.stdout.flush()
    os._exit(status)
