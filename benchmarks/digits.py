"""The demo's parameters and digits, in a folder of their own."""

import os
from pathlib import Path

from pipeline import experiments
from pipeline.config import Params, load_params
from pipeline.data.convert import convert_image_folder
from pipeline.data.demo import write_digits


def prepare_digits(scratch: Path) -> Params:
    """Write `train.beton` and `val.beton` into `scratch`; returns the demo's parameters."""
    experiments.compose(["scale=demo"], scratch / "params.yaml")
    write_digits(scratch / "digits")
    for split in ("train", "val"):
        convert_image_folder(scratch / "digits" / split, scratch / f"{split}.beton", workers=os.cpu_count() or 1)
    return load_params(scratch / "params.yaml")
