"""The design has tests: the graph file against the stage modules, code dependencies against imports."""

import importlib
import re
from pathlib import Path

import grimp
import pytest
import yaml
from conftest import ROOT

from pipeline.__main__ import STAGES

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What a job's result does not depend on, or what the fingerprint has in another form (parameters, layout).
NOT_RESULTS = {
    "pipeline",
    "pipeline.cluster",
    "pipeline.config",
    "pipeline.data",
    "pipeline.data.beton",
    "pipeline.data.progress",
    "pipeline.errors",
    "pipeline.metrics",
    "pipeline.models",
    "pipeline.models.released_weights",
    "pipeline.models.semantic_fpn",
    "pipeline.models.strict_loading",
    "pipeline.paths",
    "pipeline.tasks",
    "pipeline.train",
    "pipeline.train.activation_checkpointing",
    "pipeline.train.checkpoint",
    "pipeline.train.compilation",
    "pipeline.train.history",
    "pipeline.train.out_of_memory",
    "pipeline.train.progress",
    "pipeline.train.system",
    "pipeline.train.task",
}
# A classifier's training looks at its accuracy with the evaluation's code, which changes no weight.
LOOKED_AT_WITH = {
    "train_classifier": {
        "pipeline.metrics.accuracy",
        "pipeline.metrics.complexity",
        "pipeline.metrics.segmentation",
        "pipeline.tasks.validation",
    }
}


def test_one_module_and_one_command_for_each_stage() -> None:
    modules = {path.stem for path in (ROOT / "pipeline/stages").glob("[!_]*.py")}
    assert set(GRAPH) == modules == set(STAGES)


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_calls_its_module_and_depends_on_its_code(stage: str) -> None:
    words = [f"${{item.{argument}}}" for argument in STAGES[stage]]
    assert GRAPH[stage]["cmd"].split() == [".venv/bin/python", "-m", "pipeline", stage, *words]
    code = importlib.import_module(f"pipeline.stages.{stage}").CODE
    declared = [entry for entry in GRAPH[stage]["deps"] if entry.startswith("pipeline/")]
    assert declared == [f"pipeline/stages/{stage}.py", *code]


JOBS = {
    "convert_imagenet": "pipeline.data.convert",
    "convert_ade20k": "pipeline.data.convert",
    "train_classifier": "pipeline.tasks.classifier_training",
    "train_segmenter": "pipeline.tasks.segmenter_training",
    "evaluate_classifier": "pipeline.tasks.classifier_evaluation",
    "evaluate_segmenter": "pipeline.tasks.segmenter_evaluation",
}


@pytest.mark.parametrize("stage", JOBS)
def test_code_dependencies_are_complete(stage: str) -> None:
    job = JOBS[stage]
    imported = grimp.build_graph("pipeline", exclude_type_checking_imports=True).find_upstream_modules(job) | {job}
    code = importlib.import_module(f"pipeline.stages.{stage}").CODE

    def is_declared(module: str) -> bool:
        path = module.replace(".", "/")
        return any(entry == f"{path}.py" or path.startswith(entry) for entry in code)

    missing = (
        {module for module in imported if not is_declared(module)} - NOT_RESULTS - LOOKED_AT_WITH.get(stage, set())
    )
    assert not missing, f"{stage} uses {sorted(missing)}, which neither CODE nor NOT_RESULTS has"


def test_declared_code_exists() -> None:
    for stage in GRAPH:
        for entry in importlib.import_module(f"pipeline.stages.{stage}").CODE:
            assert (ROOT / entry).exists(), f"{stage}: {entry}"


def test_no_scale_is_mentioned_in_the_code() -> None:
    """Nothing but composed parameters tells the tiers apart."""
    for path in (ROOT / "pipeline").rglob("*.py"):
        assert not re.search(r"scale\s*==|== ?[\"'](demo|paper|released)[\"']\s*(and|or|:|\))", path.read_text()) or (
            path.name in {"train_classifier.py", "compare_with_paper.py"}
        ), path


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
    commands = {*STAGES, "compose", "doctor", "show", "sync", "views", "jobs", "cancel", "plan"}
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
