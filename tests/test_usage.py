"""What jobs used of what they asked for."""

import os
from pathlib import Path

import pytest

from pipeline.cluster import Profile
from pipeline.launch.attempts import Attempt
from pipeline.launch.usage import efficiency, recorded
from pipeline.train import history

PROFILE = Profile(
    kind="slurm", nodes=2, gpus_per_node=4, cpus_per_task=12, memory_gb=64, time_min=60
)  # 16 GB and 12 cores per rank


def test_an_attempt_is_recorded_however_it_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyError), recorded(tmp_path, Attempt("7", 0), PROFILE):
        raise KeyError
    with recorded(tmp_path, Attempt("7", 1), PROFILE):
        sum(range(10**6))
    first, second = history.read(tmp_path / "usage.jsonl")
    assert (first["attempt"], second["attempt"]) == ("7.0", "7.1")
    assert (second["cpus"], second["memory_asked_gb"]) == (12, 16)
    assert 0 < second["cpu_s"] <= second["wall_s"] * (os.cpu_count() or 1) + 0.1
    assert 0 < second["memory_gb"] < 100


def test_shares_are_of_all_attempts(tmp_path: Path) -> None:
    asked = {"cpus": 10, "memory_asked_gb": 16.0}
    history.append(tmp_path / "usage.jsonl", {"wall_s": 100.0, "cpu_s": 500.0, "memory_gb": 4.0, **asked})
    history.append(tmp_path / "usage.jsonl", {"wall_s": 300.0, "cpu_s": 3500.0, "memory_gb": 8.0, **asked})
    for first, second in ((90.0, 70.0), (100.0, 60.0)):
        sample = {"gpu_0_utilization_percentage": first, "gpu_1_utilization_percentage": second}
        history.append(tmp_path / "system.jsonl", {"step": 1, "cpu_utilization_percentage": 3.0, **sample})
    assert efficiency(tmp_path) == {"cpu_used": 100.0, "memory_used": 50.0, "gpu_used": 80.0}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    assert efficiency(tmp_path) == {}
    history.append(
        tmp_path / "usage.jsonl",
        {"wall_s": 10.0, "cpu_s": 5.0, "cpus": 1, "memory_gb": 4.0, "memory_asked_gb": None},
    )
    assert efficiency(tmp_path) == {"cpu_used": 50.0}
