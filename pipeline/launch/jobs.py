"""Attach or submit: a job with the same fingerprint is waited for, a finished one is collected, none runs twice."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from pipeline import paths
from pipeline.cluster import Profile, load_profile
from pipeline.errors import UserError
from pipeline.launch.fingerprint import Work, fingerprint
from pipeline.launch.worker import Worker

log = logging.getLogger(__name__)
POLL_LOCAL_S = 0.5
POLL_SLURM_S = 10.0
ENDED_STATES = {
    "FINISHED", "INTERRUPTED", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE",
}  # fmt: skip


def run_job(work: Work, outputs: dict[str, Path], watch: Callable[[Path], None] = lambda folder: None) -> None:
    """Run `work` on the cluster of PIPELINE_CLUSTER and put its output files where DVC expects them.

    Args:
        work: what to run.
        outputs: name in the run folder's `out/` -> final place; each is moved into place whole.
        watch: called with the run folder every few seconds while the job runs, and once after it.

    Raises:
        UserError: the job failed; the message has its error and the path of its log.
    """
    folder = paths.run(work.stage, work.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(work)
    profile = load_profile(paths.cluster_profile())
    with FileLock(folder.with_suffix(".lock")):
        _make_room(folder, mark)
        job = None if _is_done(folder, mark) else _attach_or_submit(folder, work, mark, profile)
    if job is not None:
        _wait(folder, mark, job, watch)
    watch(folder)
    for name, place in outputs.items():
        with paths.written_atomically(place) as temporary:
            shutil.copyfile(folder / "out" / name, temporary)


def _is_done(folder: Path, mark: str) -> bool:
    done = folder / "done"
    return done.exists() and done.read_text() == mark


def _make_room(folder: Path, mark: str) -> None:
    """Give `folder` to this fingerprint: another one's run is put aside, an earlier run of this one comes back."""
    own = folder / "fingerprint"
    if folder.exists() and own.exists() and own.read_text() == mark:
        return
    if folder.exists():
        before = own.read_text()[:12] if own.exists() else "unknown"
        if (job := _attach(folder)) is not None:
            raise UserError(
                f"{folder} belongs to job {job['job_id']}, which runs with other parameters or code: "
                f"wait for it, or cancel it with `python -m pipeline cancel {folder.parent.name} {folder.name}`"
            )
        aside = folder.with_name(f"{folder.name}.{before}")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        shutil.rmtree(aside / "checkpoints", ignore_errors=True)
        log.info("put the run with other parameters or code aside: %s", aside)
    earlier = folder.with_name(f"{folder.name}.{mark[:12]}")
    if earlier.exists() and (earlier / "fingerprint").read_text() == mark:
        earlier.rename(folder)
        return
    folder.mkdir()
    own.write_text(mark)


def _attach_or_submit(folder: Path, work: Work, mark: str, profile: Profile) -> dict[str, Any]:
    job = _attach(folder)
    if job is None:
        return _submit(folder, work, mark, profile)
    log.info("attached to %s job %s, which runs already", job["kind"], job["job_id"])
    return job


def _attach(folder: Path) -> dict[str, Any] | None:
    """The record of this folder's job if it still waits or runs."""
    record_file = folder / "job.json"
    if not record_file.exists():
        return None
    record: dict[str, Any] = json.loads(record_file.read_text())
    return record if state(record) not in ENDED_STATES else None


def state(record: dict[str, Any]) -> str:
    """The scheduler's word for a job, or for a local one RUNNING or FINISHED."""
    if record["kind"] == "local":
        try:
            process = psutil.Process(int(record["job_id"]))
            alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() == record["created"]
        except psutil.NoSuchProcess:
            alive = False
        return "RUNNING" if alive else "FINISHED"
    import submitit

    with _environment(record["environment"]):
        job: submitit.SlurmJob[None] = submitit.SlurmJob(record["folder"], record["job_id"])
        return job.get_info(mode="force").get("State", "UNKNOWN").split()[0].rstrip("+")


def cancel(stage: str, name: str) -> str:
    """End the job of a run folder; its checkpoints stay. Returns the job's id.

    Raises:
        UserError: no job of that name waits or runs.
    """
    folder = paths.run(stage, name)
    record = _attach(folder)
    if record is None:
        raise UserError(f"{folder} has no job that waits or runs")
    if record["kind"] == "local":
        controller = psutil.Process(int(record["job_id"]))
        for process in [*controller.children(recursive=True), controller]:
            process.kill()
    else:
        import submitit

        with _environment(record["environment"]):
            submitit.SlurmJob(record["folder"], record["job_id"]).cancel()
    return str(record["job_id"])


def _submit(folder: Path, work: Work, mark: str, profile: Profile) -> dict[str, Any]:
    import submitit

    (folder / "error.txt").unlink(missing_ok=True)
    with paths.written_atomically(folder / "work.json") as temporary:
        content = {"call": work.call, "arguments": work.arguments, "profile": profile.model_dump(mode="json")}
        temporary.write_text(json.dumps(content, indent=2))
    with _environment(profile.environment), _untouched_by_ctrl_c():
        executor = submitit.AutoExecutor(folder / "jobs", cluster=profile.kind)
        executor.update_parameters(**_parameters(profile, f"{work.stage}-{work.name}"))
        job = executor.submit(Worker(folder.absolute(), mark))
    record: dict[str, Any] = {
        "kind": profile.kind,
        "job_id": job.job_id,
        "folder": str(folder / "jobs"),
        "log": str(job.paths.stdout),
        "environment": profile.environment,
    }
    if profile.kind == "local":
        record["created"] = psutil.Process(int(job.job_id)).create_time()
    with paths.written_atomically(folder / "job.json") as temporary:
        temporary.write_text(json.dumps(record))
    log.info("submitted %s job %s; log: %s", profile.kind, job.job_id, os.path.relpath(job.paths.stdout))
    return record


def _parameters(profile: Profile, name: str) -> dict[str, Any]:
    """submitit's parameters for a profile."""
    common = {
        "tasks_per_node": profile.ranks_here,
        "nodes": profile.nodes,
        "gpus_per_node": profile.gpus,
        "stderr_to_stdout": True,
    }
    if profile.kind == "local":
        return {**common, "timeout_min": 365 * 24 * 60}
    additional = {**profile.additional, **({"account": profile.account} if profile.account else {})}
    slurm = {
        "slurm_job_name": name,
        "slurm_partition": profile.partition,
        "slurm_qos": profile.qos,
        "slurm_constraint": profile.constraint,
        "slurm_setup": [f"export {key}={value!r}" for key, value in profile.environment.items()] + [*profile.setup],
        "slurm_additional_parameters": additional,
        "slurm_signal_delay_s": profile.signal_delay_s,
        "mem_gb": profile.memory_gb,
        "timeout_min": profile.time_min,
        "cpus_per_task": profile.cpus,
    }
    gpus = common if profile.gpus else {key: value for key, value in common.items() if key != "gpus_per_node"}
    return gpus | {key: value for key, value in slurm.items() if value not in (None, {}, [])}


def _wait(folder: Path, mark: str, job: dict[str, Any], watch: Callable[[Path], None]) -> None:
    poll_s = POLL_LOCAL_S if job["kind"] == "local" else POLL_SLURM_S
    try:
        while not _is_done(folder, mark) and state(job) not in ENDED_STATES:
            watch(folder)
            time.sleep(poll_s)
    except KeyboardInterrupt:
        raise UserError(
            f"stopped waiting; job {job['job_id']} goes on. `dvc repro` attaches to it again, "
            f"`python -m pipeline cancel {folder.parent.name} {folder.name}` ends it"
        ) from None
    if not _is_done(folder, mark):
        raise UserError(_failure(folder, job))


def _failure(folder: Path, job: dict[str, Any]) -> str:
    error = folder / "error.txt"
    if error.exists():
        return error.read_text()
    log_file = Path(job["log"])
    lines = log_file.read_text(errors="replace").splitlines() if log_file.exists() else []
    tail = "\n  ".join(lines[-15:]) or "(it wrote nothing)"
    return (
        f"job {job['job_id']} ended without a result; the last lines of {os.path.relpath(log_file)}:\n  {tail}\n"
        "`dvc repro` goes on from its last checkpoint"
    )


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """Set `extra`, and hide a surrounding job's SLURM_* and SBATCH_* variables, which would leak into a new job."""
    before = dict(os.environ)
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_")) and key != "SLURM_CONF"]:
        del os.environ[key]
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _untouched_by_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore SIGINT and SIGHUP: a local job outlives the terminal, as a Slurm job does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
