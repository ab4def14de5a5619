"""What is queued ahead, against programs in place of Slurm's: limits, jobs that die, and who looks after them."""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import attempts, record, slurm_status, submission
from pipeline.launch.ahead import Ahead, queue_with_those_to_come
from pipeline.launch.attempts import Attempt
from pipeline.launch.fingerprint import Upstream, Work
from pipeline.launch.record import Job
from pipeline.launch.submission import Run, attach_or_submit

SBATCH = """#!{python}
import json, pathlib, re, sys
fake = pathlib.Path("{fake}")
jobs = json.loads((fake / "jobs.json").read_text())
limits = json.loads((fake / "limits.json").read_text())
script = pathlib.Path(sys.argv[-1]).read_text()
array = re.search(r"--array=0-(\\d+)", script)
size = int(array[1]) + 1 if array else 1
alive = sum(job["state"] in ("PENDING", "RUNNING") for job in jobs.values())
if alive + size > limits["submit"] or (array and limits["arrays"] is False):
    print(limits["says"], file=sys.stderr)
    sys.exit(1)
base = 1 + max((int(job.split("_")[0]) for job in jobs), default=0)
comment = re.search(r"--comment=(\\S+)", script)[1]
after = re.search(r"--dependency=(\\S+)", script)
for index in range(size):
    jobs[f"{{base}}_{{index}}" if array else str(base)] = {{
        "state": "PENDING", "reason": "Priority", "comment": comment, "after": after[1] if after else None
    }}
(fake / "new.json").write_text(json.dumps(jobs))
(fake / "new.json").replace(fake / "jobs.json")
print(f"Submitted batch job {{base}}")
"""
SQUEUE = """#!{python}
import json, pathlib
for id, job in json.loads(pathlib.Path("{fake}/jobs.json").read_text()).items():
    print(id, job["state"], job["reason"], "N/A", "", job["comment"], sep="|")
"""
LIMIT = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)"
)


class FakeSlurm:
    """A queue in a file; jobs in it end when a test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limit(1000)
        (folder / "jobs.json").write_text("{}")
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("srun", "#!/bin/sh\n"), ("sacct", "#!/bin/sh\n")):
            (folder / name).write_text(text.format(python=sys.executable, fake=folder))
            (folder / name).chmod(0o755)

    def limit(self, submit: int, *, arrays: bool = True, says: str = LIMIT) -> None:
        limits = {"submit": submit, "arrays": arrays, "says": says}
        (self.folder / "limits.json").write_text(json.dumps(limits))

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        jobs: dict[str, dict[str, Any]] = json.loads((self.folder / "jobs.json").read_text())
        return jobs

    def set(self, job: str, **values: str) -> None:
        jobs = self.jobs
        jobs[job] |= values
        (self.folder / "set.json").write_text(json.dumps(jobs))
        (self.folder / "set.json").replace(self.folder / "jobs.json")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = tmp_path / "slurm"
    fake.mkdir()
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_status, "POLL_S", 0.0)
    monkeypatch.setattr("pipeline.launch.slurm.POLL_S", 0.0)
    monkeypatch.setattr(submission, "LIMIT_S", (0.1,))
    return FakeSlurm(fake)


def a_work(name: str, after: Work | None = None) -> Work:
    upstream = None if after is None else Upstream(after, "weights.pt", Path("nowhere.pt"), "backbone")
    return Work("train_something", name, "pipeline.launch.check:report", {"nonce": name}, after=upstream)


def profile(**more: Any) -> Profile:
    return Profile(kind="slurm", gpus_per_node=0, cpus_per_task=1, **more)


def ahead_of(works: list[Work], **more: Any) -> Ahead:
    return Ahead(works[0], works[1:], profile(**more), since=time.time())


def queued(works: list[Work]) -> list[str]:
    """Names of those with a job that is pending or running."""
    folders = {work.name: paths.run(work.stage, work.name) for work in works}
    return [name for name, folder in folders.items() if submission.attach(folder) is not None]


FOUR = [a_work(name) for name in "abcd"]


def test_a_limit_on_submitted_jobs_queues_as_many_as_it_allows_the_own_one_first(slurm: FakeSlurm) -> None:
    ahead = ahead_of(FOUR)
    slurm.limit(2)
    ahead.queue()
    assert queued(FOUR) == ["a", "b"]
    assert len(slurm.jobs) == 2
    assert not (paths.run("train_something", "d") / "job.json").exists(), "nothing is left of what was refused"
    ahead.tend()
    assert queued(FOUR) == ["a", "b"]
    slurm.set("1_0", state="COMPLETED")
    slurm.limit(1000)
    ahead.tend()
    assert queued(FOUR) == ["b", "c", "d"]


def test_a_training_that_is_done_reads_no_graph(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Run.of(FOUR[0]), []
    monkeypatch.setattr("pipeline.launch.ahead.surrounding_dvc", lambda: asked.append("DVC"))
    queue_with_those_to_come(FOUR[0], None, profile())  # type: ignore[arg-type]
    assert queued(FOUR) == ["a"]
    assert asked
    (run.folder / "done").write_text(run.fingerprint)
    assert queue_with_those_to_come(FOUR[0], None, profile()).others == []  # type: ignore[arg-type]
    assert asked == ["DVC"]


def test_without_arrays_each_is_a_job(slurm: FakeSlurm) -> None:
    slurm.limit(1000, arrays=False, says="sbatch: error: Batch job submission failed: Invalid job array specification")
    ahead_of(FOUR).queue()
    assert sorted(slurm.jobs) == ["1", "2", "3", "4"]
    assert queued(FOUR) == list("abcd")


def test_an_own_training_that_a_limit_refuses_waits_and_is_submitted_later(slurm: FakeSlurm) -> None:
    slurm.limit(1)
    attach_or_submit(Run.of(FOUR[1]), profile(), is_retry=False)  # the user's other job
    ahead = ahead_of(FOUR[:1])
    ahead.queue()
    submitted: list[Job | None] = []
    own = threading.Thread(
        target=lambda: submitted.append(attach_or_submit(Run.of(FOUR[0]), profile(), is_retry=False))
    )
    own.start()
    time.sleep(1)
    assert own.is_alive()
    slurm.set("1", state="COMPLETED")
    own.join(timeout=30)
    assert submitted[0] is not None
    assert submitted[0].job_id == "2"


def test_what_slurm_would_never_take_is_an_error(slurm: FakeSlurm) -> None:
    """Another limit than that on submitted jobs, though the second line is the same."""
    slurm.limit(0, says=LIMIT.replace("MaxSubmitJobPerUser", "MaxWallDurationPerJob"))
    with pytest.raises(UserError, match="sbatch refuses the job"):
        attach_or_submit(Run.of(FOUR[0]), profile(), is_retry=False)


def test_the_profile_limits_what_is_queued(slurm: FakeSlurm) -> None:
    ahead = ahead_of(FOUR, queue_ahead=1)
    ahead.queue()
    assert queued(FOUR) == ["a", "b"]
    slurm.set("1_1", state="CANCELLED")
    ahead.tend()
    assert queued(FOUR) == ["a", "c"]
    other = a_work("other")
    attach_or_submit(Run.of(other), profile(), is_retry=False)
    more = ahead_of([FOUR[0], FOUR[3]], max_jobs=3)
    more.queue()
    assert queued([*FOUR, other]) == ["a", "c", "other"]
    slurm.set("1_0", state="CANCELLED")
    more.tend()
    assert queued([*FOUR, other]) == ["c", "d", "other"]


def test_on_this_machine_a_job_starts_beside_another_once_what_it_starts_from_is_done(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, behind = a_work("base"), a_work("behind", after=a_work("base"))
    started: list[str] = []
    ended: list[str] = []

    def start(self: Any, intents: list[Job], profile: Profile, code: Path, name: str, *_: Any) -> list[Job]:
        started.append(name)
        return [dataclasses.replace(intent, job_id=name) for intent in intents]

    monkeypatch.setattr("pipeline.launch.local.Local.submit", start)
    monkeypatch.setattr("pipeline.launch.local._process", lambda job: None if job.job_id in ended else object())
    here = Profile(kind="local", gpus_per_node=0, queue_ahead=1, cpus_per_task=1)
    ahead = Ahead(base, [behind, *FOUR], here, since=time.time())
    ahead.queue()
    assert started == ["train_something-base", "train_something-a"]
    ahead.tend()
    assert len(started) == 2
    run = Run.of(base)
    (run.folder / "out").mkdir()
    (run.folder / "done").write_text(run.fingerprint)
    done = Run.of(FOUR[0])
    (done.folder / "done").write_text(done.fingerprint)
    ended.append("train_something-a")
    ahead.tend()
    assert started[2:] == ["train_something-behind"]


def test_jobs_side_by_side_share_the_cores_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.cores_here", lambda: 8)
    assert Profile(kind="local", gpus_per_node=0, queue_ahead=3).cpus == 2
    assert Profile(kind="local", gpus_per_node=0).ahead == 0
    assert Profile(kind="local", gpus_per_node=2, queue_ahead="auto").ahead == 0
    with pytest.raises(ValueError, match="share the GPUs"):
        Profile(kind="local", gpus_per_node=1, queue_ahead=1)
    with pytest.raises(ValueError, match="kind local"):
        Profile(kind="slurm", gpus_per_node=0, cpus_per_task=1, queue_ahead="auto")


def fail(name: str, job: str, message: str, state: str, slurm: FakeSlurm) -> None:
    folder = paths.run("train_something", name)
    with pytest.raises(SystemExit), attempts.errors_of_rank(folder, Attempt(job, 0), 0):
        raise UserError(message)
    slurm.set(job, state=state)


def test_what_is_queued_ahead_and_dies_is_resubmitted_or_reported(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture
) -> None:
    """b times out, c is preempted and cancelled, d ends with an error that only the user can fix."""
    ahead = ahead_of(FOUR)
    ahead.queue()
    slurm.set("1_1", state="TIMEOUT")
    slurm.set("1_2", state="PREEMPTED")
    fail("d", "1_3", "the loss is nan", "FAILED", slurm)
    for _ in range(slurm_status.UNSETTLED_POLLS):
        ahead.tend()
    assert queued(FOUR) == ["a", "b", "c"]
    assert sum("the loss is nan" in message for message in caplog.messages) == 1
    failures = {name: record.failures(paths.run("train_something", name)) for name in "bcd"}
    assert {name: [failure.again for failure in those] for name, those in failures.items()} == {
        "b": [True],
        "c": [],  # preemptions are no failures
        "d": [False],
    }


def test_a_dependent_job_follows_when_what_it_waits_for_is_resubmitted(slurm: FakeSlurm) -> None:
    base, behind = a_work("base"), a_work("behind", after=a_work("base"))
    ahead = ahead_of([FOUR[0], base, behind])
    ahead.queue()
    assert slurm.jobs["2"]["after"] == "afterok:1_1"
    slurm.set("1_1", state="TIMEOUT")
    slurm.set("2", state="CANCELLED", reason="DependencyNeverSatisfied")
    ahead.tend()
    assert slurm.jobs["3"]["after"] is None
    assert slurm.jobs["4"]["after"] == "afterok:3"
    assert queued([base, behind]) == ["base", "behind"]
    slurm.set("4", state="CANCELLED", reason="None")  # by the user
    ahead.tend()
    assert queued([base, behind]) == ["base"]


def test_nothing_waits_in_slurm_for_a_job_on_this_machine(slurm: FakeSlurm) -> None:
    base, behind = a_work("base"), a_work("behind", after=a_work("base"))
    run = Run.of(base)
    submission.claim_folder(run)
    local = Job("local", "token", "jobs", {}, 0.0, job_id=str(os.getpid()))
    record.write_job(run.folder, local)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.launch.local._process", lambda job: object())
        with pytest.raises(UserError, match=r"local job \d+ has not ended"):
            attach_or_submit(Run.of(behind), profile(), is_retry=False)
    assert slurm.jobs == {}


def test_another_training_whose_data_is_gone_keeps_nothing_from_being_queued(
    slurm: FakeSlurm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tmp_path / "manifest.csv"
    without = dataclasses.replace(FOUR[1], inputs=(manifest,))
    ahead = ahead_of([FOUR[0], without, FOUR[2]])
    ahead.queue()
    ahead.tend()
    assert queued(FOUR) == ["a", "c"]
    assert "manifest.csv, which is missing" in caplog.text
    manifest.touch()
    ahead.tend()
    assert queued(FOUR) == ["a", "b", "c"]


def test_a_requeue_that_did_not_come_off_is_one_failure(slurm: FakeSlurm) -> None:
    ahead = ahead_of(FOUR[:2])
    ahead.queue()
    folder = paths.run("train_something", "b")
    attempts.fail(folder, Attempt("1_1", 0), folder / "log.txt")  # by its batch script
    slurm.set("1_1", state="COMPLETED")
    ahead.tend()
    ahead.tend()
    assert queued(FOUR[:2]) == ["a", "b"]
    assert len(record.failures(folder)) == 1
