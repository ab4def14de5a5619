"""A first cluster profile, from lines as sinfo and sacctmgr of real sites write them."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.cluster import load_profile
from pipeline.launch.first_profile import minutes, parse_node, profile_text

SITE = [
    "cpu*|7-00:00:00|64|256000|(null)",
    *["cpu*|7-00:00:00|64|256000|(null)"] * 99,
    *["gpu|2-00:00:00|128|1031000|gpu:a100:8(S:0-1)"] * 4,
    *["dev|30:00|48|515000|gpu:v100:4(S:0),ssd:1"] * 2,
]


def written(tmp_path: Path, lines: list[str], accounts: list[str]) -> tuple[str, Path]:
    text = profile_text(Counter(map(parse_node, lines)), accounts)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return text, path


def test_most_gpus_are_taken_and_the_rest_is_named(tmp_path: Path) -> None:
    text, path = written(tmp_path, SITE, ["vision|normal,high", "other|normal"])
    profile = load_profile(path)
    assert (profile.partition, profile.nodes, profile.gpus, profile.gpu_type) == ("gpu", 1, 8, "a100")
    assert (profile.cpus, profile.memory_gb, profile.time_min, profile.account) == (16, 906, 1440, "vision")
    assert profile.qos is None
    for remark in ("of gpu, dev, cpu", "4 of this kind are up", "of vision, other", "# qos: normal"):
        assert remark in text


def test_a_cluster_without_gpus_and_without_accounting(tmp_path: Path) -> None:
    lines = ["small|infinite|8|16000|(null)", "main*|59:00|2|1900+|(null)", "main*|59:00|2|1900+|(null)"]
    _, path = written(tmp_path, lines, [])
    profile = load_profile(path)
    assert (profile.partition, profile.gpus, profile.cpus, profile.time_min) == ("main", 0, 2, 59)
    assert profile.memory_gb == 1
    assert profile.account is None


@pytest.mark.parametrize(
    ("gres", "gpus", "kind"),
    [
        ("(null)", 0, None),
        ("gpu:4", 4, None),
        ("gpu:h100:8(S:0-1)", 8, "h100"),
        ("gpu:a100:2,gpu:v100:2", 4, None),
        ("ssd:1,gpu:nvidia_h100_80gb_hbm3:4", 4, "nvidia_h100_80gb_hbm3"),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int, kind: str | None) -> None:
    found = parse_node(f"gpu|infinite|64|512000|{gres}")
    assert (found.gpus, found.gpu_type) == (gpus, kind)


@pytest.mark.parametrize(
    ("limit", "expected"), [("2-00:00:00", 2880), ("30:00", 30), ("1:30:30", 90.5), ("infinite", float("inf"))]
)
def test_time_limits(limit: str, expected: float) -> None:
    assert minutes(limit) == expected
