"""Run by the batch script of a job whose ranks failed: notes the failure, and whether the job is to run again."""

import sys
from pathlib import Path

from pipeline.launch import attempts, record
from pipeline.launch.attempts import Attempt


def main(jobs: Path) -> None:
    folder, attempt = attempts.run_folder(jobs), Attempt.current()
    job = record.read_job(folder)
    if job is None or job.job_id != attempt.job:
        return
    again = attempts.fail(folder, attempt, job.log)
    print(f"failed: {record.failures(folder)[-1].message}; {'trying again' if again else 'not tried again'}")
    if again:
        attempts.ask_again(jobs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
