"""The paper's recipes as the tasks carry them out, held against timm's functions or values worked out by hand."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pipeline import device as ranks
from pipeline import paths
from pipeline.config import VARIANT_NAMES, load_params
from pipeline.data import convert_image_folder
from pipeline.data.convert import convert_segmentation_folder
from pipeline.experiments import compose
from pipeline.models import create_classifier
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.tasks.on_device import Mixing, erase, mix, normalise
from pipeline.tasks.segmentation.training import SegmentationTask

WORLD = ranks.World(0, 1, 0, torch.device("cpu"), 1)
IMAGES = 256


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 128 small JPEGs: two mixing groups of the paper's size."""
    folder = tmp_path_factory.mktemp("recipe")
    draws = np.random.default_rng(0)
    for index in range(IMAGES):
        file = folder / f"images/n{index % 2}/{index:03d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
    convert_image_folder(folder / "images", folder / "train.beton", storage="original", workers=1)
    return folder / "train.beton"


def papers_task(variant: str, beton: Path, **other: object) -> ClassificationTask:
    """The task of scale=paper on `beton`, with a global batch of 256."""
    compose(["scale=paper"])
    recipe = load_params(paths.PARAMS).classification.recipe_for(variant)
    small = recipe.model_copy(update={"global_batch_size": IMAGES, "image_size": 32, **other})
    return ClassificationTask(variant, small, 10, beton, seed=3, world=WORLD)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_adamw_decays_what_has_more_than_one_dimension(variant: str, beton: Path, in_checkout: Path) -> None:
    task = papers_task(variant, beton)
    optimizer = task.optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert set(decay) == {0.0, 0.05}
    assert decay[0.05] == {id(p) for p in task.model.parameters() if p.ndim > 1}
    assert decay[0.0] == {id(p) for p in task.model.parameters() if p.ndim == 1}
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_no_norm_bias_or_layer_scale_is_decayed(beton: Path, in_checkout: Path) -> None:
    task = papers_task("poolformer_s12", beton)
    free = {id(p) for p in task.optimizer().param_groups[0]["params"]}
    names = [name for name, p in task.model.named_parameters() if id(p) in free]
    assert all(name.endswith(("bias", "scale")) or "norm" in name for name in names)
    # 12 blocks of 2 norms, 2 scales, 2 MLP biases; 4 patch embeddings; the head's norm and bias.
    assert len(names) == 12 * (2 * 2 + 2 + 2) + 4 + 3


def test_the_rate_changes_by_epoch_as_timms_and_follows_the_batch(beton: Path, in_checkout: Path) -> None:
    task = papers_task("poolformer_s12", beton, global_batch_size=128)
    assert task.steps_per_epoch == 2
    peak = 1e-3 * 128 / 1024
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    timms = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    assert task.total_steps == 310 * 2
    for step in range(task.total_steps):
        timms.step(step // 2)
        assert task.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms_in_groups_of_128(mixup_alpha: float, cutmix_alpha: float) -> None:
    """Forty steps, so that boxes of every size and place are among them."""
    images = torch.randint(0, 256, (IMAGES, 3, 16, 12), dtype=torch.uint8)
    labels = torch.arange(IMAGES) % 10
    mixing = Mixing(mixup_alpha, cutmix_alpha, label_smoothing=0.1, num_classes=10)
    timms = Mixup(mixup_alpha, cutmix_alpha, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=10)
    for step in range(40):
        pixels, targets = mix(images, labels, mixing, 128, seed=1, step=step, first_group=0)
        for group in range(2):
            rows = slice(128 * group, 128 * (group + 1))
            np.random.seed(int(np.random.SeedSequence([1, 0x6D6978, step, group]).generate_state(1)[0]))
            expected, expected_targets = timms(images[rows].float(), labels[rows])
            assert torch.equal(pixels[rows], expected.round())
            assert torch.equal(targets[rows], expected_targets)


def test_mixup_and_cutmix_take_turns_with_the_recipes_lambdas(beton: Path, in_checkout: Path) -> None:
    task = papers_task("poolformer_s12", beton)
    assert task.mixing is not None
    lambdas: dict[bool, list[float]] = {True: [], False: []}
    for draw in range(2000):
        lam, cut = task.mixing.draw(np.random.RandomState(draw))
        lambdas[cut].append(lam)
    assert len(lambdas[True]) / 2000 == pytest.approx(0.5, abs=0.04)
    # Beta(0.8, 0.8) and Beta(1, 1): mean 1/2, variances 1 / (4 (2 a + 1)).
    for cut, alpha in ((False, 0.8), (True, 1.0)):
        assert np.mean(lambdas[cut]) == pytest.approx(0.5, abs=0.03)
        assert np.var(lambdas[cut]) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_erasing_is_timms_a_quarter_of_the_images_with_noise() -> None:
    images = normalise(torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8))
    erased = erase(images.clone(), torch.arange(400), 0.25, seed=1, epoch=2)
    changed = (erased != images).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.06)
    for index in changed.nonzero().flatten().tolist():
        number = int(np.random.SeedSequence([1, 0x657261, 2, index]).generate_state(1)[0])
        random.seed(number)
        torch.manual_seed(number)
        expected = RandomErasing(0.25, mode="pixel", device="cpu")(images[index].clone())
        assert torch.equal(erased[index], expected)
        box = (erased[index] != images[index]).any(0)
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert box.float().sum() >= 0.95 * height * width, "one box"


def test_weights_are_those_of_torchs_seed_whatever_other_threads_draw(beton: Path, in_checkout: Path) -> None:
    recipe = papers_task("poolformer_s12", beton).recipe
    torch.manual_seed(3)
    expected = create_classifier("poolformer_s12", 10, recipe.drop_path_rate).state_dict()
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(8)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        made = papers_task("poolformer_s12", beton).model.state_dict()
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mixed", [True, False])
def test_the_loss_is_timms(mixed: bool, beton: Path, in_checkout: Path) -> None:
    alphas = {} if mixed else {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    task = papers_task("poolformer_s12", beton, **alphas)
    logits = torch.randn(8, 10, requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return logits

    if mixed:
        targets = torch.rand(8, 10).softmax(1)
        expected = SoftTargetCrossEntropy()(logits, targets)
    else:
        targets = torch.randint(0, 10, (8,))
        expected = LabelSmoothingCrossEntropy(0.1)(logits, targets)
    torch.testing.assert_close(task.loss(Fixed(), torch.zeros(8, 3, 32, 32), targets), expected)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_drop_path_is_the_variants(variant: str, beton: Path, in_checkout: Path) -> None:
    rates = dict(zip(VARIANT_NAMES, (0.1, 0.1, 0.2, 0.3, 0.4), strict=True))
    model = papers_task(variant, beton).model
    drops = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(rates[variant])


def test_segmenters_decay_everything_and_have_no_warm_up(tmp_path: Path, in_checkout: Path) -> None:
    for kind, mode, suffix in (("images", "RGB", "jpg"), ("annotations", "L", "png")):
        folder = tmp_path / kind / "training"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new(mode, (64, 48), 1 if mode == "L" else (9, 9, 9)).save(folder / f"{index}.{suffix}")
    beton = tmp_path / "training.beton"
    convert_segmentation_folder(tmp_path, "training", beton, workers=1, num_classes=150)
    torch.save({"model": create_classifier("poolformer_s12").state_dict()}, tmp_path / "backbone.pt")
    compose(["scale=paper"])
    recipe = load_params(paths.PARAMS).segmentation.recipe_for("poolformer_s12")
    task = SegmentationTask("poolformer_s12", recipe, 150, beton, tmp_path / "backbone.pt", 1000, 0, WORLD)
    optimizer = task.optimizer()
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(task.model.parameters()))
    assert (group["weight_decay"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.999), 1e-8)
    assert task.total_steps == 40_000
    for step, rate in ((0, 2e-4), (10_000, 2e-4 * 0.75**0.9), (39_999, 2e-4 * (1 / 40_000) ** 0.9)):
        assert task.learning_rate(step) == pytest.approx(rate)
