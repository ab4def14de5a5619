"""Run by the batch script of a job whose ranks failed: notes the failure, and whether the job is to run again."""

import sys
from pathlib import Path

from pipeline.launch import attempts, record
from pipeline.launch.attempts import Attempt


def main(jobs: Path) -> int:
    """The exit status for the job: 0 where its run was done before the ranks failed."""
    folder, attempt = attempts.run_folder(jobs), Attempt.current()
    if record.is_done(folder, record.fingerprint_of(folder)):
        print("done before that: nothing is tried again")
        return 0
    job = record.read_job(folder)
    if job is None or job.job_id != attempt.job:
        return 1
    again = attempts.fail(folder, attempt, job.log)
    print(f"failed: {record.failures(folder)[-1].message}; {'trying again' if again else 'not tried again'}")
    if again:
        attempts.ask_again(jobs)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
