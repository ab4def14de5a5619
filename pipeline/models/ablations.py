"""The paper's Table 5: PoolFormers with another token mixer, norm or activation, without residuals or channel MLP.

Layer by layer the official code's (models/metaformer.py and, for what it lacks, models/poolformer.py); names are those
of `pipeline.models.poolformer`, on whose blocks these are built. What no source settles stands in
pipeline/paper/disagreements.csv.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import GroupNorm1, LayerNorm2d
from timm.models import checkpoint_seq
from timm.models.metaformer import MetaFormerStage, Pooling, Stem
from torch import Tensor, nn

from pipeline.ablations import Ablation, Activation, Mixer, Norm, find_ablation, stage_sides
from pipeline.errors import UserError
from pipeline.models.block import PoolFormerBlock
from pipeline.models.poolformer import init_truncated_normal
from pipeline.models.released_weights import check_name_hash, find_state_dict, read_checkpoint, released_key
from pipeline.models.strict_loading import load_strict
from pipeline.variants import drop_path_rates, find_variant

RELEASED_ABLATIONS: Mapping[str, str] = MappingProxyType(
    {
        "identity": "metaformer_id_s12.pth.tar",
        **{name: f"metaformer_{name}_s12_224.pth.tar" for name in ("pppa", "ppaa", "pppf", "ppff")},
    }
)
"""The authors' files: github.com/sail-sg/poolformer, release v1.0."""
HEAD_CHANNELS = 32
"""Of attention: 10 heads at 320 channels, 16 at 512."""


class AblatedClassifier(nn.Module):
    """Stem, four stages, norm, mean over H and W, linear layer; the norm and the stages as the ablation says."""

    def __init__(
        self, variant: str, name: str, ablation: Ablation, num_classes: int, drop_path_rate: float, image_size: int
    ) -> None:
        super().__init__()
        self.variant, self.ablation = variant, name
        self.expects = image_size if ablation.has_fixed_size else None
        spec = find_variant(variant)
        self.stem = Stem(3, spec.widths[0])
        in_channels, stages = spec.widths[0], []
        rates_by_stage = drop_path_rates(spec.blocks, drop_path_rate)
        plan = zip(spec.widths, rates_by_stage, ablation.mixers, stage_sides(image_size), strict=True)
        for index, (width, rates, mixer, side) in enumerate(plan):
            embeds = index == ablation.embeds_positions_before
            stage = Stage(in_channels, width, side if embeds else None)
            stage.blocks = nn.Sequential(
                *(_block(ablation, width, side, mixer, rate, spec.layer_scale_init) for rate in rates)
            )
            stages.append(stage)
            in_channels = width
        self.stages = nn.Sequential(*stages)
        for module in self.stages.modules():
            # The channel MLP's convolutions and every linear layer; other convolutions keep PyTorch's default.
            if isinstance(module, PoolFormerBlock) and not isinstance(module.mlp, nn.Identity):
                init_truncated_normal(module.mlp.fc1)
                init_truncated_normal(module.mlp.fc2)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head = nn.ModuleDict(
            {"norm": norm_layer(ablation.norm)(spec.widths[-1]), "fc": nn.Linear(spec.widths[-1], num_classes)}
        )
        init_truncated_normal(self.head["fc"])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(B, 3, H, W)`, floating point, to logits `(B, num_classes)`.

        Raises UserError for images of another size than the model was made for, where its mixers are for one size.
        """
        if self.expects is not None and images.shape[-2:] != (self.expects, self.expects):
            height, width = images.shape[-2:]
            raise UserError(
                f"the ablation {self.ablation} was made for images of {self.expects} x {self.expects} pixels, not "
                f"{height} x {width}: it has weights for each position"
            )
        return self.head["fc"](self.head["norm"](self.stages(self.stem(images))).mean((-2, -1)))


class Stage(MetaFormerStage):
    """timm's stage, with a learnt position embedding `(1, C, H, W)` before its blocks if `side` is given."""

    def __init__(self, in_channels: int, width: int, side: int | None) -> None:
        super().__init__(in_channels, width, depth=0, token_mixer=Pooling, downsample_norm=None)
        self.position = None if side is None else nn.Parameter(torch.zeros(1, width, side, side))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.position is not None:
            x = x + self.position
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class BlockWithoutResiduals(PoolFormerBlock):
    """Each branch in the place of what it would be added to; LayerScale stays."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_scale1(self.drop_path1(self.token_mixer(self.norm1(x))))
        return self.layer_scale2(self.drop_path2(self.mlp(self.norm2(x))))


class BlockWithoutMlp(PoolFormerBlock):
    """The token mixer's branch alone: norm2, LayerScale and drop path of the other are gone with it."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        for name in ("norm2", "mlp", "layer_scale2", "drop_path2"):
            setattr(self, name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale1(self.drop_path1(self.token_mixer(self.norm1(x))))


class RandomMatrix(nn.Module):
    """Mixes the `side` x `side` tokens by a random matrix, each row a softmax over uniform numbers; never trained."""

    def __init__(self, side: int) -> None:
        super().__init__()
        tokens = side**2
        self.random_matrix: Tensor
        self.register_buffer("random_matrix", torch.rand(tokens, tokens).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        return nn.functional.linear(x.flatten(2), self.random_matrix).reshape(x.shape)


class SpatialFC(nn.Module):
    """One linear layer over the `side` x `side` positions, shared by the channels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.fc = nn.Linear(side**2, side**2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        return self.fc(x.flatten(2)).reshape(x.shape)


class Attention(nn.Module):
    """Multi-head self-attention over the positions, heads of 32 channels, no dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // HEAD_CHANNELS
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        # (B, N, 3, heads, channels of a head) to three of (B, heads, N, channels of a head).
        parts = self.qkv(tokens).unflatten(2, (3, self.heads, HEAD_CHANNELS)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        # Plain products: fvcore counts them, as it did for the paper; there are 196 tokens at most.
        weights = ((query * HEAD_CHANNELS**-0.5) @ key.transpose(-2, -1)).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return self.proj(mixed).transpose(1, 2).reshape(batch, channels, height, width)


def create_ablation(
    name: str,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    *,
    variant: str = "poolformer_s12",
    image_size: int = 224,
) -> AblatedClassifier:
    """A freshly initialised classifier of Table 5; the weights are a function of `torch.manual_seed`.

    `image_size` (pixels) matters to models of one image size alone: `random_matrix`, `pppa`, `ppaa`, `pppf`, `ppff`.

    Raises UserError for an unknown ablation or variant.
    """
    if drop_path_rate is None:
        drop_path_rate = find_variant(variant).drop_path_rate
    return AblatedClassifier(variant, name, find_ablation(name), num_classes, drop_path_rate, image_size)


def load_ablation(model: AblatedClassifier, path: Path | str) -> AblatedClassifier:
    """Load a file into a model of `create_ablation`, strictly, and return the model.

    Known are the authors' files (`metaformer_id_s12.pth.tar` and so on of the official repository's release v1.0, and
    others with the official code's names) and this project's checkpoints.

    Raises UserError, naming the file, if it is missing, damaged, or does not fit; the model then stays as it was.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing")
    check_name_hash(path)
    state = find_state_dict(read_checkpoint(path), path)
    keys = list(model.state_dict())
    names = {key: key for key in keys}
    if not names.keys() & state.keys():
        names = {_official_key(model, key): key for key in keys}
    file = RELEASED_ABLATIONS.get(model.ablation)
    expected = f"{file} or a" if file else "a"
    source = f"{path} (expected {expected} classifier {model.ablation} of {model.variant})"
    load_strict(model, state, names, source=source)
    return model


def _official_key(model: AblatedClassifier, key: str) -> str:
    """A key of ours in the official code's names, whose `network` has the position embedding as an entry of its own."""
    embeds = find_ablation(model.ablation).embeds_positions_before
    if embeds is None:
        return released_key(key)
    if key == f"stages.{embeds}.position":
        return f"network.{2 * embeds}.pos_embed"

    def shifted(match: re.Match[str]) -> str:
        place = int(match[1])
        return f"network.{place + (place >= 2 * embeds)}."

    return re.sub(r"^network\.(\d+)\.", shifted, released_key(key))


def _block(
    ablation: Ablation, width: int, side: int, mixer: Mixer, drop_path: float, layer_scale_init: float
) -> PoolFormerBlock:
    kind: type[PoolFormerBlock] = PoolFormerBlock
    if not ablation.residual:
        kind = BlockWithoutResiduals
    elif not ablation.mlp:
        kind = BlockWithoutMlp
    return kind(
        width,
        token_mixer=lambda dim, **_: token_mixer(mixer, dim, side),
        mlp_act=ACTIVATIONS[ablation.activation],
        mlp_bias=True,
        norm_layer=norm_layer(ablation.norm),
        drop_path=drop_path,
        layer_scale_init_value=layer_scale_init,
    )


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def token_mixer(name: Mixer, dim: int, side: int) -> nn.Module:
    """A module from `(B, dim, side, side)` to the same shape."""
    if name.startswith("pool"):
        return Pooling(int(name.removeprefix("pool")))
    makers: dict[str, Callable[[], nn.Module]] = {
        "identity": nn.Identity,
        "random_matrix": lambda: RandomMatrix(side),
        "depthwise_conv": lambda: nn.Conv2d(dim, dim, 3, 1, 1, groups=dim),
        "attention": lambda: Attention(dim),
        "spatial_fc": lambda: SpatialFC(side),
    }
    return makers[name]()


def norm_layer(name: Norm) -> Callable[..., nn.Module]:
    """What makes a norm over `(B, C, H, W)`, given C."""
    makers: dict[Norm, Callable[..., nn.Module]] = {
        "group_norm": GroupNorm1,
        "layer_norm": partial(LayerNorm2d, eps=1e-5),
        "batch_norm": nn.BatchNorm2d,
        "none": lambda dim, **_: nn.Identity(),
    }
    return makers[name]
