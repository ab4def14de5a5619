"""What a job used of what it asked for: `usage.jsonl` in the run folder, a line per attempt, of the first rank.

The first rank stands for all: they do the same work.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.cluster import Profile
from pipeline.launch.attempts import Attempt
from pipeline.train import history


@contextmanager
def recorded(folder: Path, attempt: Attempt, profile: Profile) -> Iterator[None]:
    """Append a line about the block, however it ends."""
    import torch  # here: `efficiency` needs none

    from pipeline.train.out_of_memory import peak_memory_gb

    started, cpu_started = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        asked_gb = None if profile.memory_gb is None else profile.memory_gb / profile.ranks_here
        line = {
            "attempt": str(attempt),
            "wall_s": time.monotonic() - started,
            "cpu_s": time.process_time() - cpu_started,
            "cpus": profile.cpus,
            "memory_gb": peak_memory_gb(torch.device("cpu")),
            "memory_asked_gb": asked_gb,
        }
        with suppress(OSError):  # a full disk is another's to report
            history.append(folder / "usage.jsonl", line)


def efficiency(folder: Path) -> dict[str, float]:
    """Percent used of the cores, memory and GPUs that a run's attempts asked for; what is not known is left out."""
    lines, found = history.read(folder / "usage.jsonl"), {}
    if core_s := sum(line["wall_s"] * line["cpus"] for line in lines):
        found["cpu_used"] = 100 * sum(line["cpu_s"] for line in lines) / core_s
    if memory := [100 * line["memory_gb"] / line["memory_asked_gb"] for line in lines if line["memory_asked_gb"]]:
        found["memory_used"] = max(memory)
    gpus = [
        value
        for sample in history.read(folder / "system.jsonl")
        for name, value in sample.items()
        if name.startswith("gpu_") and name.endswith("_utilization_percentage")
    ]
    return found | ({"gpu_used": statistics.fmean(gpus)} if gpus else {})
