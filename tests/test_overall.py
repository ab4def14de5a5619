"""The bar of the whole graph: what counts as done, and what is shown."""

import json
import logging
import time
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.config import load_params
from pipeline.launch import overall
from pipeline.launch.dvc_graph import Dvc
from pipeline.launch.overall import Overall

STAGES = [
    "train_classifier@poolformer_s12-0",
    "train_classifier@poolformer_m48-0",
    "evaluate_classifier@poolformer_s12-0",
    "compare_with_paper",
]


@pytest.fixture
def repro(in_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Dvc:
    """A `dvc repro` that began ten minutes ago and now runs the second stage."""
    dvc = Dvc(Namespace(), time.time() - 600)
    monkeypatch.setattr(overall, "surrounding_dvc", lambda: dvc)
    monkeypatch.setattr(overall, "to_run", lambda options, running: STAGES)
    monkeypatch.setattr(overall, "LOOK_S", 0.0)
    monkeypatch.setenv("DVC_STAGE", STAGES[1])
    return dvc


def at_step(step: int, since: float) -> None:
    """The running training's history."""
    folder = paths.run(*STAGES[1].split("@"))
    folder.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "total_steps": 100, "time_ms": 1000 * (since + 500)}
    (folder / "history.jsonl").write_text(json.dumps(line) + "\n")


def test_the_bar_grows_with_the_steps_of_what_runs(repro: Dvc, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = Overall(load_params(paths.PARAMS))
    bar.show()
    first = json.loads(overall.FILE.read_text())["shown"]
    assert 0 < first < 50
    at_step(50, repro.started)
    bar.show()
    bar.show()
    half = json.loads(overall.FILE.read_text())["shown"]
    assert first + 20 < half < 80
    assert len(caplog.messages) == 2, "a per cent is shown once"
    left = caplog.messages[-1].rpartition("about ")[2].removesuffix(" left")
    minutes = int(left.split(":")[1])
    assert minutes == pytest.approx(10 * (100 - half) / half, abs=1.5)


def test_what_an_earlier_repro_did_counts_for_nothing(repro: Dvc) -> None:
    at_step(50, repro.started - 5000)
    bar = Overall(load_params(paths.PARAMS))
    bar.show()
    assert json.loads(overall.FILE.read_text())["shown"] < 50


def test_outside_of_a_repro_nothing_is_shown(in_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    Overall(load_params(paths.PARAMS)).show()
    assert not overall.FILE.exists()
