"""The faults of tests/soak.py. Each returns what it did, or None where there is nothing to do it to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from soak import Round, Row

Fault = Callable[["Round"], "str | None"]


def _victim(round_: Round) -> Row | None:
    """A running job; where one drives `dvc repro`, that one half of the time."""
    rows = sorted(round_.running(), key=lambda row: row.job)
    drivers = [row for row in rows if row.name.startswith("drive-")]
    if drivers and round_.draw.random() < 0.5:
        return drivers[0]
    return round_.draw.choice(rows) if rows else None


def preempt(round_: Round) -> str | None:
    victim = _victim(round_)
    if victim is None:
        return None
    seconds = round_.draw.randint(1, 20)
    options = ["--partition=priority", "--nodes=2", "--exclusive", "--output=/dev/null"]
    round_.cluster.run("sbatch", *options, f"--wrap=sleep {seconds}")
    return f"both nodes wanted for {seconds} s, {', '.join(f'{row.job} {row.name}' for row in round_.running())} ran"


def usr2(round_: Round) -> str | None:
    return _of_slurm(round_, "scancel", "--signal=USR2")


def requeue(round_: Round) -> str | None:
    return _of_slurm(round_, "scontrol", "requeue")


def batch_script(round_: Round) -> str | None:
    return _of_slurm(round_, "scancel", "--batch", "--signal=KILL")


def requeue_hold(round_: Round) -> str | None:
    victim = _victim(round_)
    if victim is None:
        return None
    state = round_.draw.choice([[], ["State=SpecialExit"]])
    round_.cluster.run("scontrol", "requeuehold", *state, victim.job)
    round_.later(round_.draw.uniform(5, 30), lambda: _try(round_, "scontrol", "release", victim.job))
    return f"{victim.job} {victim.name} {' '.join(state)}"


def suspend(round_: Round) -> str | None:
    victim = _victim(round_)
    if victim is None:
        return None
    round_.cluster.run("scontrol", "suspend", victim.job)
    seconds = round_.draw.choice([5, 20, 150])
    round_.later(seconds, lambda: _try(round_, "scontrol", "resume", victim.job))
    return f"{victim.job} {victim.name} for {seconds} s"


def time_limit(round_: Round) -> str | None:
    victim = _victim(round_)
    if victim is None:
        return None
    used = round_.cluster.run("squeue", "-h", "-o", "%M", f"--jobs={victim.job}").splitlines()[0]
    minutes, seconds = map(int, used.split(":")[-2:])
    limit = minutes + (2 if seconds > 25 else 1)
    round_.cluster.run("scontrol", "update", f"JobId={victim.job}", f"TimeLimit={limit}")
    # Else it is warned at once whenever it starts again.
    round_.later(60 * limit, lambda: _try(round_, "scontrol", "update", f"JobId={victim.job}", "TimeLimit=30"))
    return f"{victim.job} {victim.name} has {limit} min, {used} used"


def cancelled(round_: Round) -> str | None:
    folders = sorted(round_.checkout.folder.glob("runs/train_*/*/job.json"))
    if not folders:
        return None
    folder = round_.draw.choice(folders).parent
    done = round_.checkout.pipeline("cancel", folder.parent.name, folder.name, check=False)
    return f"{folder.name}: {(done.stdout + done.stderr).strip()[:80]}"


def _of_slurm(round_: Round, *command: str) -> str | None:
    victim = _victim(round_)
    if victim is None:
        return None
    round_.cluster.run(*command, victim.job)
    return f"{victim.job} {victim.name}"


def _try(round_: Round, *command: str) -> None:
    subprocess.run(command, env=round_.cluster.environment, capture_output=True, timeout=60)


def one_rank(round_: Round) -> str | None:
    ranks = round_.processes()
    if not ranks:
        return None
    rank = round_.draw.choice(ranks)
    about = _about(rank)
    rank.kill()
    return about


def all_ranks(round_: Round) -> str | None:
    victim = _victim(round_)
    ranks = round_.processes(victim) if victim is not None else []
    for rank in ranks:
        rank.kill()
    return f"{len(ranks)} of {victim.job}" if ranks and victim is not None else None


def step_daemon(round_: Round) -> str | None:
    daemons = [each for each in psutil.process_iter(["name"]) if each.info["name"] == "slurmstepd"]
    if not daemons:
        return None
    chosen = round_.draw.choice(daemons)
    about = " ".join(chosen.cmdline())
    chosen.kill()
    return about


def stands_still(round_: Round) -> str | None:
    ranks = round_.processes()
    if not ranks:
        return None
    rank, seconds = round_.draw.choice(ranks), round_.draw.choice([3, 20, 200])
    about = _about(rank)
    rank.suspend()
    round_.later(seconds, lambda: rank.is_running() and rank.resume())
    return f"{about} for {seconds} s"


def cut_checkpoint(round_: Round) -> str | None:
    """Ends a job at once, and cuts its newest checkpoint short."""
    victim = _victim(round_)
    if victim is None:
        return None
    for path in sorted(round_.checkout.folder.glob("runs/train_*/*/job.json")):
        files = sorted(path.parent.glob("checkpoints/step-*.pt"), key=lambda file: int(file.name.split("-")[1]))
        if json.loads(path.read_text())["job_id"] == victim.job and len(files) == 2:
            for rank in round_.processes(victim):
                rank.kill()
            os.truncate(files[-1], files[-1].stat().st_size // 2)
            round_.cuts += 1
            return f"{victim.job} {files[-1].name}"
    return None


def lost_node(round_: Round) -> str | None:
    node = round_.draw.choice(["n1", "n2"])
    if not round_.cluster.is_whole():
        return None
    round_.cluster.kill(node)
    seconds = round_.draw.choice([1, 5, 30])
    round_.later(seconds, round_.cluster.up)
    return f"{node} for {seconds} s"


def controller(round_: Round) -> str | None:
    if not round_.cluster.is_whole():
        return None
    kind, seconds = round_.draw.choice([signal.SIGTERM, signal.SIGKILL]), round_.draw.choice([1, 10, 40])
    os.kill(round_.cluster.pid("slurmctld"), kind)
    round_.later(seconds, round_.cluster.up)
    return f"{kind.name}, away for {seconds} s"


def accounting(round_: Round) -> str | None:
    if not round_.cluster.is_whole():
        return None
    seconds = round_.draw.choice([1, 10, 60])
    round_.cluster.kill("slurmdbd")
    round_.later(seconds, round_.cluster.up)
    return f"away for {seconds} s"


def launcher(round_: Round) -> str | None:
    """`dvc repro` or the job that drives it, or the stage that waits."""
    words = round_.draw.choice(["repro", "pipeline"])
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        is_wanted = "dvc repro" in line if words == "repro" else " -m pipeline " in line
        if is_wanted or (words == "repro" and "pipeline.launch.drive" in line):
            found.append((line, process))
    if not found:
        return None
    line, process = round_.draw.choice(sorted(found, key=lambda each: each[0]))
    process.kill()
    return f"{line[-80:]}"


def another_launcher(round_: Round) -> str | None:
    if round_.is_driven or len(round_.launchers) > 2:
        return None
    round_.repro()
    return f"{len(round_.launchers)} at once"


def submitted_beside(round_: Round) -> str | None:
    subprocess.Popen(
        [sys.executable, "-m", "pipeline", "submit", "train_classifier", "train_segmenter"],
        cwd=round_.checkout.folder,
        env=round_.checkout.environment,
        stdout=(round_.checkout.folder / "submit.txt").open("a"),
        stderr=subprocess.STDOUT,
    )
    return "python -m pipeline submit"


def full_disk(round_: Round) -> str | None:
    filler = round_.checkout.folder / "runs/filler"
    if filler.exists():
        return None
    free = shutil.disk_usage(filler.parent).free
    size = free - round_.draw.choice([2**17, 2**20, 2**27])
    try:
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError:  # a checkpoint was faster
        filler.unlink()
        raise
    seconds = round_.draw.choice([3, 15])
    round_.later(seconds, lambda: filler.unlink(missing_ok=True))
    return f"for {seconds} s, {free / 1e9:.1f} GB filled"


def comment_in_code(round_: Round) -> str | None:
    chosen = round_.draw.choice(["train/loop.py", "launch/worker.py", "train/schedule.py", "models/poolformer.py"])
    path = round_.checkout.folder / "pipeline" / chosen
    path.write_text(path.read_text() + f"\n# {round_.draw.random()}\n")
    return chosen


def other_user(round_: Round) -> str | None:
    """Somebody else's job, with odd bytes in its comment, takes a node from the rest for a while."""
    seconds = round_.draw.randint(5, 30)
    comment = b"--comment=\xff|metaformer-|\xc3\x28 |1|2|3"
    command = [b"runuser", b"-u", b"daemon", b"--", b"sbatch", b"--nodes=1", b"--exclusive", b"--chdir=/tmp", comment]
    subprocess.run(
        [*command, b"--output=/dev/null", b"--partition=priority", b"--wrap=sleep %d" % seconds],
        env=round_.cluster.environment,
        capture_output=True,
        timeout=60,
    )
    return f"a node for {seconds} s"


def _about(rank: psutil.Process) -> str:
    environment = rank.environ()
    return (
        f"rank {environment['SLURM_PROCID']} of {environment['SLURM_JOB_ID']} on {environment.get('SLURMD_NODENAME')}"
    )


FAULTS: dict[str, tuple[Fault, int]] = {
    "preempted by a job of higher priority": (preempt, 3),
    "scancel --signal=USR2": (usr2, 3),
    "scontrol requeue": (requeue, 3),
    "batch script killed": (batch_script, 2),
    "requeuehold, then release": (requeue_hold, 2),
    "suspended, then resumed": (suspend, 2),
    "time limit": (time_limit, 2),
    "python -m pipeline cancel": (cancelled, 1),
    "kill -9 of one rank": (one_rank, 4),
    "kill -9 of all ranks": (all_ranks, 2),
    "kill -9 of slurmstepd": (step_daemon, 2),
    "SIGSTOP of one rank": (stands_still, 2),
    "ranks killed, newest checkpoint cut": (cut_checkpoint, 1),
    "a node without power": (lost_node, 2),
    "slurmctld away": (controller, 2),
    "slurmdbd away": (accounting, 2),
    "kill -9 of a launcher or its stage": (launcher, 4),
    "another dvc repro": (another_launcher, 2),
    "submit beside it": (submitted_beside, 2),
    "full disk": (full_disk, 1),
    "a comment added to the code": (comment_in_code, 2),
    "another user's job": (other_user, 1),
}
