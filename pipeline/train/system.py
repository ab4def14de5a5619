"""Samples of the machine while it trains, as JSON lines: processor, memory, disk and GPUs, under MLflow's names."""

import itertools
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.train import history

INTERVAL_S = 10.0
GPU_QUERY = ("utilization.gpu", "memory.used", "power.draw")
GPU_NAMES = ("utilization_percentage", "memory_usage_megabytes", "power_usage_watts")


@contextmanager
def sampled(path: Path, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Append a sample of this node to `path` at once and every `interval_s`, from a thread, until the block ends."""
    first = len(history.read(path))
    ended = threading.Event()
    psutil.cpu_percent()  # what it gives is since the call before

    def sample() -> None:
        number = first
        while True:
            ended.wait(min(interval_s, 1.0) if number == first else interval_s)
            number += 1
            history.append(path, {"step": number, "time_ms": round(time.time() * 1000), **_machine(path), **_gpus()})
            if ended.is_set():
                return

    thread = threading.Thread(target=sample, daemon=True, name="system samples")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=interval_s)


def _machine(path: Path) -> dict[str, float]:
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(path.parent))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }


def _gpus() -> dict[str, float]:
    """Of each GPU that nvidia-smi shows; nothing where there is none, or it does not say."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return read_gpus(done.stdout) if done.returncode == 0 else {}


def read_gpus(answer: str) -> dict[str, float]:
    """nvidia-smi's CSV as metrics; a value that a GPU does not tell ("[N/A]") is left out."""
    metrics: dict[str, float] = {}
    for line in answer.splitlines():
        index, *values = (cell.strip() for cell in line.split(","))
        for name, value in zip(GPU_NAMES, values, strict=False):
            try:
                metrics[f"gpu_{index}_{name}"] = float(value)
            except ValueError:
                continue
    return metrics


def energy_kwh(path: Path) -> float | None:
    """What this node's GPUs used between its samples; pauses between two jobs not counted. None without power."""
    watts = [
        (record["time_ms"] / 1000, sum(value for key, value in record.items() if key.endswith("power_usage_watts")))
        for record in history.read(path)
        if any(key.endswith("power_usage_watts") for key in record)
    ]
    if len(watts) < 2:
        return None
    joules = 0.0
    for (before_s, before_w), (after_s, after_w) in itertools.pairwise(watts):
        if after_s - before_s <= 3 * INTERVAL_S:
            joules += (after_s - before_s) * (before_w + after_w) / 2
    return joules / 3.6e6
