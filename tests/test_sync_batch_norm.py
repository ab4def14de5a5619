"""Batch norm over ranks, against nn.BatchNorm2d on the whole batch."""

import pytest
import torch
from rank_pool import RunOnRanks
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.train.adapt import synchronise_batch_norms

pytestmark = pytest.mark.slow

pytest_plugins = "rank_pool"
ROWS = 8
Result = dict[str, Tensor]


def two_layers(dtype: torch.dtype, autocast: bool, rank: int, size: int) -> Result:
    """Two steps of conv and batch norm on this rank's rows; outputs, gradients (averaged over ranks) and state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)).to(dtype)
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight.normal_(1, 0.3)
            layer.bias.normal_()
    images = 3 * torch.randn(ROWS, 3, 7, 9, dtype=dtype) + 50  # a mean far from 0 shows cancellation
    towards = torch.randn(ROWS, 5, 5, 7, dtype=dtype)
    if size > 1:
        synchronise_batch_norms(model)
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    for _ in range(2):
        model.zero_grad()
        images.grad = None
        own = images[rows].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(own)
        (output.float() if autocast else output).mul(towards[rows]).mean().backward()
    results = {"output": output.detach(), "images.grad": own.grad, **model.state_dict()}
    for name, parameter in model.named_parameters():
        if size > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= size
        results[f"{name}.grad"] = parameter.grad
    return results


def on_rank(world: ranks.World, dtype: torch.dtype, autocast: bool) -> Result:
    return two_layers(dtype, autocast, world.rank, world.size)


def joined(parts: list[Result]) -> Result:
    rows = {key: torch.cat([part[key] for part in parts]) for key in ("output", "images.grad")}
    rows["images.grad"] /= len(parts)  # each rank's loss is the mean over its own rows
    for part in parts[1:]:
        for key in set(part) - set(rows):
            assert torch.equal(part[key], parts[0][key]), f"{key} differs between ranks"
    return {**parts[0], **rows}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 2e-5), (torch.float32, True, 2e-2)],
)
def test_it_is_batch_norm_on_the_whole_batch(
    on_ranks: RunOnRanks, size: int, dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    whole = two_layers(dtype, autocast, 0, 1)
    parts = joined(on_ranks(size, on_rank, dtype, autocast))
    assert set(parts) == set(whole)
    for key, value in whole.items():
        assert parts[key].dtype == value.dtype
        torch.testing.assert_close(parts[key], value, rtol=tolerance, atol=tolerance)


def test_evaluation_uses_the_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].running_mean.normal_()
    images = torch.randn(2, 4, 3, 3)
    expected = model.eval()(images)
    synchronise_batch_norms(model)
    assert torch.equal(model(images), expected)
