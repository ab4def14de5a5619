"""What a drive decides without Slurm: which locks of DVC are a killed one's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.launch.ahead import RWLOCK
from pipeline.launch.drive import STALE_S, remove_locks

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


def test_the_lock_of_a_killed_dvc_is_removed_when_it_is_old(
    killed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_started, lock = time.time(), RWLOCK.with_name("lock")
    assert not remove_locks([killed], job_started, set())  # somebody else's, perhaps, who lets go of it
    monkeypatch.setattr(time, "time", lambda: job_started + STALE_S + 1)
    assert not remove_locks([killed, {**killed, "ended": True}], job_started, set())
    assert not remove_locks([], job_started, set())
    assert not remove_locks([{**killed, "time": lock.stat().st_ctime + 1}], job_started, set())
    assert lock.exists()
    assert remove_locks([killed], job_started, set())
    assert not lock.exists()


def test_a_path_that_only_killed_dvcs_use_is_free(killed: dict[str, object]) -> None:
    RWLOCK.write_text(json.dumps({"write": {}, "read": {}}))
    assert not remove_locks([killed], time.time(), {os.getpid()})
    assert not remove_locks([killed], time.time(), {int(str(killed["pid"])), os.getpid()})
    assert remove_locks([killed], time.time(), {int(str(killed["pid"]))})
    assert not RWLOCK.exists()
