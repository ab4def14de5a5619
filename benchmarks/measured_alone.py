"""Time and peak memory of one piece of work, in a process that does nothing else."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Measured = dict[str, float]
"""`wall_s`, `cpu_s` of all threads and children, `peak_memory_mb` in 10**6 bytes."""


def command(words: list[str], folder: Path, environment: Mapping[str, str], *, says: str, ends: int = 0) -> Measured:
    """Run a command in `folder` to its end. Its peak memory is that of the largest of its processes, libraries and all.

    Raises:
        SystemExit: it did not end with the status `ends`, or its output lacks `says`.
    """
    log = folder / "measured.log"
    # By a small process in between: Linux counts the memory of whoever starts a process as the process's own.
    small = [sys.executable, "-m", "benchmarks.measured_alone", str(log), *words]
    done = subprocess.run(small, cwd=folder, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True)
    status, found = json.loads(done.stdout)
    text = log.read_text()
    if status != ends or says not in text:
        raise SystemExit(f"{' '.join(words)} ended with {status}\n{text[-3000:]}")
    return dict(found)


def _command(log: str, words: list[str]) -> None:
    """Print the status and what was measured."""
    started = time.monotonic()
    with Path(log).open("w") as output:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds, cpu = time.monotonic() - started, used.ru_utime + used.ru_stime
    found = {"wall_s": seconds, "cpu_s": cpu, "peak_memory_mb": used.ru_maxrss * 1024 / 1e6}
    print(json.dumps([child.returncode, found]))


def call(module: str, *arguments: str, folder: Path, environment: Mapping[str, str]) -> list[Measured]:
    """What `python -m <module> <arguments>` printed as its last line by `report`, run in `folder`.

    Raises:
        SystemExit: it failed.
    """
    words = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(words, cwd=folder, env=dict(environment), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    found: list[Measured] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def measured(into: list[Measured]) -> Iterator[None]:
    """Measure the block in this process; its memory is the peak beyond what was there when it began."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before, wall, cpu = _status_mb("VmRSS"), time.monotonic(), _cpu_s()
    yield
    seconds = {"wall_s": time.monotonic() - wall, "cpu_s": _cpu_s() - cpu}
    into.append({**seconds, "peak_memory_mb": _status_mb("VmHWM") - before})


def report(found: list[Measured]) -> None:
    print(json.dumps(found), flush=True)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _status_mb(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def here(folder: Path) -> dict[str, Any]:
    """The environment in which this checkout's code works on `folder`."""
    others = ("SLURM_", "PIPELINE_", "MLFLOW_TRACKING")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return environment | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": str(folder / ".dvc/site"),
    }


if __name__ == "__main__":
    _command(sys.argv[1], sys.argv[2:])
