"""Submission to Slurm through submitit: the batch script, and what it does before and after the ranks run."""

import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import attempts
from pipeline.launch.slurm import UnreachableError, environment
from pipeline.launch.worker import Worker

UNREACHABLE = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "connect failure")


def submit(
    jobs: Path, token: str, profile: Profile, code: Path, name: str, number: int, after: str | None
) -> list[str]:
    """Submit one job, or an array of `number`, whose workers find their run folders in `jobs`; the ids in order.

    They run the package in `code`.

    Raises:
        UnreachableError: Slurm does not answer; it may have the job nevertheless.
        UserError: it refuses the job.
    """
    import submitit

    worker = Worker(jobs, token)
    worker.pickled(jobs / f"{token}.pkl")
    with environment(profile.environment):
        try:
            executor = submitit.SlurmExecutor(jobs, python=_python(profile))
            executor.update_parameters(**_parameters(jobs, token, profile, code, name, after))
            submitted = executor.submit_array([worker] * number) if number > 1 else [executor.submit(worker)]
        except RuntimeError as error:  # submitit's errors are such
            text = " ".join(str(error).split())
            if any(word in text for word in UNREACHABLE):
                raise UnreachableError(text) from None
            raise UserError(f"sbatch refuses the job: {text}; correct {paths.cluster_profile()}") from None
    return [job.job_id for job in submitted]


def _python(profile: Profile) -> str:
    """The command that starts Python in the job: in the container, and deaf to signals until the worker listens."""
    shell = ["bash", "-c", 'trap "" USR2 TERM; exec "$@"', "start"]
    return f"{shlex.join(shell)} {profile.container or ''} {shlex.quote(sys.executable)}"


def resources(profile: Profile) -> dict[str, Any]:
    """What a job asks Slurm for, by submitit's names, which are sbatch's."""
    parameters = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.ranks_here,
        "cpus_per_task": profile.cpus,
        "gpus_per_node": profile.gpus or None,
        "mem": f"{round(profile.memory_gb * 1024)}M" if profile.memory_gb else None,
        "time": profile.time_min,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _parameters(jobs: Path, token: str, profile: Profile, code: Path, name: str, after: str | None) -> dict[str, Any]:
    """submitit's parameters."""
    asked = resources(profile)
    additional = {"requeue": True, **profile.additional}
    if "mem" in asked:
        additional["mem"] = asked.pop("mem")  # submitit knows GB alone
    if after is not None:
        additional |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return {
        **asked,
        "job_name": name,
        "comment": token,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append"],
        "setup": _before(jobs, token, profile, code),
        "teardown": _afterwards(jobs, profile),
        "additional_parameters": additional,
    }


def _before(jobs: Path, token: str, profile: Profile, code: Path) -> list[str]:
    """Lines of the batch script before srun: the job gets its pickle by itself should its launcher have died."""
    return [
        "trap : TERM  # wait for the ranks, then see below",
        f"jobs={shlex.quote(str(jobs))}",
        "id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f'echo "{attempts.BEGINS} $id.${{SLURM_RESTART_COUNT:-0}}"',
        f'[ -e "$jobs/${{id}}_submitted.pkl" ] || {{ cp "$jobs/{token}.pkl" "$jobs/.$id.pkl" && '
        'mv "$jobs/.$id.pkl" "$jobs/${id}_submitted.pkl"; }',
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        *[f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()],
        *profile.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]


def _afterwards(jobs: Path, profile: Profile) -> list[str]:
    """Lines of the batch script after srun: back into the queue when a rank has asked for it, or an error may pass.

    Here and not in a rank: the step has ended, so nothing is killed, and a container need not have scontrol.
    """
    return [
        "status=$?",
        f'[ $status -eq 0 ] || {_python(profile)} -m pipeline.launch.retry "$jobs" && status=0',
        'if [ -e "$jobs/$SLURM_JOB_ID.again" ]; then',
        '  rm "$jobs/$SLURM_JOB_ID.again"',
        "  for attempt in 1 2 3 4 5 6 7 8 9 10; do",
        '    state=$(scontrol show job "$id") && case $state in *JobState=RUNNING*) ;; *) break ;; esac',
        '    scontrol requeue "$id" && exit 0',
        "    sleep 3",
        "  done",
        "fi",
        "exit $status",
    ]
