"""Shared fixtures: a checkout of its own to run commands in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
Run = Callable[..., subprocess.CompletedProcess[str]]


def skip(reason: str) -> None:
    """Skip the test; in CI, where all of them have to run, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI this test has to run: {reason}", pytrace=False)
    pytest.skip(reason)


class Checkout:
    """A copy of the project in a temporary folder, with commands run from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("pipeline", "experiments", "slurm", "released"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        config = (ROOT / ".dvc/config").read_text()
        (folder / ".dvc/config").write_text(config.replace("[core]", "[core]\n    no_scm = True"))
        (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "PIPELINE_", "MLFLOW_TRACKING"))
        }
        self.environment["PYTHONUNBUFFERED"] = "1"
        self.environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command here; output and errors as text."""
        done = subprocess.run(
            command, cwd=self.folder, env={**self.environment, **environment}, capture_output=True, text=True
        )
        if check and done.returncode:
            raise AssertionError(f"{command} failed\n{done.stdout}\n{done.stderr}")
        return done

    def pipeline(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m pipeline` here."""
        return self.run(sys.executable, "-m", "pipeline", *arguments, check=check, **environment)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh copy of the project, without any data."""
    return Checkout(tmp_path)


@pytest.fixture
def in_checkout(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory of this process."""
    monkeypatch.chdir(checkout.folder)
    return checkout.folder
