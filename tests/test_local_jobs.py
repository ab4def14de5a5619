"""Jobs on this machine without Slurm: several ranks, a signal, the launcher's death, and the first error of several."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from conftest import ROOT, Checkout, skip
from slurm_cluster import wait_until

from pipeline import paths
from pipeline.cluster import Profile, load_profile
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.launch import ahead, attempts, local, record, slurm, slurm_status, submission
from pipeline.launch.attempts import Attempt, Next
from pipeline.launch.fingerprint import Work, snapshot
from pipeline.launch.record import Job
from pipeline.launch.scheduler import SCHEDULERS, Status, scheduler_of
from pipeline.launch.slurm_status import environment
from pipeline.launch.worker import rendezvous
from pipeline.tracking.run_files import RunFiles
from pipeline.train import history

RUN = Path("runs/train_classifier/poolformer_s12-0")
COMMAND = [sys.executable, "-m", "pipeline", "train_classifier", "poolformer_s12", "0"]
TWO_RANKS = "kind: local\ngpus_per_node: 0\nranks_per_node: 2\ncpus_per_task: 1\ncheckpoint_interval_s: 600\n"


@pytest.mark.slow
def test_two_ranks_share_a_training_and_stop_together_on_sigterm(checkout: Checkout) -> None:
    """SIGTERM to the job's controller, as at a machine's shutdown; the next run goes on from that very step."""
    (checkout.folder / "slurm/two.yaml").write_text(TWO_RANKS)
    checkout.environment["PIPELINE_CLUSTER"] = "slurm/two.yaml"
    checkout.pipeline("compose", "scale=demo", "classification.recipe.max_steps=60")
    checkout.pipeline("prepare_imagenet")
    checkout.pipeline("convert_imagenet")
    log, output = checkout.folder / RUN / "log.txt", checkout.folder / "output.txt"
    with output.open("w") as stream:
        stage = subprocess.Popen(
            COMMAND, cwd=checkout.folder, env=checkout.environment, stdout=stream, stderr=subprocess.STDOUT
        )
    wait_until(lambda: log.exists() and " step 20/60" in log.read_text(), "the first steps")
    controller = psutil.Process(int(json.loads((checkout.folder / RUN / "job.json").read_text())["job_id"]))
    ranks = [process for process in controller.children() if "submitit.core._submit" in process.cmdline()]
    assert len(ranks) == 2
    controller.terminate()
    assert stage.wait(timeout=600) == 1
    assert "stopped by a signal" in output.read_text()
    assert not any(rank.is_running() for rank in ranks)
    (checkpoint,) = (checkout.folder / RUN / "checkpoints").glob("*.pt")
    stopped = re.findall(r" step (\d+)/60", log.read_text())[-1]
    assert checkpoint.name.startswith(f"step-{stopped}-")

    checkout.pipeline("train_classifier", "poolformer_s12", "0")
    assert f"going on from step {stopped} of 60" in log.read_text()
    assert (
        json.loads((checkout.folder / "results/train_classifier/poolformer_s12-0.cost.json").read_text())["ranks"] == 2
    )


@pytest.mark.slow
def test_a_local_launcher_killed_before_it_noted_its_job_is_followed(checkout: Checkout) -> None:
    """The record of the job's start is taken back to what it was before: the next run finds the process."""
    checkout.environment["PIPELINE_CLUSTER"] = "slurm/local.yaml"
    checkout.pipeline("compose", "scale=demo", "classification.recipe.max_steps=400")
    checkout.pipeline("prepare_imagenet")
    checkout.pipeline("convert_imagenet")
    record_file = checkout.folder / RUN / "job.json"
    first = subprocess.Popen(COMMAND, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: record_file.exists() and json.loads(record_file.read_text())["job_id"], "the submission")
    first.kill()
    first.wait()
    job = json.loads(record_file.read_text())
    wait_until(lambda: (checkout.folder / RUN / "log.txt").exists(), "the job's start")
    record_file.write_text(json.dumps({**job, "job_id": None}))
    second = subprocess.Popen(
        COMMAND, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert second.stdout is not None
    assert f"attached to local job {job['job_id']}" in second.stdout.readline()
    checkout.pipeline("cancel", "train_classifier", "poolformer_s12-0")
    second.communicate(timeout=600)
    assert second.returncode == 1
    assert not psutil.pid_exists(int(job["job_id"])) or (
        psutil.Process(int(job["job_id"])).status() == psutil.STATUS_ZOMBIE
    )


def test_a_local_job_is_known_whatever_the_clock_says_and_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its controller's command; another process that has its id by now is not it. Nobody can ask another machine."""
    monkeypatch.chdir(tmp_path)
    folder, jobs = paths.run("train_classifier", "poolformer_s12-0"), str(tmp_path / "jobs")
    folder.mkdir(parents=True)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    controller = subprocess.Popen([*sleep, "submitit.local._local", jobs])
    stranger = subprocess.Popen([*sleep, "submitit.local._local", str(tmp_path / "other")])
    job = Job("local", "token", jobs, {}, time.time(), job_id=str(controller.pid), **record.this_host())
    try:
        wait_until(lambda: not submission.state(job).is_over, "the controller's start", 20)
        boot_time = psutil._pslinux.boot_time
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + 1.0)
        assert submission.state(job).state == "RUNNING"
        assert submission.state(dataclasses.replace(job, job_id=str(stranger.pid))).is_over
        assert submission.state(dataclasses.replace(job, host="before", job_id=str(stranger.pid))).is_over
        old = dataclasses.asdict(job) | {"created": 1.0}  # of an earlier version
        (folder / "job.json").write_text(json.dumps(old))
        assert submission.attach(folder) == job
    finally:
        for process in (controller, stranger):
            process.kill()
            process.wait()
    assert submission.attach(folder) is None
    rebooted = dataclasses.replace(job, boot="another")
    assert submission.state(rebooted).is_over
    elsewhere = dataclasses.replace(rebooted, host="login2")
    record.write_job(folder, elsewhere)
    with pytest.raises(UserError, match=r"was started on login2, .*; if it has ended, delete .*job\.json"):
        submission.attach(folder)
    assert not submission.state(elsewhere).is_over
    record.write_job(folder, dataclasses.replace(elsewhere, kind="slurm", uid=os.getuid() + 1))
    with pytest.raises(UserError, match=r"is user \d+'s, who alone can ask"):
        submission.attach(folder)


def test_a_local_job_takes_the_gpus_that_its_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Profile(kind="local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert auto.gpus == auto.ranks_here == 2
    assert local._visible_gpus(2) == (3, 5)
    with pytest.raises(UserError, match="leaves 2 GPUs of the 8"):
        local._visible_gpus(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    with pytest.raises(UserError, match="by their numbers"):
        local._visible_gpus(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert auto.gpus == 0
    assert local._visible_gpus(0) == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local._visible_gpus(1) == ()


def test_a_record_that_names_a_job_has_its_log(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher may be killed at any moment: before the record is written, the link is there."""
    job = Job("local", "token", str(run_folder / "jobs"), {}, 0.0)
    record.write_job(run_folder, job)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", _killed_after(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            record.write_job(run_folder, dataclasses.replace(job, job_id="4711"))
    now = record.read_job(run_folder)
    assert now is not None
    assert now.job_id is None or (run_folder / "log.txt").is_symlink()
    assert record.fill_in(run_folder, "token", "4711")
    assert (run_folder / "log.txt").readlink() == Path("jobs/4711_0_log.out")


def _killed_after(replace: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def killed(path: Path, target: Path) -> Path:
        replace(path, target)
        raise KeyboardInterrupt

    return killed


def test_ranks_meet_at_a_free_port_and_not_at_the_attempts_before(run_folder: Path) -> None:
    """The port of the attempt before is still held; its note is there too."""
    before = rendezvous(run_folder, Attempt("4711", 1), "127.0.0.1", 0, 2)
    met: list[Any] = []
    attempt = Attempt("4711", 2)
    other = threading.Thread(target=lambda: met.append(rendezvous(run_folder, attempt, "127.0.0.1", 1, 2)))
    other.start()
    time.sleep(0.3)
    assert other.is_alive()
    store = rendezvous(run_folder, attempt, "127.0.0.1", 0, 2)
    other.join(timeout=30)
    store.set("key", "value")
    assert met[0].get("key") == b"value"
    assert met[0].port == store.port != before.port
    assert [path.name for path in run_folder.glob("meeting-*")] == ["meeting-4711.2.json"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    return tmp_path


def leave_error(folder: Path, attempt: Attempt, rank: int, error: Exception) -> None:
    with pytest.raises((SystemExit, type(error))), attempts.errors_of_rank(folder, attempt, rank):
        raise error


def test_the_cause_is_told_and_not_what_followed_from_it(run_folder: Path) -> None:
    attempt, log = Attempt("7", 0), run_folder / "jobs/7_0_log.out"
    leave_error(run_folder, attempt, 0, RuntimeError("[gloo/pair.cc] Connection closed by peer [10.0.0.2]"))
    time.sleep(0.01)
    leave_error(run_folder, attempt, 1, ValueError("bad pixel"))
    leave_error(run_folder, attempt, 2, ValueError("later"))
    assert attempts.fail(run_folder, attempt, log)
    assert "rank 1 on" in record.failures(run_folder)[-1].message
    assert "ValueError: bad pixel" in record.failures(run_folder)[-1].message


def test_a_rank_that_was_killed_is_named_from_the_log_of_its_own_attempt(run_folder: Path) -> None:
    log = run_folder / "jobs/7_0_log.out"
    log.write_text(
        f"{attempts.BEGINS} 7.0\nsrun: error: n1: task 0: Exited with exit code 1\n"
        f"{attempts.BEGINS} 7.1\nsrun: error: n9: task 9: Killed\nsrun: error: n1: tasks 0-8: Killed\n"
    )
    assert attempts.fail(run_folder, Attempt("7", 1), log)
    assert record.failures(run_folder)[-1].message == "rank 9 on n9 exited without reporting an error: Killed"


def test_failures_are_counted_only_while_no_checkpoint_is_new(run_folder: Path) -> None:
    (run_folder / "checkpoints").mkdir()
    log = run_folder / "jobs/7_0_log.out"
    going_on = []
    for restart, step in enumerate([0, 0, 20, 20, 40, 40, 40]):
        (run_folder / f"checkpoints/step-{step}-0123456789abcdef.pt").touch()
        going_on.append(attempts.fail(run_folder, Attempt("7", restart), log))
    assert going_on == [True, True, True, True, True, True, False]
    job = Job("slurm", "t", str(run_folder / "jobs"), {}, 0.0, job_id="7")
    log.write_text("the last words\n")
    said = attempts.report(run_folder, job)
    assert "failed 3 times without getting beyond step 40" in said
    assert "the last words" in said


def test_a_user_error_is_shown_by_itself_and_not_retried(run_folder: Path) -> None:
    attempt, log = Attempt("7", 0), run_folder / "jobs/7_0_log.out"
    leave_error(run_folder, attempt, 1, UserError("train.beton is cut short"))
    assert not attempts.fail(run_folder, attempt, log)
    job = Job("slurm", "t", str(run_folder / "jobs"), {}, 0.0, job_id="7")
    assert attempts.report(run_folder, job) == "train.beton is cut short"


def test_failures_and_errors_of_jobs_queued_with_earlier_code_are_read(run_folder: Path) -> None:
    """They say `is_users` for `is_user_error`; a line that a killed writer left unfinished is skipped."""
    old = {"attempt": "7.0", "step": 0, "message": "no room", "is_users": True, "again": False}
    (run_folder / "failures.jsonl").write_text(json.dumps(old) + "\n" + '{"attempt": "7.')
    assert record.failures(run_folder) == [record.Failure("7.0", 0, "no room", is_user_error=True, again=False)]
    (run_folder / "errors").mkdir()
    error = {"time": 0.0, "rank": 1, "node": "n2", "message": "train.beton is cut", "is_users": True, "follows": False}
    (run_folder / "errors/7.1.1.json").write_text(json.dumps(error))
    assert not attempts.fail(run_folder, Attempt("7", 1), run_folder / "jobs/7_0_log.out")


def test_a_failed_run_ended_when_its_last_error_was_written(run_folder: Path) -> None:
    (run_folder / "history.jsonl").write_text("{}\n")
    os.utime(run_folder / "history.jsonl", (100, 100))
    assert RunFiles(run_folder).ended_ms() == 100_000
    leave_error(run_folder, Attempt("7", 0), 1, ValueError("bad pixel"))
    os.utime(run_folder / "errors/7.0.1.json", (200, 200))
    assert RunFiles(run_folder).ended_ms() == 200_000
    (run_folder / "done").touch()
    os.utime(run_folder / "done", (300, 300))
    assert RunFiles(run_folder).ended_ms() == 300_000


def test_every_kind_of_profile_has_a_scheduler_and_another_kind_raises() -> None:
    assert set(SCHEDULERS) == set(get_args(Profile.model_fields["kind"].annotation))
    assert all(scheduler_of(kind).status for kind in SCHEDULERS)
    with pytest.raises(ValueError, match=r"did you mean slurm\?"):
        scheduler_of("slurmm")


def test_nothing_in_launch_asks_for_the_kind_but_the_map() -> None:
    for path in (ROOT / "pipeline/launch").glob("*.py"):
        asked = re.findall(
            r"\.(?:kind|cluster) *(?:==|!=|in\b).*|.*[=(] *[\"'](?:local|slurm)[\"'].*", path.read_text()
        )
        assert not asked, path


def test_a_surrounding_jobs_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SQUEUE_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "outer")
    with environment({"EXTRA": "1"}):
        inside = dict(os.environ)
    assert inside["EXTRA"] == "1"
    assert inside["SLURM_CONF"] == "outer"
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SQUEUE_PARTITION"} & inside.keys()
    assert os.environ["SLURM_JOB_ID"] == "outer"


ADDITIONAL = "kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\nadditional: {{{}}}\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: local\npartition: gpu\n", "partition means nothing for kind local"),
        ("kind: local\nnodes: 2\n", "kind local has one node"),
        ("kind: slurm\n", "'auto' is for kind local"),
        ("kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\nparition: gpu\n", "partition"),
        ("kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\ntime_min: 0\n", "time_min"),
        (ADDITIONAL.format("gpus-per-node: a100:4"), "additional gpus-per-node: set gpus_per_node instead"),
        (ADDITIONAL.format("requeue: false"), "additional requeue: set nothing"),
        (ADDITIONAL.format("exclusive: false"), "exclusive: false is no option of sbatch"),
        (ADDITIONAL.format("clusters: other"), "followed on one cluster"),
        ("kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\ntime_min: 1\nsignal_delay_s: 60\n", "signal_delay_s"),
    ],
)
def test_a_faulty_profile_is_one_line_that_names_it(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_the_batch_script_has_what_a_site_may_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    profile = Profile(
        kind="slurm",
        gpus_per_node=8,
        gpu_type="a100",
        cpus_per_task=12,
        srun_args=("--container-image=/shared/my image.sqsh", "--mpi=none"),
        additional={"reservation": "mine", "mail_type": "END"},
    )
    text = slurm.script(profile, tmp_path).read_text()
    asked = set(re.findall(r"^#SBATCH --(.*)$", text, re.M))
    assert {"gpus-per-node=a100:8", "reservation=mine", "mail-type=END", "propagate=NONE", "requeue"} <= asked
    assert not [option for option in asked if option.startswith("wckey")]
    (command,) = re.findall(r"^srun .*", text, re.M)
    assert "--container-image=/shared/my image.sqsh" in shlex.split(command)
    assert "--mpi=none" in shlex.split(command)
    own = slurm.script(profile.model_copy(update={"additional": {"propagate": "NOFILE"}}), tmp_path).read_text()
    assert re.findall(r"^#SBATCH --propagate=.*", own, re.M) == ["#SBATCH --propagate=NOFILE"]


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("PENDING", "JobHeldUser", "scontrol release 7"),
        ("PENDING", "JobHoldMaxRequeue", "scontrol release 7"),
        ("REQUEUE_HOLD", "None", "scontrol release 7"),
        ("SPECIAL_EXIT", "None", "scontrol release 7"),
        ("SUSPENDED", "None", "scontrol resume 7"),
        ("PENDING", "Priority", "is pending (Priority)"),
    ],
)
def test_a_job_that_does_not_go_on_by_itself_is_said_to(state: str, reason: str, said: str) -> None:
    assert said in Status(state, False, reason).describe("7")


def test_submit_needs_a_queue(in_checkout: Path) -> None:
    with pytest.raises(UserError, match="has no queue"):
        ahead.queue_stale(load_params(paths.PARAMS), load_profile(paths.cluster_profile()), [])


def test_the_profiles_of_the_project_are_valid() -> None:
    profiles = {path.stem: load_profile(path) for path in Path("slurm").glob("*.yaml")}
    assert isinstance(profiles["local"], Profile)
    assert profiles["dev"].world_size == 2


@pytest.mark.parametrize(
    ("rows", "sacct", "asks", "is_over"),
    [
        # What squeue and sacct said on the development cluster, after each fault, of a job that lives or has ended.
        ("7|COMPLETING|None|N/A|n[1-2]|{token}", "7|NODE_FAIL", 1, False),
        ("7|PENDING|BeginTime|N/A||{token}", "7|REQUEUED", 6, False),
        ("7|PREEMPTED|None|N/A||{token}", "", 1, False),
        ("7|NODE_FAIL|None|N/A||{token}", "", 4, True),
        ("7|CANCELLED|None|N/A||{token}", "", 1, True),
        ("", "7|COMPLETED", 1, True),
        ("", "7|RUNNING", 9, False),
        ("", "7|NODE_FAIL", 3, False),
        ("", "7|NODE_FAIL", 4, True),
        ("", "", 1, False),
        ("", "", 2, True),
        ("7|RUNNING|None|N/A|n1|metaformer-another", "", 2, True),
        (None, "7|FAILED", 6, False),  # the controller does not answer
    ],
)
def test_what_slurm_says_of_a_job(
    rows: str | None,
    sacct: str,
    asks: int,
    is_over: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths.RUNS.mkdir()
    job = Job("slurm", "metaformer-this", "jobs", {}, submitted=0.0, job_id="7")
    said = {"squeue": rows, "sacct": sacct}

    def answer(command: list[str], extra: dict[str, str]) -> str:
        text = said[command[0]]
        if text is None:
            raise slurm_status.UnreachableError("Unable to contact slurm controller")
        return text.format(token=job.token)

    monkeypatch.setattr(slurm_status, "ask", answer)
    for _ in range(asks):
        status = scheduler_of(job.kind).status(job)
        cache = json.loads((paths.RUNS / "slurm.json").read_text())
        (paths.RUNS / "slurm.json").write_text(json.dumps({**cache, "asked": 0.0}))
    assert status.is_over is is_over


SBATCH = """#!/bin/sh
echo called >> "$FAKE/calls"
[ -e "$FAKE/answers" ] && { echo "Submitted batch job 12"; exit 0; }
touch "$FAKE/answers"
echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2
exit 1
"""


@pytest.mark.parametrize("is_heard", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_a_submission_without_an_answer_is_found_or_repeated(
    is_heard: bool, number: int, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against programs in place of Slurm's: sbatch reports no connection, though Slurm may have the job."""
    elements = "12" if number == 1 else "$(printf '12_0\\n12_1')"
    listed = f'for id in {elements}; do echo "$id|PENDING|Priority|N/A||the-token"; done' if is_heard else "true"
    for name, text in (("sbatch", SBATCH), ("squeue", f"#!/bin/sh\n{listed}\n"), ("srun", "#!/bin/sh\n")):
        (run_folder / name).write_text(text)
        (run_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{run_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(run_folder))
    monkeypatch.setattr("pipeline.launch.slurm.POLL_S", 0)
    profile = Profile(kind="slurm", gpus_per_node=0, cpus_per_task=1)
    places = [None] if number == 1 else range(number)
    intents = [Job("slurm", "the-token", str(run_folder / "jobs"), {}, 0.0, place) for place in places]
    submitted = scheduler_of("slurm").submit(intents, profile, run_folder, "name", after="5", start=Next())
    assert [job.job_id for job in submitted] == (["12"] if number == 1 else ["12_0", "12_1"])
    assert len((run_folder / "calls").read_text().split()) == (1 if is_heard else 2)
    assert (run_folder / "jobs/the-token.pkl").exists()
    if not is_heard:
        script = (run_folder / "jobs/12_submission.sh").read_text()
        assert "#SBATCH --comment=the-token" in script
        assert "#SBATCH --dependency=afterok:5" in script
        assert f"export PYTHONPATH={run_folder}" in script


def test_the_batch_script_retries_failed_ranks_and_not_a_run_that_is_done(run_folder: Path) -> None:
    """The command that its lines after srun run, with Slurm's variables."""
    jobs = run_folder / "jobs"
    attempts.write_folders(jobs, [run_folder])
    (run_folder / "fingerprint").write_text("ab")
    record.write_job(run_folder, Job("slurm", "the-token", str(jobs), {}, 0.0, job_id="7"))
    leave_error(run_folder, Attempt("7", 1), 0, ValueError("bad pixel"))
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SUBMITIT_"))}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}

    def after_srun() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.launch.attempts", str(jobs)]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)

    failed = after_srun()
    assert failed.returncode == 1
    assert "ValueError: bad pixel; retrying" in failed.stdout
    assert (jobs / "7.again").exists()
    (run_folder / "done").write_text("ab")
    assert after_srun().returncode == 0
    assert [failure.attempt for failure in record.failures(run_folder)] == ["7.1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder on a file system of its own, which is full."""
    folder = tmp_path / "runs/train_classifier/poolformer_s12-0"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        skip(f"mounting needs root: {mounted.stderr}")
    try:
        (folder / "jobs").mkdir()
        with contextlib.suppress(OSError):
            (folder / "filler").write_bytes(bytes(2**20))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_below_the_run_folder_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for the rank's error, nor for the failure; later there is, and only the log says what it was."""
    attempt, log = Attempt("7", 0), small_disk.parent / "7_0_log.out"
    with pytest.raises(OSError, match="No space left") as full:
        (small_disk / "history.jsonl").write_text("x" * 9000)
    with pytest.raises(SystemExit), attempts.errors_of_rank(small_disk, attempt, 0):
        raise full.value
    log.write_text(f"{attempts.BEGINS} 7.0\nerror: [Errno 28] No space left on device: free some space\n")
    with pytest.raises(OSError, match="No space left"):
        attempts.fail(small_disk, attempt, log)
    (small_disk / "filler").unlink()
    (small_disk / "errors").mkdir(exist_ok=True)
    (small_disk / "errors/7.0.0.json").touch()
    assert not attempts.fail(small_disk, attempt, log)
    (failure,) = record.failures(small_disk)
    assert failure.is_user_error
    assert "the disk is full" in failure.message
    assert "free some space" in failure.message


def test_a_line_behind_one_that_was_cut_short_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "system.jsonl"
    for step in range(3):
        history.append(file, {"step": step})
    file.write_bytes(file.read_bytes()[:-4] + b"\xff")
    history.append(file, {"step": 3})
    history.append(file, {"step": 4})
    assert [entry["step"] for entry in history.read(file)] == [0, 1, 3, 4]


def test_who_may_read_a_run_is_up_to_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for mask, file_mode, folder_mode in ((0o077, 0o600, 0o700), (0o002, 0o664, 0o775)):
        before = os.umask(mask)
        try:
            job = Job("local", "token", str(tmp_path / "jobs"), {}, 0.0, job_id="7")
            record.write_job(tmp_path, job)
            shutil.rmtree(paths.RUNS, ignore_errors=True)
            copy = snapshot()
        finally:
            os.umask(before)
        assert (tmp_path / "job.json").stat().st_mode & 0o777 == file_mode
        assert copy.stat().st_mode & 0o777 == folder_mode


def test_secrets_of_a_profile_reach_the_job_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an sbatch that notes what it is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    seen = tmp_path / "seen"
    for name, text in (("sbatch", f"env > {seen}; echo Submitted batch job 12"), ("srun", "")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    secrets = {
        "HF_TOKEN": "hf_123",
        "MLFLOW_TRACKING_PASSWORD": "letmein",
        "MLFLOW_TRACKING_URI": "https://me:opensesame@mlflow.example",
        "AWS_SECRET_ACCESS_KEY": "wJalr",
    }
    profile = Profile(
        kind="slurm", gpus_per_node=0, cpus_per_task=1, environment={"NCCL_DEBUG": "WARN", "TOKENIZER": "a"} | secrets
    )
    run = submission.Run.of(Work("train_something", "a", "pipeline.launch.check:report", {"nonce": "1"}))
    submission.claim_folder(run)
    submission.submit([run], profile)
    variables = seen.read_text().splitlines()
    assert {f"{name}={value}" for name, value in profile.environment.items()} <= set(variables)
    written = [path.read_bytes() for path in paths.RUNS.rglob("*") if path.is_file()]
    assert any(b"NCCL_DEBUG" in content for content in written)
    for value in ("hf_123", "letmein", "opensesame", "wJalr"):
        assert not any(value.encode() in content for content in written)


def test_a_folder_that_cannot_be_synced_is_no_error_and_a_failing_disk_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answering(number: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").is_dir():
                raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", answering(errno.EINVAL))
    with paths.written_atomically(tmp_path / "done") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "done").read_text() == "whole"
    monkeypatch.setattr(os, "fsync", answering(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), paths.written_atomically(tmp_path / "done"):
        pass
