"""What a job's result depends on: arguments, code and data, as a record that can be compared and as one hash.

And the copy of the package that jobs run: editing the checkout or pulling changes nothing for a job in the queue.
"""

import functools
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.ablations import ABLATIONS
from pipeline.errors import UserError
from pipeline.launch.closure import Closure
from pipeline.variants import VARIANTS

JOIN = "pipeline.device:join"
"""Every rank runs this before its call."""
CODE_ROOT = Path(__file__).parents[2]
"""The parent of the package that this process runs: the checkout, or in a job the copy that it was queued with."""


@dataclass(frozen=True)
class Work:
    """One call of a function in `tasks` that runs as a job.

    `call` is 'module:function'; the function takes (world, run_folder, profile) and `arguments`, which are JSON.
    The code that it reaches is part of its identity. `inputs` are files whose contents the result depends on, with a
    manifest in place of each .beton. `after` is the work that this one starts from. `watching` are further arguments,
    for validation during training: they change no result and are not part of the fingerprint.
    An argument `variant` stands for its entry of variants.yaml, `ablation` for that of ablations.yaml. `computed` gives
    values that follow from arguments and inputs by a rule: also part of the identity, so that `why` names the peak
    learning rate and not only its rule.
    """

    stage: str
    name: str
    call: str
    arguments: dict[str, Any]
    inputs: tuple[Path, ...] = field(default=())
    after: "Upstream | None" = None
    watching: dict[str, Any] = field(default_factory=dict)
    computed: Callable[[], dict[str, Any]] = dict
    batch: tuple[int, bool] | None = None
    """Of a training: its global batch, and whether a rank's share of it may be split."""
    is_retried: bool = True
    """Whether an attempt that failed is followed by another."""


@dataclass(frozen=True)
class Upstream:
    """A file of another work's `out/`, passed as one argument.

    That work's fingerprint stands for the file, so that a job can be queued behind one that has not run yet. `place`
    is DVC's copy of the file, which is read if this checkout has no run of that fingerprint (after `dvc pull`).
    """

    work: Work
    output: str
    place: Path
    argument: str


@dataclass(frozen=True)
class Identity:
    """What a result depends on. `identity.json` in a run folder, for `python -m pipeline why`."""

    arguments: dict[str, Any]
    inputs: dict[str, str]
    """SHA-256 by path."""
    code: str
    """Digest of `definitions`."""
    definitions: dict[str, str]
    """Digest of each function, class, constant and C source, by 'module:name'."""
    after: str | None
    """Fingerprint of the work that this one starts from."""

    @property
    def fingerprint(self) -> str:
        content = [self.arguments, self.inputs, self.code, self.after]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identify(work: Work) -> Identity:
    """The identity that a work's result would have now, with this checkout's code and data.

    Raises:
        UserError: an input is missing.
    """
    for path in work.inputs:
        if not path.exists():
            raise UserError(f"{work.stage} needs {path}, which is missing: run `dvc repro` to make it")
    code = code_of(work.call)
    arguments = dict(work.arguments)
    if "variant" in arguments:
        arguments["model"] = asdict(VARIANTS[arguments["variant"]])
    if "ablation" in arguments:
        arguments["change"] = asdict(ABLATIONS[arguments["ablation"]])
    arguments |= work.computed()
    return Identity(
        json.loads(json.dumps(arguments)),
        {str(path): content_digest(path) for path in work.inputs},
        code.digest,
        code.definitions,
        None if work.after is None else fingerprint(work.after.work),
    )


def fingerprint(work: Work) -> str:
    """SHA-256 of everything that `work`'s result depends on.

    Raises:
        UserError: an input is missing.
    """
    return identify(work).fingerprint


@functools.cache
def code_of(call: str) -> Closure:
    """The code that a job running `call` reaches, in the package of this process."""
    return Closure((call, JOIN), CODE_ROOT)


def content_digest(path: Path) -> str:
    """SHA-256 of a file."""
    there = path.stat()
    return _content_digest(path, there.st_mtime_ns, there.st_size)


@functools.cache
def _content_digest(path: Path, mtime_ns: int, size_bytes: int) -> str:
    """Computed once per version of a file: ImageNet's manifest is some 100 MB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def snapshot() -> Path:
    """The copy of this process's package in runs/code, made atomically if there is none yet."""
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
    making = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        making.mkdir()
        for file in files:
            target = making / file.relative_to(CODE_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        making.rename(place)
    except OSError:
        if not place.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return place


def _belongs(path: Path) -> bool:
    return "__pycache__" not in path.parts and not path.name.startswith(".")
