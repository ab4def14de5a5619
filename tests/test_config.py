"""Parameters: what a wrong one says, and that every experiment composes."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from pydantic import ValidationError

from pipeline import cluster
from pipeline.cluster import Profile, usable_nodes
from pipeline.config import VARIANT_NAMES as VARIANTS
from pipeline.config import Params, check_variant, load_params, validate
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.paper.tables import recipe_differences


@pytest.fixture
def demo() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize("scale", [path.stem for path in sorted((ROOT / "experiments/scale").glob("*.yaml"))])
def test_every_scale_composes(scale: str, in_checkout: Path) -> None:
    compose([f"scale={scale}"])
    assert load_params(Path("params.yaml")).scale == scale


def test_the_committed_parameters_are_the_demo(in_checkout: Path) -> None:
    committed = Path("params.yaml").read_text()
    compose(["scale=demo"])
    assert Path("params.yaml").read_text() == committed


@pytest.mark.parametrize(
    ("overrides", "size", "rate", "differences"),
    [([], 4096, 4e-3, []), (["batch=official_1024"], 1024, 1e-3, ["classification.global_batch_size"])],
)
def test_the_papers_batch_is_the_default_and_the_readmes_is_named(
    overrides: list[str], size: int, rate: float, differences: list[str], in_checkout: Path
) -> None:
    compose(["scale=paper", *overrides])
    params = load_params(Path("params.yaml"))
    for variant in VARIANTS:
        recipe = params.classification.recipe_for(variant)
        assert recipe.global_batch_size == size
        assert recipe.learning_rate == pytest.approx(rate)
        assert recipe_differences("classification", variant, recipe.model_dump()) == differences
        assert recipe_differences("segmentation", variant, params.segmentation.recipe_for(variant).model_dump()) == []


def test_a_batch_that_no_file_has_is_named(in_checkout: Path) -> None:
    with pytest.raises(UserError, match="official_1024"):
        compose(["scale=paper", "batch=offical"])
    with pytest.raises(UserError, match="batch"):
        compose(["scale=paper", "batch=4096"])


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("imagenet", "sorce"), "digits", "did you mean source?"),
        (("classification", "recipe", "learning_rate_per_1024"), "5e-5", "5.0e-5, not 5e-5"),
        (("classification", "recipe", "epoch"), 3, "did you mean epochs?"),
        (("classification", "train"), ["poolformer_s13"], "poolformer_s13"),
        (("classification", "recipe", "warmup_epochs"), 99, "must be below epochs"),
        (("imagenet", "storage"), "orginal", "'original' or 'compact'"),
        (("seeds",), [], "seeds"),
        (("test_sets", "names"), ["v2"], "imagenet.num_classes is 10"),
        (("classification", "train"), [], "add it"),
    ],
)
def test_a_wrong_parameter_is_one_clear_line(demo: dict, path: tuple[str, ...], value: object, says: str) -> None:
    owner = demo
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    with pytest.raises(UserError) as caught:
        validate(Params, demo, "params.yaml")
    message = str(caught.value)
    assert says in message
    assert message.startswith("params.yaml") or "variants." in message
    assert "\n" not in message


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean poolformer_s24\?.*poolformer_m48"):
        check_variant("poolformer_s21")


def test_compose_refuses_unknown_keys_and_writes_nothing(in_checkout: Path) -> None:
    before = Path("params.yaml").read_text()
    for override, says in (
        ("clasification.recipe.epochs=3", "did you mean classification?"),
        ("classification.recipe.epoch=3", "epoch"),
        ("scale=dmo", "demo"),
    ):
        with pytest.raises(UserError, match=says):
            compose([override])
    assert Path("params.yaml").read_text() == before


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "expected"),
    [
        (1024, 8, 128, (128, 128, 1)),
        (4096, 8, 128, (512, 128, 4)),
        (1024, 1, 100, (1024, 64, 16)),
        (32, 8, 128, (4, 4, 1)),
    ],
)
def test_split(batch: int, ranks: int, most: int, expected: tuple[int, int, int]) -> None:
    split = cluster.split(batch, ranks, most)
    assert (split.per_rank, split.micro_batch_size, split.accumulation) == expected


def test_a_range_of_nodes_uses_those_over_which_the_batch_can_be_spread() -> None:
    profile = Profile(kind="slurm", nodes="2..8", gpus_per_node=8, cpus_per_task=1)
    assert profile.node_counts == range(2, 9)
    assert profile.world_size == 64
    assert usable_nodes(profile, 4096) == [2, 4, 8]
    assert usable_nodes(profile, 4096, accumulates=False) == [4, 8], "128 images fit on a device"
    with pytest.raises(UserError, match="a global batch of 100 cannot be spread evenly over 64 ranks"):
        usable_nodes(profile, 100)
    for wrong in ("2-8", "8..2", "0..2", 0, "many"):
        with pytest.raises(ValidationError, match=r"as 2\.\.8"):
            Profile(kind="slurm", nodes=wrong, gpus_per_node=8, cpus_per_task=1)
    with pytest.raises(ValidationError, match="kind local has one node"):
        Profile(kind="local", nodes="1..2")


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be spread evenly over 3 ranks"):
        cluster.split(32, 3, 128)


def test_batch_norm_refuses_accumulation_and_says_which_layout_fits() -> None:
    assert cluster.split(32, 2, 16, accumulates=False).accumulation == 1
    with pytest.raises(UserError, match=r"share of 32 images .* profile of 4 ranks, or max_images_per_device: 32"):
        cluster.split(32, 1, 12, accumulates=False)


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "expected"), [(1024, 8, 128, (64, 2)), (96, 1, 12, (6, 16)), (6, 2, 3, (1, 3))]
)
def test_half_a_micro_batch(batch: int, ranks: int, most: int, expected: tuple[int, int]) -> None:
    half = cluster.split(batch, ranks, most).halved()
    assert half is not None
    assert (half.micro_batch_size, half.accumulation) == expected
    assert cluster.split(batch, batch, 1).halved() is None
    assert cluster.split(batch, ranks, batch, accumulates=False).halved() is None


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda path: path.name)
def test_every_cluster_profile_is_valid(path: Path) -> None:
    cluster.load_profile(path)


def test_profile_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml is missing"):
        cluster.load_profile(tmp_path / "nowhere.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("kind: slurm\npartion: main\ngpus_per_node: 8\ncpus_per_task: 8\n")
    with pytest.raises(UserError, match=r"wrong\.yaml.*did you mean partition\?"):
        cluster.load_profile(wrong)
