"""The models are the paper's: sizes, shapes, initialisation, drop path."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import DropPath, GroupNorm1, LayerNorm2d
from timm.models.metaformer import Attention, MetaFormerBlock, Pooling, Scale, SepConv, StarReLU
from torch import nn
from torch._dynamo.testing import CompileCounter

from pipeline.device import World
from pipeline.errors import UserError
from pipeline.metrics import count_parameters
from pipeline.models import VARIANTS, create_classifier, create_segmenter
from pipeline.models.block import PoolFormerBlock
from pipeline.train.adapt import adapt

WORLD = World(0, 1, 0, torch.device("cpu"), 1)
PARAMETERS = {  # classifier with 1000 classes, segmenter with 150
    "poolformer_s12": (11_915_176, 15_669_846),
    "poolformer_s24": (21_388_968, 25_143_638),
    "poolformer_s36": (30_862_760, 34_617_430),
    "poolformer_m36": (56_172_520, 59_778_006),
    "poolformer_m48": (73_473_448, 77_078_934),
}


def test_the_variants_are_the_papers_table() -> None:
    assert list(VARIANTS) == list(PARAMETERS)
    rates = {name: spec.drop_path_rate for name, spec in VARIANTS.items()}
    assert list(rates.values()) == [0.1, 0.1, 0.2, 0.3, 0.4]
    assert [spec.crop_fraction for spec in VARIANTS.values()] == [0.9, 0.9, 0.9, 0.95, 0.95]
    assert [sum(spec.blocks) for spec in VARIANTS.values()] == [12, 24, 36, 36, 48]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts_are_exact(variant: str) -> None:
    with torch.device("meta"):
        models = create_classifier(variant), create_segmenter(variant)
    assert tuple(map(count_parameters, models)) == PARAMETERS[variant]


def test_an_unknown_variant_names_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean poolformer_s12\?.*poolformer_m48"):
        create_classifier("PoolFormer-S12")
    with pytest.raises(UserError, match="valid: poolformer_s12"):
        create_segmenter("resnet50")


@pytest.mark.parametrize(("height", "width", "logits"), [(64, 96, (16, 24)), (224, 224, (56, 56)), (72, 50, (18, 12))])
def test_shapes(height: int, width: int, logits: tuple[int, int]) -> None:
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert create_classifier("poolformer_s12", 7)(images).shape == (2, 7)
        assert create_segmenter("poolformer_s12", 5)(images).shape == (2, 5, *logits)


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = create_segmenter("poolformer_s12")
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_classifier_is_initialised_as_the_official_code_does() -> None:
    torch.manual_seed(0)
    model = create_classifier("poolformer_s12")
    normal, uniform = 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_groups == 1
            assert layer.eps == 1e-5
            assert torch.all(layer.weight == 1)
            assert torch.all(layer.bias == 0)
        elif name.endswith((".mlp.fc1", ".mlp.fc2", "head.fc")):
            normal += 1
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert layer.weight.abs().max() > 3 * 0.02  # cut at 2, not at two deviations
            assert torch.all(layer.bias == 0)
        elif isinstance(layer, nn.Conv2d):
            # A patch embedding: PyTorch draws weight and bias evenly from +-1 / sqrt(fan in).
            uniform += 1
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
            assert layer.bias is not None
            assert 0.5 * bound < layer.bias.abs().max() <= bound
    assert (normal, uniform) == (2 * 12 + 1, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_scale_starts_at_the_variants_value(variant: str) -> None:
    model = create_classifier(variant)
    scales = [value for name, value in model.named_parameters() if "layer_scale" in name]
    assert len(scales) == 2 * sum(VARIANTS[variant].blocks)
    expected = 1e-6 if variant.endswith(("s36", "m36", "m48")) else 1e-5
    assert all(torch.equal(scale, torch.full_like(scale, expected)) for scale in scales)


def test_segmenter_is_initialised_as_mmsegs() -> None:
    torch.manual_seed(0)
    model = create_segmenter("poolformer_s12")
    for level, width in enumerate(VARIANTS["poolformer_s12"].widths):
        lateral = model.neck.inner_blocks[level][0]
        output = model.neck.layer_blocks[level][0]
        for conv, fans in ((lateral, width + 256), (output, 9 * 512)):
            bound = (6 / fans) ** 0.5  # Xavier uniform
            assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert torch.all(conv.bias == 0)
    head_convs = [
        layer.weight
        for layer in model.decode_head.scale_heads.modules()
        if isinstance(layer, nn.Conv2d) and layer.bias is None
    ]
    assert len(head_convs) == 1 + 1 + 2 + 3
    for weight in head_convs:  # Kaiming normal over the outputs: fan out is 9 x 128
        assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    conv_seg_bias = model.decode_head.conv_seg.bias
    assert conv_seg_bias is not None
    assert not conv_seg_bias.any()
    assert isinstance(model.decode_head.dropout, nn.Dropout2d)  # mmseg drops whole channels
    assert model.decode_head.dropout.p == 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_grows_linearly_over_all_blocks(variant: str) -> None:
    with torch.device("meta"):
        model = create_classifier(variant)
    blocks = [block for block in model.modules() if isinstance(block, MetaFormerBlock)]
    expected = [VARIANTS[variant].drop_path_rate * block / (len(blocks) - 1) for block in range(len(blocks))]
    for branch in ("drop_path1", "drop_path2"):
        paths = [getattr(block, branch) for block in blocks]
        assert isinstance(paths[0], nn.Identity)
        assert [path.drop_prob for path in paths[1:]] == pytest.approx(expected[1:], abs=1e-12)


def test_drop_path_can_be_set_and_segmenters_have_none() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [layer.drop_prob for layer in model.modules() if isinstance(layer, DropPath)]

    assert rates(create_classifier("poolformer_s12", drop_path_rate=0.0)) == []
    assert max(rates(create_classifier("poolformer_s12", drop_path_rate=0.3))) == 0.3
    assert rates(create_segmenter("poolformer_s12")) == []


def test_backbone_of_a_segmenter_is_the_classifiers() -> None:
    classifier = create_classifier("poolformer_s12", num_classes=10).eval()
    segmenter = create_segmenter("poolformer_s12").eval()
    segmenter.load_backbone(classifier.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(
            classifier.forward_features(images),
            segmenter.backbone.forward_features(images),
            strict=True,
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_backbone_that_does_not_fit_changes_nothing() -> None:
    segmenter = create_segmenter("poolformer_s12")
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    with pytest.raises(UserError, match=r"classifier's weights for poolformer_s12.*96x3x7x7"):
        segmenter.load_backbone(create_classifier("poolformer_m36").state_dict())
    incomplete = create_classifier("poolformer_s12").state_dict()
    del incomplete["stages.2.blocks.5.mlp.fc2.bias"]
    with pytest.raises(UserError, match=r"1 key missing \(stages.2.blocks.5.mlp.fc2.bias\)"):
        segmenter.load_backbone(incomplete)
    assert all(torch.equal(before[name], value) for name, value in segmenter.state_dict().items())


@pytest.mark.parametrize("create", [create_classifier, create_segmenter])
def test_channels_last_bfloat16_and_graph_capture_agree_with_plain(
    create: Callable[[str], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = create("poolformer_s12").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        captured = torch.compile(model, backend="eager", fullgraph=True)(images)
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        last = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images)
    torch.testing.assert_close(captured, plain)
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, atol=0.05 * plain.abs().max().item(), rtol=0)


def test_every_parameter_gets_a_gradient() -> None:
    for model in (create_classifier("poolformer_s12", 10), create_segmenter("poolformer_s12", 10)):
        model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("variant", ["poolformer_s12", "poolformer_s24"])
def test_blocks_compile_without_a_break_and_share_their_code(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = create_classifier(variant, 10)
    _, dropout = adapt(model, WORLD, seed=0, activation_checkpointing=False, compiles=True)
    for step in range(3):
        dropout.draw(step, 0, 2, WORLD.device)
        dropout.select(0, 2)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert counter.frame_count == 5  # one for each stage, and one for the first block, which has no drop path


@pytest.mark.parametrize(("size", "threads"), [((3, 3, 64, 96), 2), ((2, 3, 72, 50), 1), ((1, 3, 33, 33), 3)])
def test_fused_inference_is_as_near_to_float64_as_timms_forward(size: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(0)
    model = create_classifier("poolformer_s12", 7).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name or "norm" in name:
            nn.init.normal_(parameter, mean=0.7, std=0.4)
    images = torch.randn(size) + 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(images).detach().double()  # with gradients on: timm's forward
            with torch.inference_mode():
                fused = model(images).double()
    finally:
        torch.set_num_threads(before)
    exact = model.double()(images.double()).detach()
    assert not torch.equal(fused, plain)
    assert (fused - exact).abs().max() < 1.5 * (plain - exact).abs().max()


class WithBias(GroupNorm1):
    """A norm that only looks like the paper's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("token_mixer", nn.Identity()),
        ("token_mixer", SepConv(64)),
        ("token_mixer", Pooling(5)),
        ("norm1", LayerNorm2d(64)),
        ("norm1", nn.GroupNorm(2, 64)),
        ("norm2", nn.BatchNorm2d(64)),
        ("norm2", GroupNorm1(64, eps=1e-2)),
        ("norm2", WithBias(64)),
        ("mlp.act", nn.ReLU()),
        ("mlp.act", StarReLU()),
        ("mlp.act", nn.GELU("tanh")),
        ("mlp.norm", LayerNorm2d(256)),
        ("mlp.fc2", nn.Conv2d(256, 64, 1, bias=False)),
        ("layer_scale1", nn.Identity()),
        ("res_scale2", Scale(64, 0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_block_of_other_parts_runs_timms_forward(name: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    block = PoolFormerBlock(
        64, token_mixer=Pooling, mlp_act=nn.GELU, mlp_bias=True, norm_layer=GroupNorm1, layer_scale_init_value=0.5
    ).eval()
    x = torch.randn(2, 64, 8, 10)

    @torch.inference_mode()
    @torch.autocast("cpu", torch.bfloat16)
    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        return block(x), MetaFormerBlock.forward(block, x)

    ours, timms = outputs()
    assert not torch.equal(ours, timms), "fused"
    block.set_submodule(name, layer.eval())
    ours, timms = outputs()
    assert torch.equal(ours, timms)


def test_a_block_of_attention_is_timms() -> None:
    block = PoolFormerBlock(64, token_mixer=Attention, mlp_act=nn.GELU, norm_layer=nn.LayerNorm, use_nchw=False).eval()
    x = torch.randn(2, 80, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), MetaFormerBlock.forward(block, x))
