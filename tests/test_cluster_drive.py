"""`python -m pipeline drive` on a real Slurm: the job that runs `dvc repro`, and what ends it before its time."""

import os
import signal
from pathlib import Path

import pytest
from conftest import Checkout
from slurm_cluster import ON_SLURM, SlurmCluster, suspend_trainings, wait_until

pytest_plugins = "slurm_cluster"
pytestmark = ON_SLURM
FOLDER = Path("runs/drive/repro")
TRAINING = "train_classifier@poolformer_s12-0"
PROFILE = """notify: echo "$MESSAGE" >> told.txt
drive: {mem: 3G}
"""


@pytest.fixture
def on_slurm(slurm_cluster: SlurmCluster, checkout: Checkout) -> Checkout:
    """A checkout with a training that goes on until it has been disturbed often enough."""
    dev = (checkout.folder / "slurm/dev.yaml").read_text()
    (checkout.folder / "slurm/driven.yaml").write_text(dev + PROFILE)
    checkout.environment |= slurm_cluster.environment | {"PIPELINE_CLUSTER": "slurm/driven.yaml"}
    compose(checkout, 100_000)
    return checkout


@pytest.fixture
def driven(on_slurm: Checkout) -> Checkout:
    """The same, its data made."""
    on_slurm.run("dvc", "repro", "convert_imagenet")
    return on_slurm


def compose(checkout: Checkout, steps: int) -> None:
    recipe = (f"classification.recipe.{name}" for name in (f"max_steps={steps}", "epochs=10000"))
    checkout.pipeline("compose", "scale=demo", "classification.train=[poolformer_s12]", *recipe)


def drivers(cluster: SlurmCluster) -> dict[str, str]:
    """State by id of the jobs that drive."""
    lines = cluster.run("squeue", "--noheader", "--format=%i|%T|%j").splitlines()
    return {job: state for job, state, name in (line.split("|") for line in lines) if name.startswith("drive-")}


def running(cluster: SlurmCluster) -> str | None:
    return next((job for job, state in drivers(cluster).items() if state == "RUNNING"), None)


def attached(checkout: Checkout, job: str | None) -> bool:
    """Whether this driver's `dvc repro` waits for the training."""
    log = checkout.folder / FOLDER / f"jobs/{job}_0_log.out"
    text = log.read_text().rpartition("== ")[2] if log.exists() else ""
    return "attached to slurm job" in text or ": RUNNING" in text or "is RUNNING" in text


def test_a_drive_outlives_a_kill_and_a_preemption(slurm_cluster: SlurmCluster, driven: Checkout) -> None:
    told = driven.pipeline("drive", TRAINING).stdout
    assert f"drives `dvc repro {TRAINING}`" in told
    assert "drives it already" in driven.pipeline("drive", TRAINING).stdout
    refused = driven.pipeline("drive", check=False)
    assert refused.returncode == 1
    assert "wait for it, or end it with `python -m pipeline cancel drive repro`" in refused.stderr
    seen: list[str] = []

    def next_driver(what: str) -> str:
        """One that has come since, whose `dvc repro` waits for the one training."""
        wait_until(lambda: (job := running(slurm_cluster)) not in (None, *seen) and attached(driven, job), what)
        job = running(slurm_cluster)
        assert job is not None
        wait_until(lambda: len(drivers(slurm_cluster)) == 2, "its successor")
        seen.append(job)
        return job

    next_driver("the first driver")
    suspend_trainings(driven.folder / "runs/train_classifier/poolformer_s12-0")
    assert "drive repro" in driven.pipeline("jobs").stdout

    (driver,) = processes("pipeline.launch.drive", driven.folder)
    os.kill(driver, signal.SIGKILL)
    job = next_driver("the driver after the kill")

    hours = slurm_cluster.submit(driven.folder, "sleep 15", "--partition=priority", "--nodes=2", "--exclusive")
    wait_until(lambda: slurm_cluster.state(hours) == "COMPLETED", "the job of higher priority")
    if running(slurm_cluster) in seen:
        seen.remove(job)  # requeued under its own id
    next_driver("the driver after the preemption")

    trainings = (driven.folder / "runs/train_classifier").glob("*")
    assert [folder.name for folder in trainings] == ["poolformer_s12-0"]
    assert "ended job" in driven.pipeline("cancel", "drive", "repro").stdout
    wait_until(lambda: not drivers(slurm_cluster), "the end of all drivers")
    assert slurm_cluster.run("squeue", "--noheader")  # the training goes on
    driven.pipeline("cancel", "train_classifier", "poolformer_s12-0")
    wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), "the end of the training")
    assert not (driven.folder / "told.txt").exists()


def test_the_end_of_the_graph_ends_the_drive_and_says_so(slurm_cluster: SlurmCluster, driven: Checkout) -> None:
    compose(driven, 2)
    driven.pipeline("drive", TRAINING)
    wait_until(lambda: not drivers(slurm_cluster), "the end")
    assert (driven.folder / FOLDER / "done").exists(), (driven.folder / FOLDER / "log.txt").read_text()
    assert (driven.folder / "models/classifier/poolformer_s12-0.pt").exists()
    assert (driven.folder / "told.txt").read_text() == f"dvc repro in {driven.folder}: done\n"
    assert "drive repro" not in driven.pipeline("jobs").stdout

    (driven.folder / "told.txt").unlink()
    driven.pipeline("drive", "no_such_stage")
    wait_until((driven.folder / "told.txt").exists, "the failure")
    assert "failed: ERROR: " in (driven.folder / "told.txt").read_text()
    wait_until(lambda: not drivers(slurm_cluster), "the end")


def test_a_profile_of_this_machine_needs_no_driver(on_slurm: Checkout) -> None:
    refused = on_slurm.pipeline("drive", check=False, PIPELINE_CLUSTER="slurm/local.yaml")
    assert refused.returncode == 1
    assert "`dvc repro` needs no job here" in refused.stderr


def processes(module: str, folder: Path) -> list[int]:
    """Ids of the Python processes that run `module` in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if module.encode() in words and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_first_profile_is_one_that_the_cluster_accepts(slurm_cluster: SlurmCluster, on_slurm: Checkout) -> None:
    told = on_slurm.pipeline("doctor", "--profile", "slurm/first.yaml").stdout
    assert "export PIPELINE_CLUSTER=slurm/first.yaml" in told
    text = (on_slurm.folder / "slurm/first.yaml").read_text()
    assert "partition: main" in text
    assert "account: root" in text
    found = on_slurm.pipeline("doctor", PIPELINE_CLUSTER="slurm/first.yaml").stdout
    assert "would accept a job of this profile" in found
    assert on_slurm.pipeline("doctor", "--profile", "slurm/first.yaml", check=False).returncode == 1
