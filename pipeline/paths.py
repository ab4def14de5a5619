"""Where every file lies, relative to the checkout's root (the working directory of every command)."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARAMS = Path("params.yaml")
EXPERIMENTS = Path("experiments")
REPORTS = Path("reports")
RESULTS = Path("results")
RUNS = Path("runs")
BETON = Path("data/beton")
LISTINGS = Path("data/listings")
MODELS = Path("models")
START = Path("data/start")
DEFAULT_CLUSTER = Path("slurm/local.yaml")


def code(stage: str) -> Path:
    """The code that a stage's result depends on: a digest of each definition, and one of all."""
    return Path("data/code") / f"{stage}.json"


def listing(dataset: str, split: str) -> Path:
    """The checked list of one split's files, output of its prepare stage."""
    return LISTINGS / dataset / f"{split}.csv"


def beton(dataset: str, split: str) -> Path:
    """The converted images of one split; its manifest lies beside it."""
    return BETON / dataset / f"{split}.beton"


def manifest(beton_path: str | Path) -> Path:
    """The manifest of a .beton, `train.beton.manifest.csv`: one row and one SHA-256 for each sample."""
    return Path(f"{beton_path}.manifest.csv")


def model(kind: str, variant: str, seed: int) -> Path:
    """The final weights of one training (`kind` is classifier or segmenter)."""
    return MODELS / kind / f"{variant}-{seed}.pt"


def start(kind: str, variant: str) -> Path:
    """Which file the trainings of a variant start from, and its SHA-256, as JSON."""
    return START / kind / f"{variant}.json"


def curve(stage: str, variant: str, seed: int) -> Path:
    """The training curve of one run as CSV, for `dvc plots`."""
    return RESULTS / stage / f"{variant}-{seed}.csv"


def cost(stage: str, variant: str, seed: int) -> Path:
    """What one training took, as JSON."""
    return RESULTS / stage / f"{variant}-{seed}.cost.json"


def iou(name: str) -> Path:
    """IoU of each class of one segmenter's evaluation as CSV."""
    return RESULTS / "evaluate_segmenter" / f"{name}.iou.csv"


def pictures(name: str) -> Path:
    """A few images of one segmenter's evaluation with labels and predictions."""
    return RESULTS / "evaluate_segmenter" / f"{name}.pictures.npz"


def metrics(stage: str, name: str) -> Path:
    """The metrics of one evaluation as JSON, for `dvc metrics`; `name` is variant-seed or variant."""
    return RESULTS / stage / f"{name}.json"


def predictions(stage: str, name: str) -> Path:
    """The prediction for each image as Parquet."""
    return Path("predictions") / stage / f"{name}.parquet"


def released_predictions(stage: str, variant: str) -> Path:
    """The same for the released weights of one variant: a file for each task whose weights are there."""
    return Path("predictions") / stage / variant


def run(stage: str, name: str) -> Path:
    """The run directory: config, fingerprint, log, metrics, checkpoints, job record. Outlives a rerun of its stage."""
    return RUNS / stage / name


def is_put_aside(run_folder: Path) -> bool:
    """Whether another run has taken this one's place: its folder's name then goes on behind a dot."""
    return "." in run_folder.name


def with_those_put_aside(run_folder: Path) -> Iterator[Path]:
    """A run's place, which may be empty, and the folders of the runs that it was taken from.

    These are looked for only when asked for: that reads the names of all runs of the stage.
    """
    yield run_folder
    yield from sorted(run_folder.parent.glob(f"{run_folder.name}.*"))


def cluster_profile() -> Path:
    """The cluster profile that PIPELINE_CLUSTER names."""
    return Path(os.environ.get("PIPELINE_CLUSTER", DEFAULT_CLUSTER))


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, fsync it and rename it to `path`.

    A reader sees the old file or the whole new one, never a part, also after a power cut. Who may read it is up to the
    user's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Have a rename in `folder` survive a power cut, where its file system has a way to say so."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:  # some FUSE and CIFS mounts cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(directory)
