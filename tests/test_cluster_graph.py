"""Whole graphs on the two-node Slurm: the demo's tables as on one process, and the rehearsal of the paper's tier."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, Checkout
from PIL import Image
from slurm_cluster import ON_SLURM, SlurmCluster

pytest_plugins = "slurm_cluster"
pytestmark = ON_SLURM
REHEARSAL = (
    "scale=paper",
    "rehearsal=few_steps",
    "classification.train=[poolformer_s12]",
    "classification.recipe.global_batch_size=128",
    "classification.recipe.max_steps=1",
    "segmentation.recipe.global_batch_size=4",
    "segmentation.recipe.max_steps=1",
    "evaluation.segmentation.multi_scale_ratios=[]",
    "imagenet.num_classes=10",
)


def on_cluster(folder: Path, images_per_device: int) -> Checkout:
    """A checkout whose jobs go to both nodes."""
    checkout = Checkout(folder)
    profile = (checkout.folder / "slurm/dev.yaml").read_text()
    changed = profile.replace("max_images_per_device: 128", f"max_images_per_device: {images_per_device}")
    (checkout.folder / "slurm/dev.yaml").write_text(changed)
    checkout.environment |= {"PIPELINE_CLUSTER": "slurm/dev.yaml", "SLURM_CONF": "/run/slurm_dev/slurm.conf"}
    return checkout


def jobs(checkout: Checkout) -> dict[str, dict[str, object]]:
    """Each run folder's job."""
    files = sorted(checkout.folder.glob("runs/*/*/job.json"))
    return {f"{file.parent.parent.name}/{file.parent.name}": json.loads(file.read_text()) for file in files}


@pytest.fixture
def one_submitted_job(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """What the accounting database allows."""
    change = ("sacctmgr", "--immediate", "modify", "user", "root", "set")
    slurm_cluster.run(*change, "MaxSubmitJobs=1")
    yield
    slurm_cluster.run(*change, "MaxSubmitJobs=-1")


def test_the_demo_has_one_processs_tables_on_two_nodes_and_needs_one_job_at_a_time(
    slurm_cluster: SlurmCluster, demo_outputs: Path, tmp_path: Path, one_submitted_job: None
) -> None:
    spread = on_cluster(tmp_path, 128)
    spread.pipeline("compose", *DEMO)
    said = spread.run("dvc", "repro").stdout
    assert "train_segmenter/poolformer_s12-0: not queued ahead: Slurm's limit on submitted jobs is reached" in said
    assert {job["kind"] for job in jobs(spread).values()} == {"slurm"}
    cost = json.loads((spread.folder / "results/train_segmenter/poolformer_s12-0.cost.json").read_text())
    assert cost["ranks"] == 2
    for stage in ("train_classifier", "train_segmenter"):
        one, two = (
            pd.read_csv(folder / f"results/{stage}/poolformer_s12-0.csv") for folder in (demo_outputs, spread.folder)
        )
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    # A sum over two ranks rounds otherwise; a few pixels and at most a few digits lie on the border.
    for table in ("table2_imagenet", "table4_ade20k"):
        one, two = (
            pd.read_csv(folder / f"reports/{table}.csv").set_index("model") for folder in (demo_outputs, spread.folder)
        )
        assert list(one.columns) == list(two.columns)
        assert two.loc["poolformer_s12", "measured"] == pytest.approx(one.loc["poolformer_s12", "measured"], abs=1.0)
        assert two["verdict"].tolist() == one["verdict"].tolist()
    assert not slurm_cluster.run("squeue", "--noheader")


def write_imagenet(root: Path) -> None:
    """A few hundred photographs' worth of JPEGs in ten classes, in ImageNet's layout and around its size."""
    random = np.random.default_rng(0)
    for split, images in (("train", 256), ("val", 20)):
        for index in range(images):
            file = root / split / f"n{index % 10:08d}" / f"{split}_{index:08d}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)


def write_ade20k(root: Path) -> None:
    random = np.random.default_rng(0)
    for split, images in (("training", 8), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(images):
            pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((683, 512), Image.Resampling.BICUBIC)
            image.save(root / f"images/{split}/ADE_{index:08d}.jpg")
            labels = Image.fromarray(random.integers(0, 151, (6, 8), dtype=np.uint8))
            labels.resize((683, 512), Image.Resampling.NEAREST).save(root / f"annotations/{split}/ADE_{index:08d}.png")


def test_the_papers_tier_is_rehearsed_from_compose_to_the_tables(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    checkout = on_cluster(tmp_path, 16)
    write_imagenet(checkout.folder / "data/imagenet")
    write_ade20k(checkout.folder / "data/ade20k")
    checkout.pipeline("compose", *REHEARSAL)
    checkout.run("dvc", "repro")
    for table in ("table2_imagenet", "table4_ade20k"):
        row = pd.read_csv(checkout.folder / f"reports/{table}.csv").set_index("model").loc["poolformer_s12"]
        assert 0 <= row["measured"] <= 100
        assert row["seeds"] == 1
        assert row["verdict"].startswith("not comparable: ")
        assert "20 images of ImageNet's " in row["verdict"] or "in place of 2,000" in row["verdict"], (
            "a few images only"
        )
        (recipe,) = re.findall(
            r"^- Not the paper's recipe: .*$", (checkout.folder / f"reports/{table}.md").read_text(), re.M
        )
        assert "classification.max_steps" in recipe
        assert "image_size" not in recipe, "only shorter"
        assert "rand_augment" not in recipe
    checkout.pipeline("compose", "scale=paper", "classification.train=[poolformer_s12]", "imagenet.num_classes=10")
    assert "measured on 2 x" in checkout.pipeline("plan").stdout
    assert not slurm_cluster.run("squeue", "--noheader")
