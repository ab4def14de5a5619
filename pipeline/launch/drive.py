"""`python -m pipeline drive`: `dvc repro` as a job of its own, so that nothing has to stay alive on a login node.

Such a job submits its successor before it starts `dvc repro`. All of them have one name and Slurm starts one at a time
(`--dependency=singleton`): whatever ends a job, a time limit, a preemption, a lost node or `kill -9`, the next goes on.
The job in which `dvc repro` comes to its end cancels the one after it.
"""

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from pipeline import paths
from pipeline.cluster import Profile, load_profile
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.drive_starts import DEATHS, WITHIN_S, Starts
from pipeline.launch.record import Job
from pipeline.launch.scheduler import scheduler_of
from pipeline.launch.slurm_status import FINAL, UNSETTLED, UnreachableError, ask, squeue

STAGE, NAME = "drive", "repro"
MEMORY = "4G"
STOP_S = 30
"""How long `dvc repro` may take to leave after an interrupt."""
LOCKED_S = 60
"""How often it is started again while another DVC works in the checkout."""
SUCCESSOR_S = 60
"""How often a job that has no successor tries to submit one."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by", "Already unlocked")
"""DVC's errors about its locks; the last one after several were killed at once."""
STAGE_KILLED = re.compile(r"exited with -(9|15)$")
"""DVC's error when a stage's process got a signal, from the OOM killer or from whoever ends a node."""


def submit(profile: Profile, targets: Sequence[str]) -> str:
    """Queue a job that runs `dvc repro` with these targets to its end; a sentence for the user.

    Raises:
        UserError: the profile is not Slurm's, sbatch refuses the job, or other targets are driven already.
    """
    if not scheduler_of(profile.kind).has_queue:
        raise UserError(f"{paths.cluster_profile()} is of this machine: `dvc repro` needs no job here")
    folder = paths.run(STAGE, NAME)
    with record.launching():
        job = record.read_job(folder)
        try:
            rows = _jobs(job) if job is not None else {}
        except UnreachableError as error:
            raise UserError(f"Slurm does not answer ({error}): nothing was submitted") from None
        if rows:
            others = json.loads((folder / "targets.json").read_text())
            if others != list(targets):
                raise UserError(
                    f"job {min(rows, key=int)} drives `{shlex.join(['dvc', 'repro', *others])}`: wait for it, or end "
                    f"it with `python -m pipeline cancel {STAGE} {NAME}`"
                )
            return f"job {min(rows, key=int)} drives it already"
        shutil.rmtree(folder, ignore_errors=True)
        jobs = folder / "jobs"
        jobs.mkdir(parents=True)
        (folder / "targets.json").write_text(json.dumps(list(targets)))
        token, now = record.new_token(), time.time()
        job = Job(profile.kind, token, str(jobs.absolute()), profile.open_environment, now, **record.this_host())
        (folder / "fingerprint").write_text(job.token)
        record.write_job(folder, job)
        script = jobs / "script.sh"
        script.write_text(_script(job, profile))
        job_id = _sbatch(script, profile.environment)
        record.write_job(folder, replace(job, job_id=job_id))
    return f"job {job_id} drives `{shlex.join(['dvc', 'repro', *targets])}`; its log: {folder}/log.txt"


def cancel() -> str:
    """End the driving; jobs of trainings go on. Returns the jobs' ids.

    Raises:
        UserError: nothing is driven, or Slurm does not answer.
    """
    folder = paths.run(STAGE, NAME)
    job = record.read_job(folder)
    try:
        rows = _jobs(job) if job is not None else {}
        if job is None or not rows:
            raise UserError(f"{folder} has no job that is pending or running")
        ask(["scancel", *sorted(rows, key=int, reverse=True)], job.environment)  # the successor first
    except UnreachableError as error:
        raise UserError(f"Slurm does not answer ({error}): nothing was cancelled") from None
    return ", ".join(sorted(rows, key=int))


def _jobs(job: Job) -> dict[str, str]:
    """State by id of the drive's jobs that are pending or running.

    Raises:
        UnreachableError: Slurm does not answer.
    """
    rows = squeue(job.environment)
    over = FINAL | UNSETTLED
    return {job_id: row.state for job_id, row in rows.items() if row.comment == job.token and row.state not in over}


def _script(job: Job, profile: Profile) -> str:
    options = {
        "job-name": "drive-" + hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:12],
        "comment": job.token,
        "dependency": "singleton",
        "output": f"{job.jobs}/%j_0_log.out",
        "open-mode": "append",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": 1,
        "mem": MEMORY,
        "time": profile.time_min,
        "signal": f"B:USR2@{profile.signal_delay_s}",
        "requeue": True,
        "propagate": "NONE",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
    } | {key.replace("_", "-"): value for key, value in profile.drive.items()}
    lines = ["#!/bin/bash"]
    for key, value in options.items():
        if value is not None and value is not False:
            lines.append(f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}"))
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.open_environment.items()]
    lines += [
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export PIPELINE_CLUSTER={shlex.quote(str(paths.cluster_profile()))}",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        'trap "" USR2 TERM  # until the driver handles them',
        f"exec {shlex.quote(sys.executable)} -m pipeline.launch.drive {job.token}",
    ]
    return "\n".join(lines) + "\n"


def _sbatch(script: Path, extra: dict[str, str]) -> str:
    try:
        return ask(["sbatch", "--parsable", str(script)], extra).split(";")[0].strip()
    except UnreachableError as error:
        raise UserError(f"sbatch refuses the job: {error}; correct {paths.cluster_profile()}") from None


def _die_with_parent() -> None:
    """Have the kernel kill this process when the driver dies: the next one must not meet its locks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Driver:
    """What runs in the job."""

    def __init__(self, token: str) -> None:
        self.folder, self.token = paths.run(STAGE, NAME), token
        self.starts = Starts(self.folder)
        self.profile = load_profile(paths.cluster_profile())
        self.own_id = os.environ["SLURM_JOB_ID"]
        self.stopping, self.started = False, time.time()
        self.successor: str | None = None
        self.next_try = 0.0
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopping = True
        os.write(1, f"{signal.Signals(number).name}: leaving; the next job goes on\n".encode())

    def run(self) -> int:
        """Run `dvc repro` until it ends by itself, or this job has to leave; the exit status."""
        job = record.read_job(self.folder)
        if job is None or job.token != self.token:
            print("another drive has taken this one's place: ending")
            return 0
        record.write_job(self.folder, replace(job, job_id=self.own_id))
        while True:
            if self.starts.deaths() >= DEATHS:
                return self._end(job, f"failed: it was killed {DEATHS} times within {WITHIN_S // 60} min", 1)
            self._have_successor(job)
            code, error, blocked_by = (0, "", set[int]()) if self.stopping else self._repro(job)
            if self.stopping or code in (-signal.SIGKILL, -signal.SIGTERM):
                if self.successor is None:  # a limit allows one job only
                    subprocess.run(["scontrol", "requeue", self.own_id])
                return 0 if self.stopping else 1
            if code == 0:
                return self._end(job, "done", 0)
            if STAGE_KILLED.search(error):
                print("its process was killed: starting again", flush=True)
                continue
            if not any(words in error for words in LOCKED):
                return self._end(job, f"failed: {error}", 1)
            if self.starts.remove_locks(self.started, blocked_by):
                continue
            print(f"another DVC works in this checkout; trying again in {LOCKED_S} s", flush=True)
            deadline = time.monotonic() + LOCKED_S
            while time.monotonic() < deadline and not self.stopping:
                self._have_successor(job)
                time.sleep(0.5)

    def _have_successor(self, job: Job) -> None:
        """Have a job that goes on when this one ends; one may be waiting from before this one was requeued."""
        if self.successor is not None or time.monotonic() < self.next_try:
            return
        try:
            waiting = [other for other in _jobs(job) if int(other) > int(self.own_id)]
            self.successor = waiting[0] if waiting else _sbatch(Path(job.jobs) / "script.sh", self.profile.environment)
        except (UnreachableError, UserError) as error:
            if not self.next_try:
                print(f"no successor ({error}): this job puts itself back, but a kill ends the drive", flush=True)
            self.next_try = time.monotonic() + SUCCESSOR_S

    def _repro(self, job: Job) -> tuple[int, str, set[int]]:
        """The exit status of `dvc repro`, its last error, and the processes that it is blocked by."""
        targets = json.loads((self.folder / "targets.json").read_text())
        command = [str(Path(sys.executable).with_name("dvc")), "repro", *targets]
        print(f"== {time.strftime('%F %T')} job {self.own_id}: {shlex.join(['dvc', *command[1:]])}", flush=True)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert process.stdout is not None
        self.starts.note(self.own_id, process.pid)
        errors: list[str] = []
        blocked_by: set[int] = set()

        def relay(lines: Iterable[str]) -> None:
            for line in lines:
                print(line, end="", flush=True)
                errors.extend([line.strip()] * line.lower().startswith("error"))
                blocked_by.update(int(pid) for pid in re.findall(r"^\s*\(PID (\d+)\)", line))

        reader = threading.Thread(target=relay, args=(process.stdout,), daemon=True)
        reader.start()
        asked = 0.0
        while process.poll() is None:
            if not self.stopping:
                self._have_successor(job)
            elif not asked:
                asked = time.monotonic()
                os.killpg(process.pid, signal.SIGINT)
            if asked and time.monotonic() - asked > STOP_S:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
        reader.join(timeout=STOP_S)  # a process that was left behind may hold the pipe
        error = errors[-1] if errors else f"exit status {process.returncode}"
        if process.returncode != -signal.SIGKILL:
            stage_killed = not self.stopping and STAGE_KILLED.search(error) is not None
            self.starts.note(self.own_id, process.pid, ended=True, stage_killed=stage_killed)
        return process.returncode, error, blocked_by

    def _end(self, job: Job, how: str, code: int) -> int:
        """Say how it ended, in the log and by the profile's `notify`, and cancel the successor."""
        message = f"dvc repro in {Path.cwd()}: {how}"
        print(message, flush=True)
        if others := [other for other in _jobs(job) if other != self.own_id]:
            ask(["scancel", *others], self.profile.environment)
        if self.profile.notify is not None:
            told = subprocess.run(["bash", "-c", self.profile.notify], env=os.environ | {"MESSAGE": message})
            if told.returncode:
                print(f"notify ended with {told.returncode}: {self.profile.notify}", flush=True)
        if code == 0:
            (self.folder / "done").write_text(self.token)
        return code


if __name__ == "__main__":
    sys.exit(Driver(sys.argv[1]).run())
