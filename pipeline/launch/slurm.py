"""Jobs on Slurm, submitted through submitit: the batch script, and what it does before and after the ranks run."""

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import attempts, record, slurm_status
from pipeline.launch.attempts import Next
from pipeline.launch.record import Job
from pipeline.launch.scheduler import Finding, LimitError, RefusedError, Scheduler, Status
from pipeline.launch.slurm_status import POLL_S, UnreachableError, ask, environment
from pipeline.launch.worker import Worker

log = logging.getLogger(__name__)
AWAY_S = 1800
"""How long submitting waits for a controller that does not answer."""
NO_ANSWER = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "connect failure")
"""sbatch's errors that say nothing about the job."""
UP = "idle,mixed,allocated,completing"
TEMPORARY = ("job submit limit", "temporarily unable to accept", "temporarily unavailable")
"""sbatch's errors while there are too many jobs."""
T = TypeVar("T")


class Slurm(Scheduler):
    """Jobs and job arrays in Slurm's queue. A job's id is Slurm's, ARRAY_INDEX for an element of an array."""

    has_queue: ClassVar[bool] = True

    def submit(
        self, intents: Sequence[Job], profile: Profile, code: Path, name: str, after: str | None, start: Next
    ) -> list[Job]:
        """Submit with sbatch, which may succeed without being able to say so: then the job is found by its token."""

        def sbatch() -> list[str]:
            return _sbatch(intents, profile, code, name, after, start)

        def find_or_sbatch() -> list[str]:
            base = _find(intents[0])
            return sbatch() if base is None else [_job_id(base, intent) for intent in intents]

        try:
            job_ids = sbatch()
        except UnreachableError as error:
            log.info("Slurm does not answer (%s); retrying", error)
            time.sleep(POLL_S)
            job_ids = _until_answered(find_or_sbatch)
        return [replace(intent, job_id=job_id) for intent, job_id in zip(intents, job_ids, strict=True)]

    def find(self, intent: Job) -> Job | None:
        """By the token, which is the job's comment."""
        base = _until_answered(lambda: _find(intent))
        return None if base is None else replace(intent, job_id=_job_id(base, intent))

    def status(self, job: Job) -> Status:
        """By squeue, at most once every POLL_S for all jobs of this checkout."""
        return slurm_status.status(job)

    def cancel(self, job: Job) -> None:
        """With scancel, which sends SIGTERM first."""
        assert job.job_id is not None
        try:
            ask(["scancel", job.job_id], job.environment)
        except UnreachableError as error:
            raise UserError(f"Slurm does not answer ({error}): job {job.job_id} was not cancelled") from None

    def check(self, profile: Profile, path: Path) -> Iterator[Finding]:
        """Programs, partition and limits, file system."""
        from pipeline.launch.check import check

        return check(profile, path)


def _sbatch(
    intents: Sequence[Job], profile: Profile, code: Path, name: str, after: str | None, start: Next
) -> list[str]:
    """Submit one job, or an array with an element for each intent; the ids in order.

    Raises:
        UnreachableError: Slurm does not answer; it may have the job nevertheless.
        RefusedError: it refuses the job.
    """
    import submitit

    jobs, token = Path(intents[0].jobs), intents[0].token
    worker = Worker(jobs, token)
    worker.pickled(jobs / f"{token}.pkl")
    with environment(profile.environment):
        try:
            executor = submitit.SlurmExecutor(jobs, python=_python(profile))
            sizes = _sizes(jobs, profile)
            executor.update_parameters(**_parameters(jobs, token, profile, code, name, after, start, sizes))
            if len(intents) == 1:
                return [executor.submit(worker).job_id]
            return [job.job_id for job in executor.submit_array([worker] * len(intents))]
        except RuntimeError as error:  # submitit's error for a failed sbatch
            text = " ".join(str(error).split())
            if any(words in text for words in NO_ANSWER):
                raise UnreachableError(text) from None
            if _is_submit_limit(text):
                raise LimitError(f"Slurm's limit on submitted jobs is reached ({text})") from None
            raise RefusedError(f"sbatch refuses the job: {text}; correct {paths.cluster_profile()}") from None


def _sizes(jobs: Path, profile: Profile) -> list[int]:
    """The numbers of nodes that all elements of an array can use, ascending.

    Raises:
        RefusedError: there is none.
    """
    if isinstance(profile.nodes, int):
        return [profile.nodes]
    each = [set(record.read_work(folder)["nodes"]) for folder in attempts.run_folders(jobs)]
    if common := sorted(set.intersection(*each)):
        return common
    raise RefusedError("no number of nodes suits the batches of all elements of the array")


def _is_submit_limit(text: str) -> bool:
    """Whether sbatch refuses one more job now, and not the job as such; newer versions name the limit."""
    limits = re.findall(r"\b(?:Assoc|QOS)\w*Limit\b", text)
    if limits:
        return any("Submit" in limit for limit in limits)
    return any(words in text for words in TEMPORARY)


def script(profile: Profile, scratch: Path) -> Path:
    """The batch script of a job of this profile, written to `scratch`, for `sbatch --test-only`."""
    import submitit

    with environment(profile.environment):
        executor = submitit.SlurmExecutor(scratch, python=_python(profile))
        parameters = _parameters(scratch, "token", profile, scratch, "test", None, Next(), profile.node_counts)
        executor.update_parameters(**parameters)
        place = scratch / "script.sh"
        place.write_text(executor._make_submission_file_text(executor._submitit_command_str, "test"))
    return place


def _find(intent: Job) -> str | None:
    """The id of the job or array that was submitted under the intent's token.

    Raises:
        UnreachableError: Slurm does not answer.
    """
    while any(_is_sbatch_of(process, intent.jobs) for process in psutil.process_iter(["cmdline"])):
        time.sleep(0.2)  # sbatch outlives its killed parent and may yet submit
    rows = slurm_status.squeue(intent.environment)
    bases = {job_id.split("_")[0] for job_id, row in rows.items() if row.comment == intent.token}
    return min(bases, key=int, default=None)  # should there be two, the worker of the other one will see it and exit


def _job_id(base: str, job: Job) -> str:
    return base if job.index is None else f"{base}_{job.index}"


def _is_sbatch_of(process: psutil.Process, jobs: str) -> bool:
    command = process.info["cmdline"] or []
    return len(command) == 2 and Path(command[0]).name == "sbatch" and Path(command[1]).parent == Path(jobs)


def _until_answered(question: Callable[[], T]) -> T:
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return question()
        except UnreachableError as error:
            if time.monotonic() > deadline:
                raise UserError(f"Slurm has not answered for {AWAY_S} s: {error}") from None
            log.info("Slurm does not answer (%s); retrying", error)
            time.sleep(POLL_S)


def _python(profile: Profile) -> str:
    """The command that starts Python in the job: in the container, ignoring signals until the worker handles them."""
    shell = ["bash", "-c", 'trap "" USR2 TERM; exec "$@"', "start"]
    return f"{shlex.join(shell)} {profile.container or ''} {shlex.quote(sys.executable)}"


def resources(profile: Profile) -> dict[str, Any]:
    """The resources that a job asks for but for its nodes, by sbatch's and submitit's names."""
    parameters = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "ntasks_per_node": profile.ranks_here,
        "cpus_per_task": profile.cpus,
        "gpus_per_node": ":".join(filter(None, [profile.gpu_type, str(profile.gpus)])) if profile.gpus else None,
        "mem": f"{round(profile.memory_gb * 1024)}M" if profile.memory_gb else None,
        "time": profile.time_min,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _parameters(
    jobs: Path,
    token: str,
    profile: Profile,
    code: Path,
    name: str,
    after: str | None,
    start: Next,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """submitit's parameters for a job whose ranks run the package in `code`, on one of `sizes` nodes."""
    asked, ranks = resources(profile) | {"nodes": sizes[-1]}, []
    # NONE: a limit of the login node's shell, on memory or processor time, is none of the job's.
    given = {key.replace("_", "-"): value for key, value in profile.additional.items()}
    additional: dict[str, Any] = {"requeue": True, "propagate": "NONE", **given}
    if len(sizes) > 1:  # with a number of tasks Slurm would give no more nodes than the fewest
        additional["nodes"] = f"{sizes[0]}-{sizes[-1]}"  # submitit takes a number only
        asked["cpus_per_task"] = profile.ranks_here * profile.cpus
        ranks = [f"--ntasks-per-node={asked.pop('ntasks_per_node')}"]
    if "mem" in asked:
        additional["mem"] = asked.pop("mem")  # submitit takes whole GB only
    if after is not None:
        additional |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    if start.delay_s:
        additional["begin"] = f"now+{start.delay_s}"
    if start.avoid and _nodes_without(start.avoid, profile) >= sizes[0]:
        additional["exclude"] = ",".join([*filter(None, [_excluded(profile)]), *start.avoid])
    return {
        **asked,
        "job_name": name,
        "comment": token,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *ranks, *profile.srun_args],
        "wckey": None,  # submitit's own default is refused where keys are enforced
        "setup": _before(jobs, token, profile, code, sizes),
        "teardown": _afterwards(jobs, profile, sizes),
        "additional_parameters": additional,
    }


def _excluded(profile: Profile) -> str:
    """The nodes that the profile excludes."""
    return str(profile.additional.get("exclude", ""))


def _nodes_without(avoid: Sequence[str], profile: Profile) -> int:
    """How many nodes a job may run on that are up and not among `avoid`; 0 without an answer."""
    of_partition = [f"--partition={profile.partition}"] if profile.partition else []
    command = ["sinfo", "--noheader", "--Node", *of_partition, f"--states={UP}", "--format=%N"]
    try:
        return len(set(ask(command, profile.environment).split()) - set(avoid))
    except (UnreachableError, UserError):
        return 0


def _before(jobs: Path, token: str, profile: Profile, code: Path, sizes: Sequence[int]) -> list[str]:
    """Lines of the batch script before srun. They copy the job's pickle in case its launcher died before doing so."""
    return [
        "trap : TERM  # wait for the ranks, then run the lines after srun",
        f"jobs={shlex.quote(str(jobs))}",
        "id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f'echo "{attempts.BEGINS} $id.${{SLURM_RESTART_COUNT:-0}}"',
        f'[ -e "$jobs/${{id}}_submitted.pkl" ] || {{ cp "$jobs/{token}.pkl" "$jobs/.$id.pkl" && '
        'mv "$jobs/.$id.pkl" "$jobs/${id}_submitted.pkl"; }',
        f"export SRUN_CPUS_PER_TASK={profile.cpus}",
        *[f"export {key}={shlex.quote(value)}" for key, value in profile.open_environment.items()],
        f"trap 'echo \"{attempts.SETUP} $SLURMD_NODENAME\"' ERR; set -e",
        *profile.setup,
        "set +e; trap - ERR",
        *_with_usable_nodes(sizes),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]


def _with_usable_nodes(sizes: Sequence[int]) -> list[str]:
    """Lines that give back the nodes of a job over which its batch cannot be spread: of 3, where 2 or 4 would do, one.

    scontrol writes a script with the variables of what is left, into its working directory.
    """
    if list(sizes) == list(range(sizes[0], sizes[-1] + 1)):
        return []
    return [
        f"for nodes in {' '.join(map(str, reversed(sizes)))}; do [ $nodes -gt $SLURM_JOB_NUM_NODES ] || break; done",
        "if [ $nodes -lt $SLURM_JOB_NUM_NODES ]; then",
        '  echo "the batch cannot be spread over $SLURM_JOB_NUM_NODES nodes: giving back all but $nodes"',
        "  folder=$(mktemp -d)",
        "  (cd $folder && scontrol update JobId=$SLURM_JOB_ID NumNodes=$nodes) && . $folder/slurm_job_*_resize.sh",
        "  rm -r $folder",
        "  export SLURM_NNODES=$nodes SLURM_JOB_NUM_NODES=$nodes",
        "fi",
    ]


def _afterwards(jobs: Path, profile: Profile, sizes: Sequence[int]) -> list[str]:
    """Lines of the batch script after srun: requeue the job if a rank asked for it or a failure is to be retried.

    After a failure it may have to wait, and to avoid nodes, if enough others are up: options of a job that is pending.
    Here and not in a rank: the step has ended, so nothing is killed, and a container need not have scontrol.
    """
    excluded = f"{_excluded(profile)}," if _excluded(profile) else ""
    return [
        "status=$?",
        f'[ $status -eq 0 ] || {_python(profile)} -m pipeline.launch.attempts "$jobs" && status=0',
        'if [ -e "$jobs/$SLURM_JOB_ID.again" ]; then',
        '  read -r delay avoid < "$jobs/$SLURM_JOB_ID.again"',
        '  rm "$jobs/$SLURM_JOB_ID.again"',
        "  change=${delay:+StartTime=now+$delay}",
        f'  up=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states={UP} --format=%N | sort -u |'
        " grep -cvxF \"${avoid//,/$'\\n'}\")",
        f'  [ -z "$avoid" ] || [ "$up" -lt {sizes[0]} ] || change="$change ExcNodeList={excluded}$avoid"',
        "  for attempt in 1 2 3 4 5 6 7 8 9 10; do",
        '    state=$(scontrol show job "$id") && case $state in *JobState=RUNNING*) ;; *) break ;; esac',
        '    scontrol requeue "$id" && { [ -z "$change" ] ||'
        ' (trap "" TERM; exec scontrol update JobId="$id" $change); exit 0; }',
        "    sleep 3",
        "  done",
        "fi",
        "exit $status",
    ]
