"""What a scheduler says about a job."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """State in Slurm's words (RUNNING or FINISHED for a local job); `is_over` when it will not run again by itself."""

    state: str
    is_over: bool
    reason: str = ""
    start: str = ""
    nodes: str = ""
    fault: str | None = None

    def describe(self, job_id: str) -> str:
        """One line for whoever waits."""
        if self.fault is not None:
            return f"Slurm does not answer ({self.fault}); job {job_id} was {self.state}, and is taken to go on"
        if self.state == "PENDING" and "held" in self.reason.lower():
            return f"job {job_id} is held ({self.reason}): `scontrol release {job_id}` lets it go on"
        if self.state == "PENDING":
            expected = f", expected to start {self.start.replace('T', ' ')}" if self.start not in ("", "N/A") else ""
            return f"job {job_id} waits ({self.reason}{expected})" if self.reason != "None" else f"job {job_id} waits"
        if self.state == "RUNNING":
            return f"job {job_id} runs" + (f" on {self.nodes}" if self.nodes else "")
        return f"job {job_id} is {self.state}"
