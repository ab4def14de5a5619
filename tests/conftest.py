"""How tests share a machine, and what they share: a checkout to run commands in, and one finished graph.

`make check` leaves out what is marked slow; `make test` runs everything on several workers. The tests of a module stay
on one worker with their fixtures, and all tests on Slurm on one, for there is one cluster.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
Run = Callable[..., subprocess.CompletedProcess[str]]
ON_SLURM = ("test_cluster_", "test_dev_cluster")
"""What the names of modules begin with whose tests use the cluster, of which there is one."""
LONGEST_FIRST = (
    "slurm",
    "test_graph",
    "test_extend",
    "test_benchmarks",
    "test_released_tier",
    "test_layouts",
    "test_native",
    "test_your_images",
)
DEMO = (
    "scale=demo",
    "classification.train=[poolformer_s12]",
    "ablations.train=[ppaa]",
    "classification.recipe.global_batch_size=32",
    "classification.recipe.learning_rate_per_1024=0.032",
    "classification.recipe.max_steps=12",
    "classification.recipe.precision=fp32",
    "segmentation.recipe.global_batch_size=16",
    "segmentation.recipe.max_steps=6",
    "segmentation.recipe.precision=fp32",
    "evaluation.classification.precision=fp32",
    "evaluation.segmentation.precision=fp32",
)
"""The demo, shortened to one variant, one ablation and a few steps of larger batches.

In float32, so that one process and two ranks can be compared.
"""


def _group(test: str) -> str:
    """Which tests run on one worker: those of a module, and all those on Slurm."""
    module = Path(test.partition("::")[0]).stem
    return "slurm" if module.startswith(ON_SLURM) else module


class _Scheduling(LoadScopeScheduling):
    """xdist's scheduling by module; its own groups by mark (loadgroup) are not heeded with pytest 9."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    """Side by side, tests are scheduled by group."""
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the groups that take longest."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(_group(item.nodeid), len(order)))


def skip(reason: str) -> None:
    """Skip the test; in CI, where all of them have to run, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI this test has to run: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """No test changes the environment of those after it on its worker: which they are is chance."""
    before = dict(os.environ)
    yield
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    others = {name for name in changed if not name.startswith(("PYTEST_CURRENT", "TORCH", "_TORCH"))}  # its own affair
    assert not others, f"the test changed the environment: {sorted(others)}"


class Checkout:
    """A copy of the project in a temporary folder, with commands run from it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("pipeline", "experiments", "slurm", "released"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", "params.yaml", ".dvcignore", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        (folder / ".dvc/site").mkdir(mode=0o700)
        config = (ROOT / ".dvc/config").read_text()
        (folder / ".dvc/config").write_text(config.replace("[core]", "[core]\n    no_scm = True"))
        (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
        self._enter(folder)

    @classmethod
    def at(cls, folder: Path) -> "Checkout":
        """One that is there already."""
        checkout = cls.__new__(cls)
        checkout._enter(folder)
        return checkout

    def _enter(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "PIPELINE_", "MLFLOW_TRACKING", "PYTHONDONTWRITEBYTECODE"))
        }
        self.environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "250"}  # tables that do not wrap
        self.environment["DVC_SITE_CACHE_DIR"] = str(folder / ".dvc/site")
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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def demo_outputs(shared_folder: Path) -> Path:
    """results/, reports/ and models/ as `dvc repro` left them in the checkout `shared_folder`/graph; for reading."""
    outputs = shared_folder / "demo-outputs"
    with FileLock(shared_folder / "demo.lock"):
        if not outputs.exists():
            shutil.rmtree(shared_folder / "graph", ignore_errors=True)
            checkout = Checkout(shared_folder / "graph")
            checkout.pipeline("compose", *DEMO)
            (checkout.folder / "output.txt").write_text(checkout.run("dvc", "repro").stdout)
            making = shared_folder / "demo-outputs.making"
            for name in ("results", "reports", "models"):
                shutil.copytree(checkout.folder / name, making / name)
            making.rename(outputs)
    return outputs
