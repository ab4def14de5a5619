"""The DVCs that a drive has started, in `starts.jsonl`: which were killed, and the locks that those have left."""

import json
import time
from pathlib import Path
from typing import Any

from pipeline.launch.dvc_graph import RWLOCK

DEATHS, WITHIN_S = 5, 600
"""So many kills within that time are no accident."""
STALE_S = 600
"""From then on a lock may be a killed DVC's. Its own age, not this job's: that one may not live as long."""


class Starts:
    """A line with job, Unix time and process id for each `dvc repro`, and another when it has ended by itself."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "starts.jsonl"

    def note(self, job: str, pid: int, **how: bool) -> None:
        """Append a line; `how`: `ended`, and `stage_killed` where a stage of it was."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"job": job, "time": time.time(), "pid": pid, **how}) + "\n")

    def deaths(self) -> int:
        """How often a job, its DVC or a stage was killed lately; leaving before a time limit or preemption is none."""
        killed = [*self._killed(), *(line for line in self._lines() if line.get("stage_killed"))]
        return sum(line["time"] > time.time() - WITHIN_S for line in killed)

    def remove_locks(self, job_started: float, blocked_by: set[int]) -> bool:
        """Remove DVC's locks that killed DVCs of this drive have left; whether there were any.

        DVC does not remove them: on another node a process id may be another process', and a lock file names none. Such
        a file is taken to be a killed one's if it was made while that ran, and has been there for STALE_S.

        Args:
            job_started: Unix time, s.
            blocked_by: process ids that DVC named as the users of a path.
        """
        killed = {line["pid"]: line["time"] for line in self._killed()}
        left = [RWLOCK] if blocked_by and blocked_by <= killed.keys() else []
        for lock in (RWLOCK.with_name("lock"), RWLOCK.with_name("rwlock.lock")):
            made = lock.stat().st_ctime if lock.exists() else 0.0
            is_old = time.time() - made > STALE_S
            left += [lock] if is_old and any(start < made < job_started for start in killed.values()) else []
        for lock in left:
            lock.unlink(missing_ok=True)
        return bool(left)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def _killed(self) -> list[dict[str, Any]]:
        """Those that did not end by themselves: they were killed, or the jobs that ran them."""
        lines = self._lines()
        ended = {(line["job"], line["pid"]) for line in lines if line.get("ended")}
        return [line for line in lines if (line["job"], line["pid"]) not in ended]
