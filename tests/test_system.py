"""The machine's samples: written while a block runs, continued by the next, energy between them."""

import json
import time
from pathlib import Path

import pytest

from pipeline.train import history
from pipeline.train.system import energy_kwh, read_gpus, sampled


def test_samples_are_written_and_go_on_where_they_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with sampled(tmp_path / "system.jsonl", interval_s=0.05):
            time.sleep(0.2)
    records = history.read(tmp_path / "system.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 4
    assert all(0 <= record["cpu_utilization_percentage"] <= 100 for record in records)
    assert all(record["system_memory_usage_megabytes"] > 100 for record in records)


def test_what_nvidia_smi_says_of_each_gpu() -> None:
    metrics = read_gpus("0, 87, 71234, 654.32\n1, 3, 500, [N/A]\n")
    assert metrics == {
        "gpu_0_utilization_percentage": 87, "gpu_0_memory_usage_megabytes": 71234, "gpu_0_power_usage_watts": 654.32,
        "gpu_1_utilization_percentage": 3, "gpu_1_memory_usage_megabytes": 500,
    }  # fmt: skip


def test_energy_is_power_over_time_without_the_pause_between_two_jobs(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    assert energy_kwh(path) is None
    for second in (0, 10, 20, 5000, 5010):
        record = {"time_ms": 1000 * second, "gpu_0_power_usage_watts": 300.0, "gpu_1_power_usage_watts": 420.0}
        path.open("a").write(json.dumps(record) + "\n")
    assert energy_kwh(path) == pytest.approx(30 * 720 / 3.6e6)
