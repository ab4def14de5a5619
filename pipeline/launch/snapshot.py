"""The copy of the package that jobs run, one for each version: editing or pulling changes no queued job."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pipeline import paths
from pipeline.launch.fingerprint import CODE_ROOT


def snapshot() -> Path:
    """The copy of this process's package in runs/code, made now if there is none; whole or not there."""
    files = sorted(path for path in (CODE_ROOT / "pipeline").rglob("*") if path.is_file() and _belongs(path))
    project = CODE_ROOT / "pyproject.toml"
    files += [project] if project.exists() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(CODE_ROOT)).encode() + b"\0" + file.read_bytes())
    place = (paths.RUNS / "code" / digest.hexdigest()[:16]).absolute()
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        for file in files:
            target = making / file.relative_to(CODE_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        making.chmod(0o755)
        making.rename(place)
    except OSError:
        if not place.exists():  # another process may have been quicker
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return place


def _belongs(path: Path) -> bool:
    return "__pycache__" not in path.parts and not path.name.startswith(".")


def environment(place: Path, before: str | None) -> dict[str, str]:
    """Variables that make Python import the package from `place` and not from the working directory.

    `before` is the PYTHONPATH that the job has otherwise.
    """
    path = os.pathsep.join(filter(None, [str(place), before]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
