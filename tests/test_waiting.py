"""What a stage outlasts while it waits for its job, and how a job that stands still is ended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline import paths
from pipeline.__main__ import STAGES, main
from pipeline.errors import UserError
from pipeline.launch import jobs, record, slurm_status, stall, submission
from pipeline.launch.record import Job
from pipeline.launch.scheduler import Status
from pipeline.launch.slurm_status import UnreachableError, ask, squeue


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH, in a checkout's place."""
    monkeypatch.chdir(tmp_path)
    paths.RUNS.mkdir()
    monkeypatch.setattr(slurm_status, "_answered", set())
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


A_JOB = Job("slurm", "metaformer-this", "jobs", {}, submitted=0.0, job_id="7")


def test_odd_bytes_in_anyones_comment_hurt_nobody(programs: Path) -> None:
    put(programs, "squeue", r"printf '6|RUNNING|None|N/A|n1|caf\351\n7|RUNNING|None|N/A|n1|metaformer-this\n'")
    rows = squeue({})
    assert rows["7"].comment == A_JOB.token
    assert rows["6"].comment == "caf\ufffd"


def test_commands_that_go_away_while_one_waits_say_nothing_of_the_job(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start a missing program is the user's error; later its file system may be away, or no process left."""
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(UserError, match="squeue is not on the PATH"):
        ask(["squeue"], {})
    program = put(programs, "squeue", "echo '7|RUNNING|None|N/A|n1|metaformer-this'")
    monkeypatch.setattr(slurm_status, "POLL_S", 1.0)
    assert slurm_status.status(A_JOB).state == "RUNNING"
    program.unlink()
    (programs / "runs/slurm.json").write_text(
        json.dumps({**json.loads((programs / "runs/slurm.json").read_text()), "asked": 0.0})
    )
    seen = slurm_status.status(A_JOB)
    assert (seen.state, seen.is_over) == ("RUNNING", False)
    assert seen.doubt is not None
    program.mkdir()
    with pytest.raises(UnreachableError):
        ask(["squeue"], {})

    def no_process_left(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", no_process_left)
    with pytest.raises(UnreachableError, match="temporarily unavailable"):
        ask(["squeue"], {})


def test_odd_lines_of_the_accounting_are_left_out(programs: Path) -> None:
    put(programs, "sacct", r"printf '7|RUNNING\nslurm_load: warning\n8| \n9|CANCELLED by 0\n10|A|B\n'")
    assert slurm_status._sacct(["7"], {}) == {"7": "RUNNING", "9": "CANCELLED"}


def test_what_was_asked_is_written_when_asked_and_not_at_each_look(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(programs, "squeue", "echo '7|RUNNING|None|N/A|n1|metaformer-this'")
    monkeypatch.setattr(slurm_status, "POLL_S", 30.0)
    cache = programs / "runs/slurm.json"
    slurm_status.status(A_JOB)
    written = cache.stat().st_ino
    for _ in range(5):
        assert slurm_status.status(A_JOB).state == "RUNNING"
    assert cache.stat().st_ino == written
    ahead = {**json.loads(cache.read_text()), "asked": time.time() + 3600}  # by a machine whose clock is an hour ahead
    cache.write_text(json.dumps(ahead))
    slurm_status.status(A_JOB)
    assert json.loads(cache.read_text())["asked"] < time.time() + 1


def test_a_job_that_was_submitted_by_a_clock_ahead_is_seen_to_end(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(programs, "squeue", "true")
    put(programs, "sacct", "echo '7|COMPLETED'")
    monkeypatch.setattr(slurm_status, "POLL_S", 1.0)
    ahead = Job("slurm", "metaformer-this", "jobs", {}, submitted=time.time() + 3600, job_id="7")
    assert slurm_status.status(ahead).is_over


def test_a_question_changes_no_variable_of_this_process(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may read them at any time; a token that Slurm needs goes along."""
    for name, value in (("SQUEUE_STATES", "PD"), ("SLURM_JWT", "secret"), ("SLURM_CONF", "/a")):
        monkeypatch.setenv(name, value)
    put(programs, "squeue", "env")
    before = dict(os.environ)
    with monkeypatch.context() as frozen:
        frozen.setattr(os, "environ", _Frozen(before))
        said = ask(["squeue"], {"EXTRA": "1"})
    assert {"EXTRA=1", "SLURM_JWT=secret", "SLURM_CONF=/a"} <= set(said.splitlines())
    assert "SQUEUE_STATES" not in said


class _Frozen(dict[str, str]):
    def __setitem__(self, key: str, value: str) -> None:
        raise AssertionError(key)

    __delitem__ = clear = __setitem__  # type: ignore[assignment]


def test_the_table_has_no_row_for_what_was_put_aside(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks nothing about it; a folder without a fingerprint is no error."""
    put(programs, "squeue", "exit 1")
    for name in ("poolformer_s12-0.0123456789ab", "poolformer_s24-0"):
        folder = paths.run("train_classifier", name)
        folder.mkdir(parents=True)
        record.write_job(folder, A_JOB)
    jobs.show_jobs()
    said = capsys.readouterr().out
    assert "poolformer_s24-0" in said
    assert "poolformer_s12-0" not in said


def test_every_stage_that_runs_jobs_has_jobs_that_can_be_cancelled(programs: Path) -> None:
    stages = [stage for stage in STAGES if stage.startswith(("train", "evaluate"))]
    for stage in [*stages, "doctor"]:
        assert main(["cancel", stage, "test-job"]) == 1, "no such job, and no wrong word"


def test_who_waits_for_a_launcher_says_so_and_a_cancel_waits_too(
    programs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the intent and sbatch's answer there is no job yet, but there will be."""
    caplog.set_level("INFO")
    monkeypatch.setattr(record, "WAIT_SILENTLY_S", 0.1)
    put(programs, "squeue", "echo '7|RUNNING|None|N/A|n1|metaformer-this'")
    put(programs, "scancel", f"echo $* > {programs}/cancelled")
    folder = paths.run("train_classifier", "poolformer_s12-0")
    folder.mkdir(parents=True)
    record.write_job(folder, dataclasses.replace(A_JOB, job_id=None))
    ended: list[str] = []
    cancelling = threading.Thread(target=lambda: ended.append(submission.cancel("train_classifier", folder.name)))
    with record.launching():
        cancelling.start()
        time.sleep(0.5)
        record.write_job(folder, A_JOB)
    cancelling.join(timeout=30)
    assert ended == ["7"]
    assert (programs / "cancelled").read_text() == "7\n"
    assert "waiting for another process that is submitting" in caplog.text


STANDING_STILL = """
import queue, sys, time
from pathlib import Path
from pipeline.launch import stall
from pipeline.launch.attempts import Attempt
stall.OTHERS_S = 0.1
stepped = time.monotonic()
def wait_for_a_batch_that_never_comes():
    queue.Queue().get()
with stall.ended_without_steps(lambda: stepped, float(sys.argv[2]), Path(sys.argv[1]), Attempt("7", 0), 0):
    for _ in range(4):
        time.sleep(0.3)
        stepped = time.monotonic()
    print("four steps", flush=True)
    if sys.argv[3] == "hang":
        wait_for_a_batch_that_never_comes()
"""


def test_a_rank_without_steps_is_ended_with_its_stacks_in_the_log(tmp_path: Path) -> None:
    def run(limit_s: float, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STANDING_STILL, str(tmp_path), str(limit_s), what]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    ended = run(1.0, "hang")
    assert ended.returncode == stall.STATUS, ended.stderr
    assert "four steps" in ended.stdout
    assert "in wait_for_a_batch_that_never_comes" in ended.stdout
    (error,) = record.errors(tmp_path, "7.0")
    assert error["message"].startswith("StallError: no step for 0.0 min; the stacks")
    assert not error["is_user_error"]
    assert run(1.0, "end").returncode == 0
    assert run(0.0, "end").returncode == 0


SUSPENDED = """
import sys, time
from pathlib import Path
from pipeline.launch import stall
from pipeline.launch.attempts import Attempt
steps = 0
with stall.ended_without_steps(lambda: steps, 2.0, Path(sys.argv[1]), Attempt("7", 0), 0):
    print("begins", flush=True)
    for steps in range(30):
        time.sleep(0.1)
"""


def test_a_rank_of_a_job_that_was_suspended_is_not_one_that_stands_still(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0


def test_the_table_says_how_long_a_training_has_written_nothing(tmp_path: Path) -> None:
    running = Status("RUNNING", False)
    line = {"step": 20, "time_ms": (time.time() - 40 * 60) * 1000}
    (tmp_path / "history.jsonl").write_text(json.dumps(line) + "\n")
    assert jobs._why(tmp_path, A_JOB, running) == "no line in its history for 40 min"
    (tmp_path / "history.jsonl").write_text(json.dumps({**line, "time_ms": time.time() * 1000}) + "\n")
    assert jobs._why(tmp_path, A_JOB, running) == ""
