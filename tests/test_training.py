"""The engine: schedules against timm's, accumulation, resume to the bit, damaged checkpoints, stateless masks."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.cluster import split
from pipeline.errors import UserError
from pipeline.models import create_classifier
from pipeline.tasks.on_device import Mixing, erase, mix, normalise
from pipeline.tasks.training import _cost
from pipeline.train import checkpoint, history
from pipeline.train.adapt import StatelessDropout
from pipeline.train.loop import train
from pipeline.train.schedule import cosine_by_epoch, polynomial
from pipeline.train.task import Step, Validation

WORLD = ranks.World(0, 1, 0, torch.device("cpu"), 1)


@pytest.mark.parametrize(("batch", "cooldown"), [(1024, 0), (1024, 10), (4096, 10)])
def test_cosine_is_timms_at_every_epoch(batch: int, cooldown: int) -> None:
    peak = batch / 1024 * 1e-3
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    timm_schedule = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(300 + cooldown):
        timm_schedule.step(epoch)
        ours = cosine_by_epoch(epoch, peak=peak, minimum=1e-5, warmup_start=1e-6, warmup_epochs=5, epochs=300)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_polynomial_by_hand() -> None:
    assert polynomial(0, peak=2e-4, power=0.9, steps=40_000) == 2e-4
    assert polynomial(20_000, peak=2e-4, power=0.9, steps=40_000) == pytest.approx(2e-4 * 0.5**0.9)
    assert polynomial(40_000, peak=2e-4, power=0.9, steps=40_000) == 0


class ToyTask:
    """Eight classes of noise; drop path and dropout make each step depend on its masks."""

    precision = "fp32"
    total_steps = 45
    steps_per_epoch = 10
    global_batch_size = 8
    image_size = 8
    images = 80

    def __init__(self, spoil_step: int = -1) -> None:
        torch.manual_seed(0)
        self.spoil_step = spoil_step
        self.model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3), DropPath(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
        )

    def learning_rate(self, step: int) -> float:
        return polynomial(step, peak=1e-2, power=0.9, steps=self.total_steps)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), fused=True)

    def steps(self, first_step: int) -> Iterator[Step]:
        for step in range(first_step, self.total_steps):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(self.global_batch_size, 3, 8, 8, generator=generator)
            if step == self.spoil_step:
                images[3] = math.nan
            labels = torch.randint(0, 8, (self.global_batch_size,), generator=generator)
            yield Step((images, labels), torch.arange(self.global_batch_size) + 100 * step)

    def prepare(self, batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return batch.tensors

    def loss(self, model: nn.Module, *micro_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(micro_batch[0]), micro_batch[1])


@torch.no_grad()
def measure(model: nn.Module) -> dict[str, float]:
    return {"top1": sum(parameter.double().sum().item() for parameter in model.parameters())}


LOOKS = Validation(10, measure)


def run(
    task: ToyTask,
    folder: Path,
    micro: int = 8,
    stop_after: int | None = None,
    validation: Validation | None = None,
    compiles: bool = False,
    activation_checkpointing: bool = False,
) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    calls = iter(range(10**9))
    train(
        task,
        WORLD,
        folder,
        split(task.global_batch_size, 1, micro),
        seed=1,
        activation_checkpointing=activation_checkpointing,
        checkpoint_interval_s=1e-9,
        should_stop=lambda: stop_after is not None and next(calls) + 1 >= stop_after,
        validation=validation,
        compiles=compiles,
    )
    return task.model.state_dict()


def test_resume_is_exact_at_any_step(tmp_path: Path) -> None:
    whole = run(ToyTask(), tmp_path / "whole")
    for stop in (1, 7, 20, 33):
        folder = tmp_path / f"stopped-{stop}"
        run(ToyTask(), folder, stop_after=stop)
        resumed = run(ToyTask(), folder)
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), (stop, key)
        assert history.read(folder / "history.jsonl")[-1]["step"] == 45


def test_looking_at_the_accuracy_changes_nothing_and_each_look_is_there_once(tmp_path: Path) -> None:
    whole = run(ToyTask(), tmp_path / "whole")
    for stop in (None, 9, 10, 25):
        folder = tmp_path / f"looked-at-{stop}"
        if stop is not None:
            run(ToyTask(), folder, stop_after=stop, validation=LOOKS)
        looked_at = run(ToyTask(), folder, validation=LOOKS)
        assert all(torch.equal(value, looked_at[key]) for key, value in whole.items())
        looks = [(look["step"], look["epoch"], look["top1"]) for look in history.read(folder / "validation.jsonl")]
        assert [look[:2] for look in looks] == [(10, 1), (20, 2), (30, 3), (40, 4)]
        if stop is None:
            first = looks
        assert looks == first


def test_a_validation_pass_that_failed_leaves_no_line(tmp_path: Path) -> None:
    whole = run(ToyTask(), tmp_path / "whole")
    failed = run(ToyTask(), tmp_path / "failed", validation=Validation(10, lambda model: {}))
    assert all(torch.equal(value, failed[key]) for key, value in whole.items())
    assert history.read(tmp_path / "failed/validation.jsonl") == []


def test_a_run_that_has_to_stop_in_a_validation_pass_makes_it_again(tmp_path: Path) -> None:
    whole = run(ToyTask(), tmp_path / "whole", validation=LOOKS)
    answers = iter([None])

    def at_step(model: nn.Module) -> dict[str, float] | None:
        step = history.read(tmp_path / "stopped/history.jsonl")[-1]["step"]
        return None if step == 20 and next(answers, 0) is None else measure(model)

    run(ToyTask(), tmp_path / "stopped", validation=Validation(10, at_step))
    assert history.read(tmp_path / "stopped/history.jsonl")[-1]["step"] == 20
    (newest,) = [path for path in (tmp_path / "stopped/checkpoints").iterdir() if path.name.startswith("step-20-")]
    resumed = run(ToyTask(), tmp_path / "stopped", validation=LOOKS)
    assert newest.name not in [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()]
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    looks = [
        [(look["step"], look["top1"]) for look in history.read(tmp_path / name / "validation.jsonl")]
        for name in ("whole", "stopped")
    ]
    assert looks[0] == looks[1]


def test_the_hours_of_a_run_are_added_up_over_its_layouts() -> None:
    records = [
        {"seconds": seconds, "ranks": ranks, "images_per_s": 1.0, "peak_memory_gb": 1.0}
        for seconds, ranks in ((1800.0, 4), (3600.0, 4), (5400.0, 2))
    ]
    cost = _cost(ToyTask(), WORLD, records)
    assert cost["rank_hours"] == pytest.approx(5.0)


class StageTask(ToyTask):
    """A real stage in the middle, of one block with drop path."""

    def __init__(self) -> None:
        super().__init__()
        stage = create_classifier("poolformer_s12", 8, 0.3).stages[0]
        stage.blocks = stage.blocks[1:]  # the first one has no drop path
        self.model = nn.Sequential(nn.Conv2d(3, 64, 3), stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))


@pytest.mark.slow
def test_compiled_training_differs_by_rounding_alone_and_resumes_exactly(tmp_path: Path) -> None:
    eager = run(StageTask(), tmp_path / "eager", stop_after=15)
    task = StageTask()
    compiled = run(task, tmp_path / "compiled", stop_after=15, validation=LOOKS, compiles=True)
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-4, rtol=1e-4)
    assert not all(torch.equal(compiled[key], value) for key, value in eager.items())
    assert len(history.read(tmp_path / "compiled/validation.jsonl")) == 1
    for steps, checkpointing in ((7, False), (8, True)):
        resumed = run(
            StageTask(), tmp_path / "resumed", stop_after=steps, compiles=True, activation_checkpointing=checkpointing
        )
    assert all(torch.equal(compiled[key], value) for key, value in resumed.items())


@pytest.mark.parametrize(("activation_checkpointing", "times"), [(False, 1), (True, 2)])
def test_activation_checkpointing_computes_each_block_once_more(
    tmp_path: Path, activation_checkpointing: bool, times: int
) -> None:
    task, calls = StageTask(), []
    task.model[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    run(task, tmp_path, stop_after=3, activation_checkpointing=activation_checkpointing)
    assert len(calls) == 3 * times


def test_accumulation_changes_rounding_only(tmp_path: Path) -> None:
    whole, parts = run(ToyTask(), tmp_path / "a"), run(ToyTask(), tmp_path / "b", micro=2)
    for key, value in whole.items():
        torch.testing.assert_close(value, parts[key], rtol=1e-4, atol=1e-5)


def test_waiting_for_data_is_measured_and_said(tmp_path: Path) -> None:
    class SlowData(ToyTask):
        def steps(self, first_step: int) -> Iterator[Step]:
            for batch in super().steps(first_step):
                time.sleep(0.01)
                yield batch

    run(SlowData(), tmp_path)
    record = history.read(tmp_path / "history.jsonl")[0]
    elapsed_s = record["step"] * ToyTask.global_batch_size / record["images_per_s"]
    assert 0.01 * record["step"] <= record["data_wait"] * elapsed_s <= elapsed_s
    assert "data is the bottleneck: waiting for it 30%" in history.progress_line({**record, "data_wait": 0.3})
    assert "bottleneck" not in history.progress_line({**record, "data_wait": 0.01})


def test_a_damaged_checkpoint_costs_one_interval(tmp_path: Path) -> None:
    whole = run(ToyTask(), tmp_path / "whole")
    folder = tmp_path / "damaged"
    run(ToyTask(), folder, stop_after=41)
    (newest,) = (folder / "checkpoints").glob("step-41-*.pt")
    newest.write_bytes(newest.read_bytes()[:-1000])
    state = checkpoint.load_newest(folder / "checkpoints")
    assert state is not None
    assert state["step"] == 40
    for key, value in run(ToyTask(), folder).items():
        assert torch.equal(whole[key], value)


def test_history_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run(ToyTask(), tmp_path / "r", stop_after=33)
    run(ToyTask(), tmp_path / "r")
    steps = [record["step"] for record in history.read(tmp_path / "r/history.jsonl")]
    assert steps == sorted(set(steps))


def test_nan_stops_the_run_and_names_step_rate_and_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 25 \(learning rate 0\.00\d+, sample ids \[2500, 2501"):
        run(ToyTask(spoil_step=25), tmp_path / "nan")
    state = checkpoint.load_newest(tmp_path / "nan/checkpoints")
    assert state is not None
    assert state["step"] == 20
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A finite loss may have a gradient that is not; the next loss tells, but a checkpoint may come before it."""

    class Overflowing(ToyTask):
        def loss(self, model: nn.Module, *micro_batch: Tensor) -> Tensor:
            at_last_step_before_a_checkpoint = bool((micro_batch[0] == self.last_images).all())
            penalty = 0 * (self.model[0].weight[0, 0, 0, 0] * 0).sqrt() if at_last_step_before_a_checkpoint else 0
            return super().loss(model, *micro_batch) + penalty

    task = Overflowing()
    task.last_images = next(task.steps(39)).tensors[0]
    with pytest.raises(UserError, match=r"weights are not finite after the update at step 39 .*ids \[3900, 3901"):
        run(task, tmp_path)
    state = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["step"] == 20


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"model": {}})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"model": {}})
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("step-1-")


def damage(folder: Path, step: int) -> None:
    """Change one byte in the middle of a checkpoint."""
    (path,) = folder.glob(f"step-{step}-*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*.pt"))


def test_the_two_newest_whole_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        checkpoint.save(tmp_path, step, {"value": torch.tensor(step)})
    assert steps_kept(tmp_path) == [40, 60]
    damage(tmp_path, 60)
    checkpoint.save(tmp_path, 80, {"value": torch.tensor(80)})
    assert {40, 80} <= set(steps_kept(tmp_path)), "60 is no whole one"
    damage(tmp_path, 80)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    assert state["step"] == 40


def test_no_whole_checkpoint_is_an_error_and_no_start_at_step_0(tmp_path: Path) -> None:
    run(ToyTask(), tmp_path, stop_after=25)
    for path in (tmp_path / "checkpoints").glob("step-*.pt"):
        damage(tmp_path / "checkpoints", int(path.name.split("-")[1]))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        run(ToyTask(), tmp_path)
    assert len(history.read(tmp_path / "history.jsonl")) > 0


def test_a_half_written_checkpoint_is_none_and_goes_at_the_next_start(tmp_path: Path) -> None:
    run(ToyTask(), tmp_path, stop_after=25)
    unfinished = tmp_path / "checkpoints/.step-40.4711"
    unfinished.write_bytes(b"PK")
    run(ToyTask(), tmp_path, stop_after=5)
    assert not unfinished.exists()


def test_masks_do_not_depend_on_ranks() -> None:
    def masks(first_row: int, rows: int, step: int = 3) -> Tensor:
        head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(3, 5, 1))
        dropout = StatelessDropout(nn.Sequential(DropPath(0.5), DropPath(0.2), head), seed=7)
        dropout.draw(step, first_row, rows, torch.device("cpu"))
        dropout.select(0, rows)
        assert [layer.mask.shape[1:] for layer in dropout.layers] == [(1, 1, 1), (1, 1, 1), (3, 1, 1)]
        return torch.cat([layer.mask.flatten(1).T for layer in dropout.layers])

    whole = masks(0, 64)
    for cut in (16, 21):
        assert torch.equal(whole, torch.cat([masks(0, cut), masks(cut, 64 - cut)], dim=1))
    assert not torch.equal(whole, masks(0, 64, step=4))
    assert set(whole[0].tolist()) == {0.0, 2.0}
    assert whole[1].max() == pytest.approx(1.25)


def test_drop_path_rate_is_what_it_says() -> None:
    model = nn.Sequential(DropPath(0.3))
    dropout = StatelessDropout(model, seed=0)
    dropout.draw(0, 0, 20_000, torch.device("cpu"))
    assert (dropout.masks == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    model.eval()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), x)


def test_mixing_is_by_group_and_counted() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(16) % 10
    mixing = Mixing(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    pixels, targets = mix(images, labels, mixing, 4, seed=1, step=5, first_group=0)
    second, second_targets = mix(images[8:], labels[8:], mixing, 4, seed=1, step=5, first_group=2)
    assert torch.equal(pixels[8:], second)
    assert torch.equal(targets[8:], second_targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert torch.equal(pixels, pixels.round())
    assert not torch.equal(pixels, images.float())


def test_erasing_is_counted_by_sample() -> None:
    images = normalise(torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8))
    ids = torch.arange(32)
    whole = erase(images.clone(), ids, 0.25, seed=3, epoch=2)
    part = erase(images[10:].clone(), ids[10:], 0.25, seed=3, epoch=2)
    assert torch.equal(whole[10:], part)
    changed = (whole != images).flatten(1).any(1).float().mean()
    assert 0.05 < changed < 0.5


def test_normalise_by_hand() -> None:
    pixels = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - mean) / deviation for mean, deviation in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
