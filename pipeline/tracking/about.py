"""What a run folder says about itself for MLflow, as `about.json`: enough to mirror it with nothing else at hand."""

import getpass
import json
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import paths
from pipeline.launch.fingerprint import content_digest
from pipeline.launch.works import rows


@dataclass(frozen=True)
class About:
    """One MLflow run: its place, its name, and what does not change while it goes."""

    kind: str
    """Name of the task."""
    scale: str
    """With the task, the comparison that it belongs to."""
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    datasets: list[dict[str, str]] = field(default_factory=list)
    """Fields of MLflow's Dataset, and the `context` it is used in."""
    note: str = ""
    """Markdown."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this folder alone: what finds its MLflow run again if the answer to its creation was lost."""
    began_ms: int = field(default_factory=lambda: round(time.time() * 1000))

    def write(self, folder: Path) -> None:
        with paths.written_atomically(folder / "about.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "About | None":
        """None when `folder` has none: it is no MLflow run."""
        file = folder / "about.json"
        return cls(**json.loads(file.read_text())) if file.exists() else None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as text by dotted name, as MLflow's params want them."""
    values: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        values.update(flat(value, f"{name}.") if isinstance(value, dict) else {name: str(value)})
    return values


def dataset(name: str, root: str, manifest: Path, context: Literal["training", "validation"]) -> dict[str, str]:
    """An MLflow dataset whose digest is that of its manifest, which has one SHA-256 for each sample."""
    return {
        "name": name,
        "digest": content_digest(manifest)[:36],  # MLflow takes no longer one
        "source_type": "local",
        "source": json.dumps({"uri": root}),
        "profile": json.dumps({"num_rows": rows(manifest)}),
        "context": context,
    }


def provenance(command: str) -> dict[str, str]:
    """Tags that tell who made it from which code, and how to make it again."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "PROJECT", "command": command}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        tags["mlflow.user"] = "unknown"
    if commit := git_commit():
        tags |= {"git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("+changes")}
    return tags


def git_commit() -> str:
    """The checkout's commit, with `+changes` when tracked files differ from it; empty outside git."""
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    # params.yaml and dvc.lock are written by the tools; what they say is logged itself.
    changed = [line[3:] for line in answers[1].splitlines() if line[3:] not in ("params.yaml", "dvc.lock")]
    return answers[0] + ("+changes" if changed else "")
