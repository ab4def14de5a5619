"""What a drive decides without Slurm: which locks of DVC are a killed one's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import drive, record
from pipeline.launch.drive import Driver
from pipeline.launch.drive_starts import DEATHS, STALE_S, Starts
from pipeline.launch.dvc_graph import RWLOCK
from pipeline.launch.record import Job
from pipeline.launch.slurm_status import UnreachableError

KILLED_WHILE_LOCKED = """
import os, signal
from dvc.lock import HardlinkLock
HardlinkLock(".dvc/tmp/lock", tmp_dir=".dvc/tmp").lock()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The start of a DVC that was killed while it held DVC's own lock."""
    monkeypatch.chdir(tmp_path)
    RWLOCK.parent.mkdir(parents=True)
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_LOCKED])
    assert process.wait() == -signal.SIGKILL
    assert RWLOCK.with_name("lock").exists()
    return {"job": "1", "pid": process.pid, "time": before}


def starts(*lines: dict[str, object]) -> Starts:
    """Those of a drive that has these lines."""
    Path("starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Starts(Path())


def test_the_lock_of_a_killed_dvc_is_removed_when_it_is_old(
    killed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_started, lock = time.time(), RWLOCK.with_name("lock")
    assert not starts(killed).remove_locks(job_started, set())  # somebody else's, perhaps, who lets go of it
    monkeypatch.setattr(time, "time", lambda: lock.stat().st_ctime + STALE_S + 1)
    assert not starts(killed, {**killed, "ended": True}).remove_locks(job_started, set())
    assert not starts().remove_locks(job_started, set())
    assert not starts({**killed, "time": lock.stat().st_ctime + 1}).remove_locks(job_started, set())
    assert lock.exists()
    assert starts(killed).remove_locks(job_started, set())
    assert not lock.exists()


def test_a_path_that_only_killed_dvcs_use_is_free(killed: dict[str, object]) -> None:
    RWLOCK.write_text(json.dumps({"write": {}, "read": {}}))
    pid = int(str(killed["pid"]))
    assert not starts(killed).remove_locks(time.time(), {os.getpid()})
    assert not starts(killed).remove_locks(time.time(), {pid, os.getpid()})
    assert starts(killed).remove_locks(time.time(), {pid})
    assert not RWLOCK.exists()


@pytest.fixture
def driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a drive whose first job runs."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\n")
    monkeypatch.setenv("PIPELINE_CLUSTER", "cluster.yaml")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    folder = paths.run(drive.STAGE, drive.NAME)
    (folder / "jobs").mkdir(parents=True)
    record.write_job(folder, Job("slurm", "metaformer-this", str(folder / "jobs"), {}, 0.0, job_id="1"))
    return folder


def test_no_drive_is_submitted_while_slurm_does_not_answer(driven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(environment: dict[str, str]) -> None:
        raise UnreachableError("Unable to contact slurm controller")

    monkeypatch.setattr(drive, "squeue", away)
    with pytest.raises(UserError, match=r"does not answer .* nothing was submitted"):
        drive.submit(Profile(kind="slurm", gpus_per_node=0, cpus_per_task=1), [])
    assert (driven / "job.json").exists()


@pytest.fixture
def driver(driven: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Job 1 of a drive, in a queue that holds no other."""
    monkeypatch.setattr(drive, "squeue", lambda environment: {})
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]
    driver = Driver("metaformer-this")
    yield driver
    for number, handler in handlers:
        signal.signal(number, handler)


def test_a_drive_outlasts_what_dvc_says_of_its_locks(
    driver: Driver, driven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Iterator[tuple[int, str, set[int]]] = iter(
        [(255, "ERROR: unexpected error - Already unlocked", set()), (0, "", set())]
    )
    monkeypatch.setattr(drive, "LOCKED_S", 0)
    monkeypatch.setattr(drive, "_sbatch", lambda script, environment: "2")
    monkeypatch.setattr(driver, "_repro", lambda job: next(said))
    assert driver.run() == 0
    assert (driven / "done").read_text() == "metaformer-this"


def fake_dvc(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `dvc` beside the interpreter that the driver looks beside."""
    (folder / "dvc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "dvc").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    (paths.run(drive.STAGE, drive.NAME) / "targets.json").write_text("[]")


def test_a_successor_that_slurm_did_not_take_is_submitted_later(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers: list[str | Exception] = [UnreachableError("Unable to contact slurm controller"), UserError("a limit"), "2"]
    submitted = []

    def sbatch(script: Path, environment: dict[str, str]) -> str:
        answer = answers.pop(0)
        submitted.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(drive, "_sbatch", sbatch)
    monkeypatch.setattr(drive, "SUCCESSOR_S", 0.1)
    fake_dvc(tmp_path, "sleep 3", monkeypatch)
    assert driver.run() == 0
    assert driver.successor == "2"
    assert submitted[-1] == "2"
    assert capfd.readouterr().out.count("no successor") == 1


@pytest.mark.parametrize("killed", [DEATHS - 1, DEATHS])
def test_a_drive_gives_up_when_its_jobs_are_killed_again_and_again(
    killed: int, driver: Driver, driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that left because they were preempted do not count."""
    monkeypatch.setattr(drive, "_sbatch", lambda script, environment: "2")
    fake_dvc(tmp_path, "exit 0", monkeypatch)
    for number in range(10, 20):
        driver.starts.note(str(number), 7)
        if number >= 10 + killed:
            driver.starts.note(str(number), 7, ended=True)
    assert driver.run() == (1 if killed == DEATHS else 0)


def test_a_dvc_that_was_killed_counts_as_one(
    driver: Driver, driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_sbatch", lambda script, environment: "2")
    fake_dvc(tmp_path, "kill -9 $$", monkeypatch)
    assert driver.run() == 1
    assert len((driven / "starts.jsonl").read_text().splitlines()) == 1  # no line about its end


def test_a_driver_that_has_to_leave_while_it_waits_starts_no_dvc(
    driver: Driver, driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_sbatch", lambda script, environment: "2")
    told = f"(sleep 1; kill -USR2 {os.getpid()}) > /dev/null 2>&1 &"
    fake_dvc(tmp_path, f"echo 'ERROR: Unable to acquire lock'; {told} exit 255", monkeypatch)
    assert driver.run() == 0
    assert driver.starts.deaths() == 0
    assert len((driven / "starts.jsonl").read_text().splitlines()) == 2  # one DVC's start and end
    assert not (driven / "done").exists()


def test_a_stage_that_was_killed_is_started_again_by_the_same_job(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stage that fails ends the drive; one that got a signal says nothing about itself."""
    monkeypatch.setattr(drive, "_sbatch", lambda script, environment: "2")
    failed = "ERROR: failed to reproduce 'a': failed to run: python -m pipeline train_classifier s12 0, exited with"
    fake_dvc(
        tmp_path,
        f'[ -e twice ] && exit 0; [ -e once ] && touch twice; touch once; echo "{failed} -9"; exit 255',
        monkeypatch,
    )
    assert driver.run() == 0
    assert capfd.readouterr().out.count("starting again") == 2
    fake_dvc(tmp_path, f'echo "{failed} -9"; exit 255', monkeypatch)
    assert driver.run() == 1
    said = capfd.readouterr().out
    assert said.count("starting again") == DEATHS - 2
    assert f"failed: it was killed {DEATHS} times" in said
    fake_dvc(tmp_path, f'echo "{failed} 1"; exit 255', monkeypatch)
    (paths.run(drive.STAGE, drive.NAME) / "starts.jsonl").unlink()
    assert driver.run() == 1
    assert "exited with 1" in capfd.readouterr().out
