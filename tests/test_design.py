"""The design has tests: the graph file against the stage modules, code dependencies against imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.__main__ import STAGES
from pipeline.stages.code import CALLS

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_types_are_right() -> None:
    """Beside other tests, and not before them: mypy takes half a minute on one core."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_command_for_each_stage() -> None:
    assert set(GRAPH) == set(STAGES)


def test_a_stage_that_waits_for_a_job_imports_nothing_that_takes_long() -> None:
    code = "import sys, pipeline.__main__, pipeline.stages.train, pipeline.stages.evaluate; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not {"torch", "numpy", "pandas", "scipy", "mlflow", "dvc"} & set(imported.split())


def test_stages_are_declarations() -> None:
    for path in (ROOT / "pipeline/stages").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 45, path
        assert not path.name.startswith("_") or path.name == "__init__.py"


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_calls_its_module_and_depends_on_its_code(stage: str) -> None:
    words = [f"${{item.{argument}}}" for argument in STAGES[stage][1]]
    assert GRAPH[stage]["cmd"].split() == [".venv/bin/python", "-m", "pipeline", stage, *words]
    if stage != "code":
        assert f"data/code/{stage}.json" in GRAPH[stage]["deps"]
        assert not [entry for entry in GRAPH[stage]["deps"] if entry.endswith(".py")]


def test_the_code_of_every_stage_is_written_down() -> None:
    assert set(CALLS) == set(GRAPH) - {"code"}


def test_no_scale_is_mentioned_in_the_code() -> None:
    """Nothing but composed parameters tells the tiers apart."""
    for path in (ROOT / "pipeline").rglob("*.py"):
        assert not re.search(r"scale\s*==|== ?[\"'](demo|paper)[\"']\s*(and|or|:|\))", path.read_text()), path


def test_modules_are_short() -> None:
    long = {
        str(path): n for path in (ROOT / "pipeline").rglob("*.py") if (n := len(path.read_text().splitlines())) > 330
    }
    assert not long


def test_readme_commands_exist() -> None:
    """Every `make` target and pipeline command that the README names is there."""
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    commands = {
        *STAGES,
        "compose",
        "doctor",
        "show",
        "sync",
        "views",
        "jobs",
        "submit",
        "drive",
        "cancel",
        "plan",
        "why",
        "adopt",
        "clean",
        "reference",
    }
    assert set(re.findall(r"python -m pipeline ([a-z_]+)", text)) <= commands


def test_lock_names_no_index() -> None:
    for name in ("requirements.lock", "requirements-build.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        pinned = re.findall(r"^[a-z].*==.*", text, re.M)
        assert pinned
        assert all(line.endswith("\\") for line in pinned), "a line without a hash"
    assert re.search(r"^torch==2\.15\.", (ROOT / "requirements.lock").read_text(), re.M)


def test_paths_stay_inside_the_checkout() -> None:
    from pipeline import paths

    for value in vars(paths).values():
        if isinstance(value, Path):
            assert not value.is_absolute()


def test_the_page_of_run_folders_names_every_file_in_them() -> None:
    """And no other: docs/runs.md against the names that the code joins to a run folder or to runs/."""
    page = (ROOT / "docs/runs.md").read_text()
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([^`]+)` \|", page, re.M)}
    used = set()
    for package in ("launch", "stages", "tasks", "tracking", "train"):
        for path in (ROOT / "pipeline" / package).glob("*.py"):
            for place, name in re.findall(r'(folder|training|RUNS) / f?"([^"/.][^"/]*)', path.read_text()):
                used.add(("runs/" if place == "RUNS" else "") + re.sub(r"{[^}]*}", "*", name))
    assert listed == used - {"step-*-*.pt"}  # in checkpoints/
