"""The classes of ImageNet's validation images, which are published without class folders."""

import csv
import io
import re
import tarfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

KIT = "ILSVRC2012_devkit_t12"
KAGGLE = "LOC_val_solution.csv"
LINES = "val_labels.txt"
ADVICE = (
    f"put one of these beside it: the development kit ({KIT}.tar.gz, or the folder {KIT} that is in it), "
    f"Kaggle's {KAGGLE}, or {LINES} with a line `ILSVRC2012_val_00000001.JPEG n01751747` for each image"
)
SYNSET = re.compile(r"n\d{8}")


def validation_synsets(root: Path) -> dict[str, str]:
    """The synset of each validation image by its file's name, from whichever of the sources of ADVICE is in `root`.

    Empty if none is there. The kit's numbers of classes (`ILSVRC2012_ID`) are not those that models use: they become
    synsets here, and these are numbered in sorted order, as everywhere.

    Raises:
        UserError: the source is there and cannot be read.
    """
    if (file := root / KAGGLE).is_file():
        with file.open(newline="") as rows:
            labels = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(rows)}
        return _checked(file, labels)
    if (file := root / LINES).is_file():
        pairs = [line.split() for line in file.read_text().splitlines() if line.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{file}: each line needs a file name and a synset, and nothing else")
        return _checked(file, dict(pairs))
    for kit in (root / KIT, root / f"{KIT}.tar.gz"):
        if kit.exists():
            return _checked(kit, _of_kit(kit))
    return {}


def _of_kit(kit: Path) -> dict[str, str]:
    from scipy.io import loadmat

    try:
        meta, truth = _kit_file(kit, "meta.mat"), _kit_file(kit, "ILSVRC2012_validation_ground_truth.txt")
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]}
        return {
            f"ILSVRC2012_val_{number:08d}.JPEG": by_number[int(line)] for number, line in enumerate(truth.split(), 1)
        }
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(f"{kit} cannot be read as ImageNet's development kit ({error!r}): fetch it again") from error


def _kit_file(kit: Path, name: str) -> bytes:
    if kit.is_dir():
        return (kit / "data" / name).read_bytes()
    with tarfile.open(kit) as archive:
        file = archive.extractfile(f"{KIT}/data/{name}")
        if file is None:
            raise KeyError(name)
        return file.read()


def _checked(file: Path, labels: dict[str, str]) -> dict[str, str]:
    for name, synset in labels.items():
        if not SYNSET.fullmatch(synset):
            raise UserError(f"{file}: {synset!r}, the class of {name}, is no synset (n and eight digits)")
    return labels
