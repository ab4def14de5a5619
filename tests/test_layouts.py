"""The same training on any layout: one rank, accumulation, several ranks, stopped and resumed on another one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import (
    CLASSES,
    CLASSIFICATION,
    SEGMENTATION,
    Training,
    digests,
    largest_difference,
    make_data,
    make_task,
    newest,
    parts,
    run_rank,
)
from rank_pool import RunOnRanks

from pipeline import device as ranks
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.models import create_classifier, create_segmenter
from pipeline.tasks.classification import evaluation as classifier_evaluation
from pipeline.tasks.classification.evaluation import ValidationSet
from pipeline.tasks.segmentation import evaluation as segmenter_evaluation
from pipeline.tasks.segmentation import training as segmenter_training
from pipeline.train import history

pytestmark = pytest.mark.slow

pytest_plugins = "rank_pool"
RECIPES = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION}
Rows = list[list[tuple[int, str]]]
Trained = Callable[[str, str], tuple[Rows, dict[str, Any]]]


def joined(by_rank: list[Rows]) -> Rows:
    """The global batches' rows, in order."""
    return [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, on_ranks: RunOnRanks, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained(task, layout)`: the rows of each global batch, and the last checkpoint."""
    done: dict[tuple[str, str], tuple[Rows, dict[str, Any]]] = {}

    def train(task: str, layout: str) -> tuple[Rows, dict[str, Any]]:
        if (task, layout) not in done:
            folder, rows = tmp_path_factory.mktemp("run"), []
            for size, training in parts(Training(data, folder, RECIPES[task]), layout):
                rows += joined(on_ranks(size, run_rank, training))
            done[task, layout] = rows, newest(folder)
        return done[task, layout]

    return train


@pytest.mark.parametrize(
    ("task", "layout"),
    [
        ("classification", "1 rank, 4 micro-batches"),
        ("classification", "4 ranks"),
        ("classification", "2 ranks, then 1 rank of 4 micro-batches"),
        ("segmentation", "4 ranks"),
    ],
)
def test_the_layout_changes_no_input_and_weights_by_rounding(trained: Trained, task: str, layout: str) -> None:
    whole_rows, whole = trained(task, "1 rank")
    rows, state = trained(task, layout)
    assert rows == whole_rows
    assert state["step"] == whole["step"] == 20
    assert largest_difference(state["model"], whole["model"]) < 1e-9


def test_the_data_is_what_it_should_be(trained: Trained) -> None:
    """Twenty steps are more than an epoch, whose last images make no whole batch; augmentation differs by epoch."""
    rows, state = trained("classification", "1 rank")
    assert [len(step) for step in rows] == [16] * 20
    first_epoch, second_epoch = list(chain(*rows[:16])), list(chain(*rows[16:]))
    assert len({number for number, _ in first_epoch}) == 256
    assert not set(second_epoch) & set(first_epoch)
    assert state["model"]["stem.conv.weight"].dtype == torch.float64


@pytest.mark.parametrize("task", RECIPES)
def test_a_resume_on_the_same_layout_is_exact_to_the_bit(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path, task: str
) -> None:
    """Four ranks, as the order in which two are summed makes no difference."""
    training = Training(data, tmp_path / "whole", RECIPES[task].model_copy(update={"max_steps": 5}), "float32")
    on_ranks(4, run_rank, training)
    for stop_after in (2, None):
        on_ranks(4, run_rank, replace(training, folder=tmp_path / "resumed", stop_after=stop_after))
    whole, resumed = newest(tmp_path / "whole"), newest(tmp_path / "resumed")
    assert largest_difference(whole["model"], resumed["model"]) == 0
    for number, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, resumed["optimizer"]["state"][number][name])
    curves = [
        [[record[key] for key in history.CURVE_COLUMNS] for record in history.read(tmp_path / name / "history.jsonl")]
        for name in ("whole", "resumed")
    ]
    assert curves[0] == curves[1]
    assert [record[0] for record in curves[0]] == [5]


def test_what_starts_from_a_file_resumes_exactly_and_on_all_ranks(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    """The second attempt reads the file, too, and then its checkpoint."""
    start = create_classifier("poolformer_s12", CLASSES + 2).state_dict()
    torch.save(start, tmp_path / "start.pt")
    recipe = CLASSIFICATION.model_copy(update={"max_steps": 3})
    training = Training(data, tmp_path / "whole", recipe, "float32", start=tmp_path / "start.pt")
    model = make_task(training, ranks.alone()).model.state_dict()
    assert all(torch.equal(model[key], start[key]) for key in start if not key.startswith("head.fc"))
    on_ranks(2, run_rank, training)
    for stop_after in (1, None):
        on_ranks(2, run_rank, replace(training, folder=tmp_path / "resumed", stop_after=stop_after))
    whole, resumed = (newest(tmp_path / name)["model"] for name in ("whole", "resumed"))
    assert largest_difference(whole, resumed) == 0
    on_ranks(1, run_rank, replace(training, folder=tmp_path / "alone"))
    assert largest_difference(whole, newest(tmp_path / "alone")["model"]) < 1e-4


def prepared(world: ranks.World, training: Training) -> Rows:
    """What the model would get in the first two steps."""
    task = make_task(training, world)
    steps = task.steps(0)
    batches = [next(steps) for _ in range(2)]
    return [
        list(zip(batch.sample_ids.tolist(), digests(task.prepare(batch, step, world.device)), strict=True))
        for step, batch in enumerate(batches)
    ]


def test_the_papers_mixing_groups_are_the_same_however_they_are_spread(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    recipe = CLASSIFICATION.model_copy(update={"global_batch_size": 256, "mixup_group_size": 128})
    whole = on_ranks(1, prepared, Training(data, tmp_path, recipe))[0]
    for size in (2, 4):
        by_rank = on_ranks(size, prepared, Training(data, tmp_path, recipe))
        assert joined(by_rank) == whole
    smaller_groups = recipe.model_copy(update={"mixup_group_size": 64})
    assert on_ranks(1, prepared, Training(data, tmp_path, smaller_groups))[0] != whole


@pytest.mark.parametrize("task", RECIPES)
def test_activation_checkpointing_changes_no_bit(data: Path, on_ranks: RunOnRanks, tmp_path: Path, task: str) -> None:
    recipe = RECIPES[task].model_copy(update={"max_steps": 3})
    most = 4 if task == "classification" else 1000
    training = Training(data, tmp_path / "kept", recipe, "float32", most)
    on_ranks(2, run_rank, training)
    on_ranks(2, run_rank, replace(training, folder=tmp_path / "recomputed", activation_checkpointing=True))
    kept, recomputed = newest(tmp_path / "kept"), newest(tmp_path / "recomputed")
    assert largest_difference(kept["model"], recomputed["model"]) == 0


def failure(world: ranks.World, training: Training, spoil: Callable[[ranks.World, Any], None]) -> str:
    try:
        run_rank(world, training, spoil)
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        return f"not our own: {error}"
    return "none"


def test_a_segmenter_that_would_accumulate_is_refused_before_its_data_is_opened(tmp_path: Path) -> None:
    profile = Profile(kind="local", max_images_per_device=2)
    with pytest.raises(UserError, match=r"batch norm needs the whole batch at once: use a cluster profile of 2 ranks"):
        segmenter_training.train(
            ranks.alone(),
            tmp_path,
            profile,
            variant="poolformer_s12",
            seed=0,
            recipe=SEGMENTATION.model_dump(mode="json"),
            num_classes=5,
            beton="missing.beton",
            backbone="missing.pt",
            backbone_classes=5,
        )


def spoil_step_5_on_rank_1(world: ranks.World, task: Any) -> None:
    prepare = task.prepare

    def spoiled(batch: Any, step: int, device: torch.device) -> Any:
        images, labels = prepare(batch, step, device)
        if (world.rank, step) == (1, 5):
            images[0] = torch.nan
        return images, labels

    task.prepare = spoiled


def test_a_loss_that_is_not_finite_names_the_samples_of_its_rank(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    recipe = CLASSIFICATION.model_copy(update={"max_steps": 8})
    training = Training(data, tmp_path, recipe, "float32", stop_after=3)
    on_ranks(2, run_rank, training)
    rank_1_at_step_5 = on_ranks(2, run_rank, replace(training, folder=tmp_path / "whole", stop_after=None))[1][5]
    ids = [number for number, _ in rank_1_at_step_5]
    messages = on_ranks(2, failure, replace(training, stop_after=None), spoil_step_5_on_rank_1)
    assert messages[0] == messages[1]
    assert "the loss is nan at step 5 (learning rate 0.0001, " in messages[0]
    assert f"sample ids {ids})" in messages[0]
    state = newest(tmp_path)
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def too_much_at_step_1_on_rank_1(world: ranks.World, task: Any) -> None:
    prepare = task.prepare

    def greedy(batch: Any, step: int, device: torch.device) -> Any:
        if (world.rank, step) == (1, 1):
            torch.empty(2**46)  # no machine gives 256 TiB
        return prepare(batch, step, device)

    task.prepare = greedy


def test_out_of_memory_on_one_rank_ends_all_and_says_what_would_fit(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    training = Training(data, tmp_path, CLASSIFICATION, "float32", max_images_per_device=4)
    messages = on_ranks(2, failure, training, too_much_at_step_1_on_rank_1)
    assert messages[0].startswith("not our own: "), messages[0]  # it lost its peer
    assert "out of memory with 4 images at a time on one device (" in messages[1]
    assert "max_images_per_device: 2 needs about half (4 micro-batches a step in place of 2, " in messages[1]
    assert "activation_checkpointing: true" in messages[1]


def validated(world: ranks.World, betons: list[Path]) -> tuple[dict[str, float], bool]:
    """A validation pass on this rank's file, and whether the model is in training mode again."""
    torch.manual_seed(0)
    model = create_classifier("poolformer_s12", CLASSES).train()
    images = ValidationSet(str(betons[world.rank]), image_size=32, crop_fraction=1.0, precision="fp32")
    return images.measure(model, world, batch_size=16), model.training


def validated_until_told(world: ranks.World, beton: Path) -> dict[str, float] | None:
    """Rank 1 has to stop."""
    model = create_classifier("poolformer_s12", CLASSES).train()
    images = ValidationSet(str(beton), image_size=32, crop_fraction=1.0, precision="fp32")
    return images.measure(model, replace(world, should_stop=lambda: world.rank == 1), batch_size=16)


def test_a_validation_pass_stops_on_all_ranks_when_one_has_to(data: Path, on_ranks: RunOnRanks) -> None:
    assert on_ranks(2, validated_until_told, data / "images.beton") == [None, None]


def evaluated(world: ranks.World, task: str, data: Path, folder: Path, stop_after: tuple[int, int]) -> bool:
    """An evaluation in which each rank is told to stop after so many batches of its own; 0: never."""
    calls = count(1)
    world = replace(world, should_stop=lambda: next(calls) == stop_after[world.rank])
    profile = Profile(kind="local", max_images_per_device=16, checkpoint_interval_s=1000)
    common = {"variant": "poolformer_s12", "num_classes": CLASSES, "weights": str(folder.parent / f"{task}.pt")}
    if task == "classifier":
        beton = str(data / "images.beton")
        return classifier_evaluation.evaluate(
            world, folder, profile, beton=beton, image_size=32, crop_fraction=1.0, precision="fp32", **common
        )
    settings = {"scale": [64, 64], "size_divisor": 32, "multi_scale_ratios": [0.5, 1.0], "precision": "fp32"}
    return segmenter_evaluation.evaluate(
        world, folder, profile, beton=str(data / "scenes.beton"), settings=settings, **common
    )


@pytest.mark.parametrize(
    ("task", "stops"), [("classifier", [(3, 3), (1, 0)]), ("segmenter", [(2, 9), (40, 20), (0, 3)])]
)
def test_an_evaluation_that_is_told_to_stop_goes_on_and_counts_each_image_once(
    data: Path, on_ranks: RunOnRanks, tmp_path: Path, task: str, stops: list[tuple[int, int]]
) -> None:
    """Both ranks after the same batch, and one rank alone or earlier; the segmenter's in other passes, too."""
    torch.manual_seed(0)
    model = (create_classifier if task == "classifier" else create_segmenter)("poolformer_s12", CLASSES)
    torch.save(model.state_dict(), tmp_path / f"{task}.pt")
    assert on_ranks(2, evaluated, task, data, tmp_path / "whole", (0, 0)) == [True, True]
    for stop_after in stops:
        assert on_ranks(2, evaluated, task, data, tmp_path / "stopped", stop_after) == [False, False]
        assert not (tmp_path / "stopped/out").exists()
    assert len(list((tmp_path / "stopped/checkpoints").iterdir())) == 2
    assert on_ranks(2, evaluated, task, data, tmp_path / "stopped", (0, 0)) == [True, True]
    assert {path.name for path in (tmp_path / "whole/out").iterdir()} >= {"metrics.json", "predictions.parquet"}
    for path in (tmp_path / "whole/out").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped/out" / path.name).read_bytes(), path.name


def test_a_rank_that_cannot_read_the_validation_images_ends_no_training(data: Path, on_ranks: RunOnRanks) -> None:
    beton = data / "images.beton"
    for missing in ([beton, data / "gone.beton"], [data / "gone.beton", beton]):
        assert on_ranks(2, validated, missing) == [({}, True)] * 2
    (here, _), (there, _) = on_ranks(2, validated, [beton, beton])
    assert here == there
    assert here["val_loss"] > 0
