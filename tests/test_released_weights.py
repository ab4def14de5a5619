"""Released files: the official logits from the official keys, and one clear error for each misfit.

The reference below is the official network written out as plain tensor operations over the official
state dict: norms, pooling and GELU by their definitions, nothing from timm or torchvision.
"""

import argparse
import hashlib
import math
import zipfile
from pathlib import Path

import pytest
import torch
from released_format import PAPER, State, authors_state, mmseg_state
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad, relu

from pipeline.errors import UserError
from pipeline.models import (
    RELEASED_CLASSIFIERS,
    RELEASED_SEGMENTERS,
    create_classifier,
    create_segmenter,
    find_released,
    load_released,
)


def part(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def group_norm(x: Tensor, p: State) -> Tensor:
    variance, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    return scaled * p["weight"].view(-1, 1, 1) + p["bias"].view(-1, 1, 1)


def pool_minus_self(x: Tensor) -> Tensor:
    """Mean of the neighbours in the 3x3 window that lie inside the map, minus the value itself."""
    height, width = x.shape[-2:]

    def window_sum(values: Tensor) -> Tensor:
        padded = pad(values, (1, 1, 1, 1))
        rows = [padded[..., i : i + height, :] for i in range(3)]
        return torch.stack([row[..., j : j + width] for row in rows for j in range(3)]).sum(0)

    return window_sum(x) / window_sum(torch.ones_like(x)) - x


def channel_mlp(x: Tensor, p: State) -> Tensor:
    hidden = conv2d(x, p["fc1.weight"], p["fc1.bias"])
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return conv2d(hidden, p["fc2.weight"], p["fc2.bias"])


def stage_outputs(x: Tensor, p: State, blocks: tuple[int, ...]) -> list[Tensor]:
    outputs = []
    x = conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4, padding=2)
    for stage, depth in enumerate(blocks):
        if stage:
            q = part(p, f"network.{2 * stage - 1}.proj.")
            x = conv2d(x, q["weight"], q["bias"], stride=2, padding=1)
        for block in range(depth):
            q = part(p, f"network.{2 * stage}.{block}.")
            mixed = pool_minus_self(group_norm(x, part(q, "norm1.")))
            x = x + q["layer_scale_1"].view(-1, 1, 1) * mixed
            mixed = channel_mlp(group_norm(x, part(q, "norm2.")), part(q, "mlp."))
            x = x + q["layer_scale_2"].view(-1, 1, 1) * mixed
        outputs.append(x)
    return outputs


def official_logits(images: Tensor, state: State, variant: str) -> Tensor:
    p = {key: value.double() for key, value in state.items()}
    x = group_norm(stage_outputs(images, p, PAPER[variant][0])[-1], part(p, "norm."))
    return x.mean((2, 3)) @ p["head.weight"].T + p["head.bias"]


def mmseg_logits(images: Tensor, state: State, variant: str) -> Tensor:
    p = {key: value.double() for key, value in state.items()}
    outputs = stage_outputs(images, part(p, "backbone."), PAPER[variant][0])
    laterals = []
    for level, x in enumerate(outputs):
        q = part(p, f"neck.lateral_convs.{level}.conv.")
        x = group_norm(x, part(p, f"backbone.norm{2 * level}."))
        laterals.append(conv2d(x, q["weight"], q["bias"]))
    for level in (3, 2, 1):
        size = laterals[level - 1].shape[2:]
        laterals[level - 1] = laterals[level - 1] + interpolate(laterals[level], size)
    scaled = []
    for level, x in enumerate(laterals):
        q = part(p, f"neck.fpn_convs.{level}.conv.")
        x = conv2d(x, q["weight"], q["bias"], padding=1)
        for step in range(max(level, 1)):
            q = part(p, f"decode_head.scale_heads.{level}.{2 * step}.")
            x = conv2d(x, q["conv.weight"], padding=1)
            x = x - q["bn.running_mean"].view(-1, 1, 1)
            x = x / (q["bn.running_var"].view(-1, 1, 1) + 1e-5).sqrt()
            x = relu(x * q["bn.weight"].view(-1, 1, 1) + q["bn.bias"].view(-1, 1, 1))
            if level:
                x = interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        size = laterals[0].shape[2:]
        scaled.append(interpolate(x, size, mode="bilinear", align_corners=False))
    total = torch.stack(scaled).sum(0)
    return conv2d(total, p["decode_head.conv_seg.weight"], p["decode_head.conv_seg.bias"])


def images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def s12() -> State:
    return authors_state("poolformer_s12")


@pytest.fixture(scope="module")
def s12_segmenter() -> State:
    return mmseg_state("poolformer_s12")


@pytest.fixture
def s12_file(s12: State, tmp_path: Path) -> Path:
    path = tmp_path / "poolformer_s12.pth.tar"
    torch.save(s12, path)
    return path


@pytest.mark.parametrize("variant", PAPER)
def test_authors_file_gives_the_official_logits(variant: str, tmp_path: Path) -> None:
    state = authors_state(variant)
    path = tmp_path / RELEASED_CLASSIFIERS[variant]
    torch.save(state, path)
    model = load_released(create_classifier(variant).double().eval(), path)
    path.unlink()
    with torch.no_grad():
        difference = model(images(64, 64)) - official_logits(images(64, 64), state, variant)
    assert difference.abs().max() < 1e-10


@pytest.mark.parametrize(
    ("variant", "height", "width"),
    [("poolformer_s12", 64, 96), ("poolformer_s12", 72, 50), ("poolformer_m36", 64, 64)],
)
def test_mmsegs_file_gives_its_logits(variant: str, height: int, width: int, tmp_path: Path) -> None:
    state = mmseg_state(variant)
    path = tmp_path / "iter_40000.pth"
    meta = {"CLASSES": ("wall", "sky"), "PALETTE": [[120, 120, 120]], "env_info": "…", "seed": None}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, path)
    model = load_released(create_segmenter(variant).double().eval(), path)
    path.unlink()
    x = images(height, width)
    with torch.no_grad():
        difference = model(x) - mmseg_logits(x, state, variant)
    assert difference.abs().max() < 1e-10


def test_other_layouts_hold_the_same_values(s12_file: Path, tmp_path: Path) -> None:
    weights = load_released(create_classifier("poolformer_s12"), s12_file).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "timm.pth")
    torch.save(weights, tmp_path / "timm_old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": weights, "epoch": 7, "best": 77.2}, tmp_path / "last.pt")
    torch.save({"state_dict": torch.load(s12_file), "epoch": 300}, tmp_path / "wrapped.pth.tar")
    for name in ("model.safetensors", "timm.pth", "timm_old.pth", "last.pt", "wrapped.pth.tar"):
        loaded = load_released(create_classifier("poolformer_s12"), tmp_path / name).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights), name


def test_our_segmenters_checkpoint(tmp_path: Path) -> None:
    saved = create_segmenter("poolformer_s12", 11)
    torch.save({"model": saved.state_dict()}, tmp_path / "last.pt")
    loaded = load_released(create_segmenter("poolformer_s12", 11), tmp_path / "last.pt")
    pairs = zip(saved.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def refuse(path: Path, *parts: str, segmenter: bool = False) -> None:
    """Loading fails with one line that names the file and has the parts; the model is as it was."""
    model = (create_segmenter if segmenter else create_classifier)("poolformer_s12")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_released(model, path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for text in parts:
        assert text in message, message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_missing_file_says_what_was_expected(tmp_path: Path) -> None:
    refuse(tmp_path / "x.pth", "no such file; expected poolformer_s12.pth.tar")
    refuse(tmp_path, "no such file")
    name = "fpn_poolformer_s12_8x4_512x512_40k_ade20k_20220501_115154-b5aa2f49.pth"
    refuse(tmp_path / "x.pth", f"expected {name}", segmenter=True)


def test_another_variant_is_named(tmp_path: Path) -> None:
    for variant in ("poolformer_s24", "poolformer_m36"):
        path = tmp_path / f"{variant}.pth.tar"
        torch.save(authors_state(variant), path)
        refuse(path, f"holds {variant}, and the model is poolformer_s12", "expected poolformer_s12")
        path.unlink()


def test_another_number_of_classes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "poolformer_s12_21k.pth"
    torch.save(authors_state("poolformer_s12", 21_841), path)
    refuse(path, "a head of 21841 classes, and the model has 1000", "expected poolformer_s12.pth")
    torch.save({"state_dict": mmseg_state("poolformer_s12", 19)}, path)
    refuse(path, "a head of 19 classes, and the model has 150", segmenter=True)


def test_a_segmenter_is_no_classifier(s12_file: Path, s12_segmenter: State, tmp_path: Path) -> None:
    refuse(s12_file, "a classifier, and the model is a segmenter", segmenter=True)
    torch.save({"state_dict": s12_segmenter}, tmp_path / "fpn.pth")
    refuse(tmp_path / "fpn.pth", "a segmenter, and the model is a classifier")


def test_keys_that_do_not_fit_are_named_as_the_file_has_them(s12: State, tmp_path: Path) -> None:
    path = tmp_path / "edited.pth.tar"
    state = dict(s12)
    del state["network.4.5.layer_scale_2"]
    state["norm3.weight"] = torch.zeros(3)
    state["network.1.proj.weight"] = torch.zeros(128, 64, 5, 5)
    torch.save(state, path)
    refuse(
        path,
        "expected poolformer_s12.pth.tar",
        "1 key missing (network.4.5.layer_scale_2)",
        "1 key left over (norm3.weight)",
        "1 key of another shape (network.1.proj.weight is 128x64x5x5, expected 128x64x3x3)",
    )
    for key in [key for key in state if "mlp" in key]:
        del state[key]
    torch.save(state, path)
    refuse(path, "49 keys missing (network.0.0.mlp.fc1.weight, ", ", and 46 more)")


def test_files_cut_short(s12: State, s12_file: Path, tmp_path: Path) -> None:
    whole = s12_file.read_bytes()
    path = tmp_path / "cut.pth.tar"
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        refuse(path, "cut short, or not a checkpoint")
    torch.save(s12, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: len(whole) // 2])
    refuse(path, "cut short, or not a checkpoint")
    weights = create_classifier("poolformer_s12").state_dict()
    save_file(weights, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    refuse(tmp_path / "cut.safetensors", "cut short, or not a checkpoint")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "poolformer_s12.pth.tar"
    path.write_text("<!DOCTYPE html><title>Not Found</title>")
    refuse(path, "cut short, or not a checkpoint")
    path.rename(tmp_path / "model.safetensors")
    refuse(tmp_path / "model.safetensors", "cut short, or not a checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(path, "cut short, or not a checkpoint")
    for content in (torch.zeros(3), {"state_dict": [1, 2]}, {"epoch": 3}, {0: torch.zeros(3)}, {}):
        torch.save(content, path)
        refuse(path, "holds no state dict")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    refuse(path, "holds no PoolFormer (its first key is conv1.weight)")


def test_files_that_would_run_code_are_refused(s12: State, tmp_path: Path) -> None:
    path = tmp_path / "training.pth.tar"
    torch.save({"state_dict": s12, "args": argparse.Namespace(lr=1e-3)}, path)
    refuse(path, "refused", "argparse.Namespace", "save its state dict alone")


def test_a_name_with_a_hash_is_held_against_the_content(s12: State, tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save(s12, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in (f"poolformer-{digest[:8]}.pth", "poolformer-20220414.pth"):
        load_released(create_classifier("poolformer_s12"), path.rename(tmp_path / name))
        (tmp_path / name).rename(path)
    wrong = path.rename(tmp_path / "poolformer-b5aa2f49.pth")
    refuse(wrong, f"its SHA-256 begins with {digest[:8]}, but its name says b5aa2f49")


def test_find_released_lists_what_is_there(tmp_path: Path) -> None:
    assert find_released(tmp_path, RELEASED_CLASSIFIERS) == {}
    assert find_released(tmp_path / "none", RELEASED_SEGMENTERS) == {}
    for name in ("poolformer_m48.pth.tar", "poolformer_s12.pth.tar", "poolformer_s36.pth"):
        (tmp_path / name).touch()
    assert find_released(tmp_path, RELEASED_CLASSIFIERS) == {
        "poolformer_s12": tmp_path / "poolformer_s12.pth.tar",
        "poolformer_m48": tmp_path / "poolformer_m48.pth.tar",
    }
    other = tmp_path / "fpn_poolformer_s24_8x4_512x512_40k_ade20k_20300101_000000-0123abcd.pth"
    other.touch()
    assert find_released(tmp_path, RELEASED_SEGMENTERS) == {"poolformer_s24": other}
    (tmp_path / RELEASED_SEGMENTERS["poolformer_s24"]).touch()
    found = find_released(tmp_path, RELEASED_SEGMENTERS)
    assert found["poolformer_s24"].name.endswith("20220503_222049-394a7cf7.pth")
    (tmp_path / "fpn_poolformer_s24_ade20k_40k.pth").touch()
    found = find_released(tmp_path, RELEASED_SEGMENTERS)
    assert found["poolformer_s24"].name == "fpn_poolformer_s24_ade20k_40k.pth", "the authors' own comes first"
