"""What runs inside a job: one process a rank."""

import importlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import attempts, record
from pipeline.launch.attempts import Attempt
from pipeline.launch.fingerprint import code_of, content_digest

log = logging.getLogger(__name__)
STALE_S = 60
"""A network file system may show an old file for so long."""
CLAIM_S = 20
"""So often the first rank looks whether its run folder has come to wait for another job."""


class Worker:
    """The callable that submitit pickles; it names files and holds no state of its own."""

    def __init__(self, jobs: Path, token: str) -> None:
        self.jobs, self.token = jobs, token

    def pickled(self, path: Path) -> None:
        """Write what submitit's job reads; its own copy gets its name only after sbatch has answered."""
        from submitit.core.utils import DelayedSubmission

        DelayedSubmission(self).dump(path)

    def __call__(self) -> NoReturn:
        """Run this rank of the job, and end its process: with status 1 after an error, which is left in the run folder.

        Nothing of submitit's or the interpreter's end follows. Threads of torch, gloo, FFCV and OpenMP are still there
        then, and one that aborts would have a run that is done count as failed.
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
            pass  # its message is in the log, or in the run folder's errors
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
        attempt = Attempt.current()
        folder = attempts.run_folder(self.jobs)
        is_local, is_first = environment.cluster == "local", environment.global_rank == 0
        if record.is_done(folder, record.fingerprint_of(folder)):
            log.info("%s is done: nothing is left to do", folder)
            return
        if is_first:
            self._take(folder, attempt, is_local)
        with attempts.errors_of_rank(folder, attempt, environment.global_rank):
            if is_first:
                _check_identity(folder)
                _record_software(folder, attempt)
                stopping.watch(folder, self.token)
            finished = self._run(folder, environment, attempt, stopping)
            if stopping.is_replaced and not finished:
                log.error("%s belongs to another job by now: this one has left", folder)
                raise SystemExit(1)
            if not finished and is_local:
                raise UserError("stopped by a signal; `dvc repro` goes on from the checkpoint that it wrote")
        if is_first and finished:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        elif is_first:
            attempts.ask_again(self.jobs)

    def _take(self, folder: Path, attempt: Attempt, is_local: bool) -> None:
        """Note this job as the run folder's; end it when the folder waits for another one's result.

        Should a second job have been submitted in spite of all, this is why it touches nothing.
        """
        created = _controller_created() if is_local else None
        deadline = time.monotonic() + STALE_S
        while not record.fill_in(folder, self.token, attempt.job, created):
            if time.monotonic() > deadline:
                log.error("%s belongs to another job by now: this one has nothing to do", folder)
                raise SystemExit(1)
            time.sleep(1)

    def _run(self, folder: Path, environment: Any, attempt: Attempt, stopping: "_Stopping") -> bool:
        work = record.read_work(folder)
        profile = Profile.model_validate_json(json.dumps(work["profile"]))
        os.environ.setdefault("OMP_NUM_THREADS", str(profile.cpus))
        # Threads that wait for one another sleep: spinning on a core that another process wants costs up to 10x.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Our FFCV operations call C; without this, importing ffcv alone compiles for seconds.
        os.environ["NUMBA_DISABLE_JIT"] = "1"
        if (needed := work["after"]) is not None and not record.is_done(Path(needed["folder"]), needed["fingerprint"]):
            raise UserError(
                f"{needed['folder']} does not contain the result that this job depends on: run `dvc repro` again"
            )
        module, function = work["call"].split(":")
        call = getattr(importlib.import_module(module), function)
        from pipeline import world as ranks
        from pipeline.launch import rendezvous

        rank, size = environment.global_rank, environment.num_tasks
        store = rendezvous.meet(folder, attempt, environment.hostnames[0], rank, size) if size > 1 else None
        with ranks.join(rank, size, environment.local_rank, profile.cpus, store, stopping) as world:
            finished = bool(call(world, folder, profile, **work["arguments"]))
            if finished and rank == 0:
                with paths.written_atomically(folder / "done") as temporary:
                    temporary.write_text(str(record.fingerprint_of(folder)))
            if store is not None:
                import torch.distributed as dist

                dist.barrier()  # rank 0 has written what it writes: now all may leave at once
        return finished


def _check_identity(folder: Path) -> None:
    """Hold code and data against those that the job was queued with, at each attempt, before the folder is touched."""
    work = record.read_work(folder)
    again = "take the job back with `python -m pipeline cancel`, then run `dvc repro`"
    if code_of(work["call"]).digest != work["code"]:
        raise UserError(f"the code in {work['snapshot']} is not what this job was queued with: {again}")
    for path, digest in work["inputs"].items():
        if not Path(path).exists() or content_digest(Path(path)) != digest:
            raise UserError(f"{path} is not what it was when this job was queued: {again}")


SOFTWARE = ("torch", "torchvision", "timm", "ffcv", "numpy", "pillow", "opencv-python")


def _record_software(folder: Path, attempt: Attempt) -> None:
    """Note the versions that this attempt runs; say so when a run goes on under others."""
    now = {name: version(name) for name in SOFTWARE} | {"python": platform.python_version()}
    for library in ("pipeline.data._pixels", "pipeline.models._block"):
        spec = importlib.util.find_spec(library)
        if spec is not None and spec.origin is not None:
            now[library] = content_digest(Path(spec.origin))[:16]
    file = folder / "software.jsonl"
    before = (record.read_lines(file) or [{}])[-1]
    for name in sorted(before.keys() & now.keys()):
        if name != "attempt" and before[name] != now[name]:
            log.warning("%s is %s now; the attempt before ran %s", name, now[name], before[name])
    with file.open("a") as stream:
        stream.write(json.dumps({"attempt": str(attempt), **now}) + "\n")


class _Stopping:
    """True once the job has to leave: USR2 before a time limit or preemption, SIGTERM, another job's claim."""

    def __init__(self) -> None:
        self.asked = self.is_replaced = False
        self.looked = time.monotonic()
        self.watched: tuple[Path, str] | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        os.write(1, f"{signal.Signals(number).name}: stopping after this step\n".encode())  # logging may be at work

    def watch(self, folder: Path, token: str) -> None:
        """Leave, too, when `folder` has come to wait for another token: two jobs must not write into it."""
        self.watched = (folder, token)

    def __call__(self) -> bool:
        if self.watched is not None and time.monotonic() - self.looked > CLAIM_S:
            self.looked = time.monotonic()
            job = record.read_job(self.watched[0])
            self.is_replaced = job is not None and job.token != self.watched[1]
        return self.asked or self.is_replaced


def _controller_created() -> float:
    """Start of the local executor's controller, this process's parent."""
    import psutil

    parent = psutil.Process().parent()
    return parent.create_time() if parent is not None else 0.0
