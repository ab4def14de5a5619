"""What runs inside a job: one process per rank."""

import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import agreement, attempts, record, usage
from pipeline.launch.attempts import Attempt, InfrastructureError, node
from pipeline.launch.fingerprint import code_of, content_digest
from pipeline.launch.local_copy import LocalCopies
from pipeline.launch.scheduler import scheduler_of
from pipeline.launch.stall import ended_without_steps
from pipeline.tasks.description import load

if TYPE_CHECKING:
    from torch.distributed import TCPStore

log = logging.getLogger(__name__)
STALE_S = 60
"""How long a network file system may show an old file."""
CLAIM_S = 20
"""How often the first rank checks whether another job was submitted for its run folder."""
RENDEZVOUS_S = 600
"""How long the other ranks wait for the port of the first."""
STORE_TIMEOUT = timedelta(minutes=10)
COPY_TIMEOUT = timedelta(days=1)
"""How long a rank waits for the local copies of the others; one that dies meanwhile ends the job."""


class Worker:
    """The callable that submitit pickles; it has paths and no other state."""

    def __init__(self, jobs: Path, token: str) -> None:
        self.jobs, self.token = jobs, token

    def pickled(self, path: Path) -> None:
        """Write what submitit's job reads; submitit names its own copy only after sbatch has answered."""
        from submitit.helpers import DelayedSubmission

        DelayedSubmission(self).dump(path)

    def __call__(self) -> NoReturn:
        """Run this rank of the job and exit its process: with status 1 after an error, which is in the run folder.

        This skips submitit's and the interpreter's own shutdown. Threads of torch, gloo, FFCV and OpenMP still run
        then, and one that aborts would make a run that is done count as failed.
        """
        import faulthandler

        stopping = _Stopping()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
        faulthandler.enable()
        status = 1
        try:
            self._attempt(stopping)
            status = 0
        except SystemExit:
            pass  # its message is in the log or in the run folder's errors
        except BaseException:
            traceback.print_exc()
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _attempt(self, stopping: "_Stopping") -> None:
        """Run to the end, or until the job is stopped."""
        import submitit

        environment = submitit.JobEnvironment()
        scheduler = scheduler_of(environment.cluster)
        attempt = Attempt.current()
        folder = attempts.run_folder(self.jobs)
        is_first = environment.global_rank == 0
        if record.is_done(folder, record.fingerprint_of(folder)):
            log.info("%s is already done: exiting", folder)
            return
        if is_first:
            self._claim(folder, attempt)
        with attempts.errors_of_rank(folder, attempt, environment.global_rank):
            if is_first:
                _check_identity(folder)
                stopping.watch(folder, self.token)
            finished = self._run(folder, environment, attempt, stopping)
            if stopping.is_replaced and not finished:
                log.error("another job was submitted for %s: exiting", folder)
                raise SystemExit(1)
            if not finished and not scheduler.has_queue:
                raise UserError("stopped by a signal; `dvc repro` resumes from the checkpoint that it wrote")
        if is_first and finished:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        elif is_first:
            attempts.request_requeue(self.jobs)

    def _claim(self, folder: Path, attempt: Attempt) -> None:
        """Record this job as the run folder's; exit if the folder was submitted under another token.

        A duplicate job, should there ever be one, changes nothing because of this.
        """
        deadline = time.monotonic() + STALE_S
        while not record.fill_in(folder, self.token, attempt.job):
            if time.monotonic() > deadline:
                log.error("%s belongs to another job: exiting without changing anything", folder)
                raise SystemExit(1)
            time.sleep(1)

    def _run(self, folder: Path, environment: Any, attempt: Attempt, stopping: "_Stopping") -> bool:
        work = record.read_work(folder)
        profile = Profile.model_validate_json(json.dumps(work["profile"]))
        os.environ.setdefault("OMP_NUM_THREADS", str(profile.cpus))
        # Waiting threads sleep: spinning on a core that another process needs costs up to 10x.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Our FFCV operations call C; without this, only importing ffcv compiles for seconds.
        os.environ["NUMBA_DISABLE_JIT"] = "1"
        if (needed := work["after"]) is not None:
            _await_done(Path(needed["folder"]), needed["fingerprint"])
        for beton in work["betons"]:
            if not Path(beton).exists():
                raise InfrastructureError(f"{beton} is not there on {node()}: is its file system mounted?")
        call = load(work["call"])
        from pipeline import device as ranks

        rank, size = environment.global_rank, environment.num_tasks
        own = agreement.facts(profile, environment.local_rank, work["arguments"])
        store = rendezvous(folder, attempt, environment.hostnames[0], rank, size) if size > 1 else None
        if store is not None:
            agreement.agree(store, rank, size, own, profile)
        if rank == 0:
            agreement.hold_to(folder, attempt, own)
        betons, limit_s = [Path(beton) for beton in work["betons"]], profile.stall_min * 60
        with LocalCopies(betons, profile.local_copy, stopping) as copies:
            if store is not None:
                store.set(f"copies of {rank}", "made")
                store.wait([f"copies of {other}" for other in range(size)], COPY_TIMEOUT)
            with ranks.join(rank, size, environment.local_rank, profile.cpus, store, stopping) as world:
                stopping.asked_at = time.monotonic()
                lively = ended_without_steps(lambda: stopping.asked_at, limit_s, folder, attempt, rank)
                used = usage.recorded(folder, attempt, profile) if rank == 0 else nullcontext()
                with used, lively:
                    finished = bool(call(world, folder, profile, **copies.localised(work["arguments"])))
                if finished and rank == 0:
                    with paths.written_atomically(folder / "done") as temporary:
                        temporary.write_text(str(record.fingerprint_of(folder)))
                if store is not None:
                    import torch.distributed as dist

                    dist.barrier()  # rank 0 has written everything: now all ranks may exit
            copies.finished = finished
        return finished


def _check_identity(folder: Path) -> None:
    """Compare code and data with those that the job was queued with, at each attempt, before the folder is touched."""
    work = record.read_work(folder)
    again = "cancel the job with `python -m pipeline cancel`, then run `dvc repro`"
    if code_of(work["call"]).digest != work["code"]:
        raise UserError(f"the code in {work['snapshot']} is not what this job was queued with: {again}")
    for path, digest in work["inputs"].items():
        if not Path(path).exists():
            raise InfrastructureError(f"{path} is not there on {node()}: is its file system mounted?")
        if content_digest(Path(path)) != digest:
            raise UserError(f"{path} has changed since this job was queued: {again}")


def _await_done(folder: Path, fingerprint: str) -> None:
    """Give a network file system time to show the result that this job depends on.

    Raises:
        UserError: it is not there.
    """
    deadline = time.monotonic() + STALE_S
    while not record.is_done(folder, fingerprint):
        if time.monotonic() > deadline:
            raise UserError(f"{folder} does not contain the result that this job depends on: run `dvc repro` again")
        if folder.exists():
            list(folder.iterdir())  # makes NFS refresh the folder
        time.sleep(1)


def rendezvous(folder: Path, attempt: Attempt, host: str, rank: int, size: int) -> "TCPStore":
    """The store over which the ranks of `attempt` find one another; rank 0 runs on `host`.

    It listens on a port that rank 0's system picks and that the run folder, which all nodes see, passes on. A fixed or
    computed port may be in use, by another job on the node or by the previous attempt, and a rank that connects to
    such a port waits for ever.

    Raises:
        InfrastructureError: rank 0 did not open a port.
    """
    import torch.distributed as dist

    place = folder / f"meeting-{attempt}.json"
    if rank == 0:
        for old in folder.glob("meeting-*.json"):
            old.unlink()
        store = dist.TCPStore(host, 0, size, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
        with paths.written_atomically(place) as temporary:
            temporary.write_text(json.dumps({"host": host, "port": store.port}))
        return store
    deadline = time.monotonic() + RENDEZVOUS_S
    while place not in folder.iterdir():  # listing the folder makes a network file system refresh it
        if time.monotonic() > deadline:
            text = f"rank 0 on {host} did not open a port within {RENDEZVOUS_S} s: {place} is missing"
            raise InfrastructureError(text)
        time.sleep(0.1)
    at = json.loads(place.read_text())
    return dist.TCPStore(at["host"], at["port"], size, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)


class _Stopping:
    """True once the job has to stop: USR2 before a time limit or preemption, SIGTERM, another job's submission."""

    def __init__(self) -> None:
        self.asked = self.is_replaced = False
        self.checked = self.asked_at = time.monotonic()
        self.watched: tuple[Path, str] | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        os.write(
            1, f"{signal.Signals(number).name}: stopping after this step\n".encode()
        )  # not logging: its lock may be held

    def watch(self, folder: Path, token: str) -> None:
        """Also stop when `folder` is submitted under another token: two jobs must not write into it."""
        self.watched = (folder, token)

    def __call__(self) -> bool:
        """Asked by a training after each step, and in evaluations and validation passes after each batch."""
        self.asked_at = time.monotonic()
        if self.watched is not None and time.monotonic() - self.checked > CLAIM_S:
            self.checked = time.monotonic()
            job = record.read_job(self.watched[0])
            self.is_replaced = job is not None and job.token != self.watched[1]
        return self.asked or self.is_replaced
