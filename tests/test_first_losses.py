"""The losses of S12's first 20 steps on the demo's digits, against those in first_losses.csv.

Two recipes: the demo's with larger batches, and the paper's augmentation, mixing, erasing and drop path on top. The
numbers are one processor's for each kind of arithmetic; others round otherwise, so they may differ by what rounding
grows to in 20 steps. On a kind that the file lacks the test compares with float32 and prints the rows to be added.
"""

from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline import device as ranks
from pipeline import experiments
from pipeline.cluster import Profile
from pipeline.config import load_params
from pipeline.data import convert_image_folder
from pipeline.data.demo import write_digits
from pipeline.tasks.classification.training import train
from pipeline.train import history, loop

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("first_losses.csv")
STEPS = 20
SAME_KIND, OTHER_KIND = 0.005, 0.03
"""Of the loss: between processors of one kind, and between kinds of arithmetic."""
LARGER_BATCH = {
    "global_batch_size": 32, "mixup_group_size": 32, "learning_rate_per_1024": 0.032, "epochs": 5,
    "random_resized_crop_area": [0.7, 1.0],
}  # fmt: skip
PAPER = {
    "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erasing": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_resized_crop_area": [0.08, 1.0], "horizontal_flip": 0.5, "drop_path_rate": 0.1,
}  # fmt: skip


def kind(precision: str) -> str:
    """Of arithmetic: float32, or which unit multiplies bfloat16."""
    if precision == "fp32":
        return "fp32"
    return "bf16, AMX" if torch.cpu._is_amx_tile_supported() else "bf16, AVX512"


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "digits")
    convert_image_folder(folder / "digits/train", folder / "train.beton", workers=2)
    return folder / "train.beton"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["demo", "paper's augmentation"])
def test_the_first_losses_are_the_committed_ones(
    name: str, precision: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("this processor has no bfloat16")
    experiments.compose(["scale=demo"], tmp_path / "params.yaml")
    recipe = load_params(tmp_path / "params.yaml").classification.recipe_for("poolformer_s12").model_dump(mode="json")
    recipe |= LARGER_BATCH | {"max_steps": STEPS, "precision": precision} | (PAPER if name != "demo" else {})
    monkeypatch.setattr(loop, "LOG_INTERVAL_STEPS", 1)
    world, profile = ranks.World(0, 1, 0, torch.device("cpu"), 1), Profile(kind="local", checkpoint_interval_s=1e9)
    (tmp_path / "out").mkdir()
    before = torch.get_num_threads()
    arguments = {"variant": "poolformer_s12", "seed": 0, "num_classes": 10, "beton": str(beton)}
    try:
        torch.set_num_threads(1)
        assert train(world, tmp_path, profile, recipe=recipe, **arguments)
    finally:
        torch.set_num_threads(before)
    losses = [record["loss"] for record in history.read(tmp_path / "history.jsonl")]
    assert len(losses) == STEPS
    print("\n".join(f'{name},"{kind(precision)}",{step},{loss:.5f}' for step, loss in enumerate(losses, 1)))
    known = pd.read_csv(FILE)
    known = known[known["recipe"] == name]
    own = known[known["kind"] == kind(precision)]
    expected = (own if len(own) else known[known["kind"] == "fp32"])["loss"].tolist()
    assert losses == pytest.approx(expected, rel=SAME_KIND if len(own) else OTHER_KIND)
    assert losses[-1] < losses[0], "it learns"
