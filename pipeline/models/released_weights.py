"""Reading weights that others released, and our own checkpoints, strictly.

Four layouts of the same values are known: the authors' (`poolformer_s12.pth.tar` of the official
repository's release v1.0), timm's (whose names ours are), mmsegmentation's FPN checkpoints, and our
own checkpoints (a dict whose `model` is the state dict).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.poolformer import PoolFormerClassifier, create_classifier
from pipeline.models.semantic_fpn import SemanticFPN
from pipeline.models.strict_loading import load_strict
from pipeline.variants import VARIANTS

ModelT = TypeVar("ModelT", bound=PoolFormerClassifier | SemanticFPN)

RELEASED_SEGMENTERS: Mapping[str, str] = {
    variant: f"fpn_{variant}_8x4_512x512_40k_ade20k_{suffix}.pth"
    for variant, suffix in {
        "poolformer_s12": "20220501_115154-b5aa2f49",
        "poolformer_s24": "20220503_222049-394a7cf7",
        "poolformer_s36": "20220501_151122-b47e607d",
        "poolformer_m36": "20220501_164230-3dc83921",
        "poolformer_m48": "20220504_003923-64168d3b",
    }.items()
}
"""mmsegmentation's files (its configs/poolformer page links them): date, time, SHA-256 prefix."""

AUTHORS_SEGMENTERS: Mapping[str, str] = {
    name: f"fpn_{variant}_ade20k_40k.pth" for variant, name in RELEASED_SEGMENTERS.items()
}
"""By mmsegmentation's name the authors' own file, which Table 4 was measured on. They share it without a name that is
known here (the official repository's segmentation/README.md links it); this is their configuration's."""

RELEASED_CLASSIFIERS: Mapping[str, str] = {variant: f"{variant}.pth.tar" for variant in RELEASED_SEGMENTERS}
"""The authors' files: github.com/sail-sg/poolformer, release v1.0."""


def find_released(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Variant -> file, for those of RELEASED_CLASSIFIERS or RELEASED_SEGMENTERS in `folder`.

    The authors' own segmenter comes first. A segmenter's file of another date and hash is taken if the listed one is
    not there.
    """
    found = {}
    for variant, name in names.items():
        if (own := folder / AUTHORS_SEGMENTERS.get(name, name)).exists():
            found[variant] = own
            continue
        pattern = re.sub(r"_\d{8}_\d{6}-[0-9a-f]{8}", "_*", name)
        files = sorted(folder.glob(pattern), key=lambda path: (path.name == name, path.name))
        if files:
            found[variant] = files[-1]
    return found


def load_released(model: ModelT, path: Path | str) -> ModelT:
    """Load a file into a model of `create_classifier` or `create_segmenter`, and return the model.

    A classifier takes the authors' `.pth.tar`, timm's `.safetensors` and `.pth`, and our own checkpoints; a segmenter
    takes mmseg's FPN checkpoints and our own. Every key has to be there, none may be left over, every shape has to fit;
    otherwise the model stays as it was. Values are converted to the model's type and device.

    Raises UserError, naming the file, if it is missing, damaged, not such a file, does not fit, or
    its SHA-256 does not begin as its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected_file(model)}")
    check_name_hash(path)
    state = find_state_dict(read_checkpoint(path), path)
    own_layout = any(key.removeprefix("backbone.").startswith("stem.") for key in state)
    names = {key if own_layout else released_key(key): key for key in model.state_dict()}
    misfit = describe_other_model(model, state, names)
    if misfit:
        raise UserError(f"{path} holds {misfit}; expected {expected_file(model)}")
    load_strict(model, state, names, source=f"{path} (expected {expected_file(model)})")
    return model


def load_start(model: PoolFormerClassifier, path: Path | str) -> int:
    """Load a classifier's file into a model that is to be trained on from there; returns how many classes the file has.

    As `load_released`, but where the model has another number of classes, its last layer stays as it was.

    Raises UserError as `load_released` does.
    """
    path = Path(path)
    state = find_state_dict(read_checkpoint(path), path) if path.is_file() else {}
    own = model.state_dict()
    classes = next((len(state[key]) for key in ("head.bias", "head.fc.bias") if key in state), len(own["head.fc.bias"]))
    source = load_released(create_classifier(model.variant, classes), path).state_dict()
    is_new = len(own["head.fc.bias"]) != classes
    model.load_state_dict(source | {key: own[key] for key in own if is_new and key.startswith("head.fc.")})
    return classes


def expected_file(model: PoolFormerClassifier | SemanticFPN) -> str:
    """What the user should have given, for the end of an error."""
    variant = model.variant
    own = f"a {variant} {'segmenter' if isinstance(model, SemanticFPN) else 'classifier'} of this project"
    if variant not in RELEASED_CLASSIFIERS:
        return own
    if isinstance(model, SemanticFPN):
        return f"{RELEASED_SEGMENTERS[variant]} or {own}"
    return f"{RELEASED_CLASSIFIERS[variant]}, timm's {variant}, or {own}"


def check_name_hash(path: Path) -> None:
    """Hold the SHA-256 against the eight digits that a name such as `x-b5aa2f49.pth` ends in."""
    match = re.search(r"-([0-9a-f]{8})\.(pth|safetensors)$", path.name)
    if match is None or match[1].isdecimal():  # eight decimals are a date
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(match[1]):
        raise UserError(
            f"{path}: its SHA-256 begins with {digest[:8]}, but its name says {match[1]}: the file "
            "is damaged or incomplete, fetch it again"
        )


def read_checkpoint(path: Path) -> Any:
    """The file's content, tensors on the CPU. Nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can fail at any point of unpickling
        message = str(error)
        refused = re.search(r"unsupported global:? GLOBAL (\S+)", message, re.IGNORECASE)
        if refused:
            raise UserError(
                f"{path}: refused, because reading it would run {refused[1]}, and only tensors and "
                "plain values are read; save its state dict alone from a program that trusts it"
            ) from None
        reason = message.splitlines()[0] if message and "weights_only" not in message else "unreadable"
        raise UserError(f"{path}: cut short, or not a checkpoint ({reason}); fetch it again") from None


def find_state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The tensors by name: the content itself, or what it has under `state_dict` or `model`."""
    if isinstance(content, Mapping):
        content = content.get("state_dict", content.get("model", content))
    if (
        isinstance(content, Mapping)
        and content
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        return content
    raise UserError(f"{path}: holds no state dict (tensors by name), nor one under 'state_dict' or 'model'")


def describe_other_model(
    model: PoolFormerClassifier | SemanticFPN, state: Mapping[str, Tensor], names: Mapping[str, str]
) -> str:
    """What `state` is, if it plainly is another model than `model`; else empty."""
    blocks: Counter[int] = Counter()
    widths: dict[int, int] = {}
    for key, value in state.items():
        match = re.search(r"(?:stages\.(\d)\.blocks|network\.(\d))\.\d+\.norm1\.weight$", key)
        if match:
            stage = int(match[1]) if match[1] else int(match[2]) // 2
            blocks[stage] += 1
            widths[stage] = value.numel()
    if not blocks:
        return f"no PoolFormer (its first key is {next(iter(state))})"
    found = [(blocks[stage], widths.get(stage)) for stage in range(4)]
    fits = [variant for variant, spec in VARIANTS.items() if found == list(zip(spec.blocks, spec.widths, strict=True))]
    if fits and model.variant not in fits:
        return f"{fits[0]}, and the model is {model.variant}"

    has_head = any(key.startswith("decode_head.") for key in state)
    if isinstance(model, SemanticFPN) and not has_head:
        return "a classifier, and the model is a segmenter (which takes one by load_backbone)"
    if isinstance(model, PoolFormerClassifier) and has_head:
        return "a segmenter, and the model is a classifier"

    for key, name in names.items():
        if name in ("head.fc.bias", "decode_head.conv_seg.bias") and key in state:
            held, wanted = state[key].numel(), model.state_dict()[name].numel()
            if held != wanted:
                return f"a head of {held} classes, and the model has {wanted}"
    return ""


def released_key(key: str) -> str:
    """One of our keys as the authors' files (classifiers) and mmseg's (segmenters) have it.

    Their `network` alternates between stages, at even places, and downsampling, at odd ones.
    """
    key = key.replace("stem.conv", "patch_embed.proj")
    key = re.sub(r"stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", key)
    key = re.sub(r"stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", key)
    key = re.sub(r"layer_scale(\d)\.scale", r"layer_scale_\1", key)
    key = re.sub(r"backbone\.norms\.(\d)", lambda m: f"backbone.norm{2 * int(m[1])}", key)
    key = re.sub(r"neck\.inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv", key)
    key = re.sub(r"neck\.layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv", key)
    return re.sub(r"^head\.fc", "head", re.sub(r"^head\.norm", "norm", key))
