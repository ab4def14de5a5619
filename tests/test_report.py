"""The report: the same numbers in every format, nothing compared that cannot be, the same bytes every time."""

import base64
import hashlib
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import skip
from PIL import Image
from rich.console import Console

from pipeline import paper
from pipeline.catalogue import COMPARISONS
from pipeline.config import VARIANT_NAMES
from pipeline.report import print_tables, write_reports
from pipeline.report.background import Background, Provenance, class_rows, pictures
from pipeline.report.formats import NOTHING

EMPTY = pd.DataFrame()
REASON = "these images are handwritten digits, not ImageNet-1K and ADE20K"
FORMATS = ("csv", "md", "html", "tex")
SECTIONS = {"table2_imagenet": "classification", "table4_ade20k": "segmentation", "table5_ablations": "ablations"}


def classifier_runs(seeds: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": variant,
            "seed": seed,
            "top1": top1,
            "top5": 95.5,
            "loss": 0.9,
            "images": 50_000,
            "parameters": paper.numbers("variants", _base(variant))["parameters"],
            "macs_g": paper.numbers("variants", _base(variant))["macs"],
            "train_images_per_s": 1000.0,
        }
        for variant, values in seeds.items()
        for seed, top1 in enumerate(values)
    )


def _base(variant: str) -> str:
    """The model that a row of Table 5 is a change of."""
    return paper.label(variant if variant in VARIANT_NAMES else "poolformer_s12")


def segmenter_runs(seeds: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": variant,
            "seed": seed,
            "miou": miou - 0.4,
            "miou_aligned": miou,
            "miou_ms_flip": float("nan"),
            "aacc": 79.0,
            "images": 2_000,
            "parameters": paper.numbers("variants", paper.label(variant))["segmenter_parameters"],
            "train_memory_gb": 4.0,
            "images_per_s": 20.0,
        }
        for variant, values in seeds.items()
        for seed, miou in enumerate(values)
    )


def report(folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "classification": classifier_runs(
            {
                "poolformer_s12": [77.1, 77.2, 77.36],
                "poolformer_s24": [79.0],
                "poolformer_s36": [80.0, 80.1],
                "poolformer_m36": [82.0],
            }
        ),
        "segmentation": segmenter_runs({"poolformer_s12": [36.5, 36.9], "poolformer_s24": [40.1]}),
        "ablations": EMPTY,
        "released_ablations": EMPTY,
        "released_classification": EMPTY,
        "released_segmentation": EMPTY,
        "comparable": True,
        "reason": "",
        "recipe_differences": {"poolformer_m36": ["classification.epochs", "segmentation.iterations"]},
        "settings": {"Git commit": "0123abc", "Seeds": "0, 1, 2"},
    }
    arguments |= changes
    for name in ("", "released_"):
        arguments[name.strip("_") or "runs"] = {
            table: arguments.pop(f"{name}{section}") for table, section in SECTIONS.items()
        }
    write_reports(folder, **arguments)
    return folder


def released_files(task: str, missing: str) -> pd.DataFrame:
    rows = []
    for variant in VARIANT_NAMES:
        row: dict[str, Any] = {"variant": variant, "file": paper.released_file(task, variant), "status": "missing"}
        if variant != missing:
            published = paper.numbers("released_imagenet", paper.label(variant))
            mmseg = paper.numbers("mmseg_ade20k", paper.label(variant))
            row |= {"status": "measured"}
            row |= (
                {"top1": published["top1"], "top5": published["top5"]}
                if task == "classification"
                else {"miou": mmseg["mmseg_miou"], "miou_aligned": mmseg["mmseg_miou_aligned"]}
            )
        rows.append(row)
    return pd.DataFrame(rows)


def csv(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv").set_index("model")


class TableReader(HTMLParser):
    """The cells of the table with one id, and every address that the page would load."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table, self.inside, self.cell = table, False, False
        self.rows: list[list[str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [f"{tag} {values[key]}" for key in ("src", "href", "xlink:href", "data") if values.get(key)]
        if tag == "table":
            self.inside = values.get("id") == self.table
        if tag == "tr" and self.inside:
            self.rows.append([])
        if tag in ("td", "th") and self.inside:
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")
        self.inside = self.inside and tag != "table"

    def handle_data(self, data: str) -> None:
        if self.inside and self.cell:
            self.rows[-1][-1] += data


def page(path: Path, table: str) -> TableReader:
    reader = TableReader(table)
    reader.feed(path.read_text())
    return reader


def cells(folder: Path, name: str, kind: str) -> dict[str, list[str]]:
    """Each model's numbers as one format writes them, in the order of its columns."""
    if kind == "html":
        rows = page(folder / f"{name}.html", name).rows
    elif kind == "md":
        rows = [line.strip("|").split("|") for line in (folder / f"{name}.md").read_text().splitlines()]
    else:
        text = (folder / f"{name}.tex").read_text().replace(r"$\pm$", "±").replace("--", NOTHING).replace(r"\_", "_")
        rows = [line.removesuffix(r"\\").split("&") for line in text.splitlines()]
    number = re.compile(r"[+±-]?\d+(?:\.\d+)?(?: ± \d+\.\d+)?|" + NOTHING)
    (comparison,) = [each for each in COMPARISONS if each.name == name]
    models = {paper.label(model) for model in comparison.names}
    return {
        row[0].strip(): [cell.strip() for cell in row[1:] if number.fullmatch(cell.strip())]
        for row in rows
        if row[0].strip() in models
    }


def test_all_files_are_written_and_one_row_for_each_model(tmp_path: Path) -> None:
    report(tmp_path)
    names = {f"{comparison.name}.{kind}" for comparison in COMPARISONS for kind in FORMATS}
    figures = [figure.name for comparison in COMPARISONS for figure in comparison.figures]
    names |= {f"{name}.{kind}" for name in figures for kind in ("svg", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"index.html", "claims.csv", "paired_tests.csv"}
    contract = {"params_m", "paper", "released", "measured", "seeds", "difference", "verdict"}
    for comparison in COMPARISONS:
        table = csv(tmp_path, comparison.name)
        assert list(table.index) == list(comparison.names)
        assert contract | (set() if comparison.name == "table4_ade20k" else {"macs_g"}) <= set(table.columns)


def test_numbers_and_verdicts_of_table_2(tmp_path: Path) -> None:
    table = csv(report(tmp_path), "table2_imagenet")
    assert table["paper"].tolist() == [77.2, 80.3, 81.4, 82.1, 82.5]
    assert table["seeds"].tolist() == [3, 1, 2, 1, 0]
    s12 = table.loc["poolformer_s12"]
    assert s12["measured"] == pytest.approx(77.22)
    assert s12["sd"] == pytest.approx(0.131149, abs=1e-6)
    assert s12["difference"] == pytest.approx(0.02)
    assert s12["params_m"] == pytest.approx(11.915176)
    assert table["verdict"].tolist() == [
        "within",
        "inconclusive: one seed",
        "outside",
        "within: not the paper's recipe: classification.epochs",
        "missing",
    ]


def test_table_4_has_mmsegs_columns_and_both_resizes(tmp_path: Path) -> None:
    table = csv(report(tmp_path), "table4_ade20k")
    s12 = table.loc["poolformer_s12"]
    assert s12["measured"] == pytest.approx(36.7)
    assert s12["measured_miou"] == pytest.approx(36.3)
    assert (s12["mmseg_miou"], s12["mmseg_miou_aligned"]) == (36.68, 37.07)
    assert table["measured_miou_ms_flip"].isna().all()
    assert table.loc["poolformer_s24", "params_m"] == pytest.approx(25.143638)
    assert "23.2 M" in (tmp_path / "table4_ade20k.md").read_text()


@pytest.mark.parametrize("name", ["table2_imagenet", "table4_ade20k"])
def test_every_format_has_the_same_numbers(tmp_path: Path, name: str) -> None:
    report(tmp_path, released_classification=released_files("classification", "poolformer_m48"))
    read = {kind: cells(tmp_path, name, kind) for kind in ("md", "html", "tex")}
    assert read["md"] == read["html"] == read["tex"]
    for variant, row in csv(tmp_path, name).iterrows():
        written = read["md"][paper.label(str(variant))]
        measured = f"{row['measured']:.2f}" + (f" ± {row['sd']:.2f}" if pd.notna(row["sd"]) else "")
        assert (measured if row["seeds"] else NOTHING) in written
        assert f"{row['paper']:.1f}" in written
        if pd.notna(row["difference"]):
            assert f"{row['difference']:+.2f}" in written
    index = page(tmp_path / "index.html", name).rows
    assert index == page(tmp_path / f"{name}.html", name).rows


def test_the_demo_is_never_compared(tmp_path: Path) -> None:
    report(tmp_path, comparable=False, reason=REASON)
    for name in ("table2_imagenet", "table4_ade20k"):
        table = csv(tmp_path, name)
        trained = table[table["seeds"] > 0]
        assert (trained["verdict"] == f"not comparable: {REASON}").all()
        assert table["difference"].isna().all()
        assert table["tolerance"].isna().all()
        for kind in ("md", "html", "tex"):
            assert REASON in (tmp_path / f"{name}.{kind}").read_text()
    index = (tmp_path / "index.html").read_text()
    assert "cannot be compared" in index
    assert "≠ not comparable" in " ".join(
        " ".join(row) for row in page(tmp_path / "index.html", "table2_imagenet").rows
    )
    assert "not comparable" in (tmp_path / "accuracy_macs.svg").read_text()


def test_released_weights_fill_their_column_and_a_missing_file_is_named(tmp_path: Path) -> None:
    report(
        tmp_path,
        classification=EMPTY,
        segmentation=EMPTY,
        recipe_differences={},
        released_classification=released_files("classification", "poolformer_m48"),
        released_segmentation=released_files("segmentation", "poolformer_s12"),
    )
    table2, table4 = csv(tmp_path, "table2_imagenet"), csv(tmp_path, "table4_ade20k")
    assert table2["released"].tolist()[:4] == [77.230, 80.316, 81.416, 82.110]
    assert table2["verdict"].tolist() == ["within: released weights"] * 4 + ["missing: poolformer_m48.pth.tar"]
    assert table2["measured"].isna().all()
    assert table4.loc["poolformer_s24", "released_published"] == 40.36, "mmseg's file is held against mmseg's number"
    assert table4["verdict"].str.startswith("missing: fpn_poolformer_s12_8x4").tolist() == [True] + [False] * 4


def test_the_authors_checkpoint_is_held_against_its_own_measurement(tmp_path: Path) -> None:
    file = pd.DataFrame(
        [
            {
                "variant": "poolformer_s12",
                "file": "iter_40000.pth",
                "status": "measured",
                "miou": 36.9,
                "miou_aligned": 37.4,
            }
        ]
    )
    report(tmp_path, segmentation=EMPTY, released_segmentation=file)
    row = csv(tmp_path, "table4_ade20k").loc["poolformer_s12"]
    assert row["released_published"] == 37.15
    assert row["released_difference"] == pytest.approx(0.25)
    assert row["verdict"] == "outside: released weights"
    assert "iter_40000.pth: mIoU 37.400 against 37.150 published" in (tmp_path / "table4_ade20k.md").read_text()


def test_a_seed_that_is_not_finite_breaks_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    report(tmp_path, classification=classifier_runs({"poolformer_s12": [77.2, float("nan")]}))
    row = csv(tmp_path, "table2_imagenet").loc["poolformer_s12"]
    assert row["verdict"] == "inconclusive: 1 of 2 seeds not finite"
    assert pd.isna(row["measured"])


def test_nothing_at_all_still_makes_a_report(tmp_path: Path) -> None:
    report(tmp_path, classification=EMPTY, segmentation=EMPTY, recipe_differences={})
    assert csv(tmp_path, "table2_imagenet")["verdict"].tolist() == ["missing"] * 5


def test_the_page_stands_alone(tmp_path: Path) -> None:
    report(tmp_path, curves=curves())
    for path in tmp_path.glob("*.html"):
        reader = page(path, "table2_imagenet")
        assert all(load.split()[1].startswith("#") for load in reader.loads), reader.loads
        text = path.read_text()
        assert "<script" not in text
        assert "@import" not in text
        assert not re.findall(r"url\((?!#)", text)
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
    index = (tmp_path / "index.html").read_text()
    for word in ("0123abc", "Learning curves", "RSB-ResNet-152", "Every seed", "RandAugment"):
        assert word in index


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    report(tmp_path, comparable=False, reason="a < b & <script>alert(1)</script>", settings={"<b>": "<i>&"})
    assert "<script" not in (tmp_path / "index.html").read_text()
    assert r"a < b \&" in (tmp_path / "table2_imagenet.tex").read_text()


def curves() -> pd.DataFrame:
    return pd.DataFrame(
        [
            (variant, seed, "classification", epoch, metric, float(epoch + seed))
            for variant in VARIANT_NAMES[:2]
            for seed in (0, 1)
            for metric in ("loss", "top1")
            for epoch in range(5)
        ],
        columns=["variant", "seed", "task", "step", "metric", "value"],
    )


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in report(folder, curves=curves()).iterdir()}
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert digests[0] == digests[1]
    assert {"curves.svg", "curves.png"} <= set(digests[0])


def test_figures_show_the_paper_and_what_was_measured(tmp_path: Path) -> None:
    report(tmp_path, released_classification=released_files("classification", "poolformer_m48"))
    svg = (tmp_path / "accuracy_macs.svg").read_text()
    for text in ("RSB-ResNet", "PoolFormer, paper", "trained here", "released weights, measured here", "MACs, G"):
        assert f">{text}</text>" in svg
    assert (tmp_path / "accuracy_macs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("comparable", [True, False])
def test_tables_fit_a_terminal(tmp_path: Path, comparable: bool) -> None:
    """Every table, wherever its verdict stands; of verdicts of a line each, the reason stands below the table."""
    ablations = classifier_runs({"poolformer_s12": [77.1], "identity": [74.2, 74.3], "layer_norm": [76.2]})
    report(tmp_path, ablations=ablations, comparable=comparable, reason="" if comparable else REASON)
    stream = io.StringIO()
    print_tables(tmp_path, Console(file=stream, width=80))
    text = stream.getvalue()
    words = ["PoolFormer-S12", "77.22 ± 0.13", "Table 4", "Table 5", "layer_norm", "74.25 ± 0.07", "76.20"]
    words += ["inconclusive", "not the paper's recipe", "one seed"] if comparable else [f"not comparable: {REASON}"]
    for word in words:
        assert word in text
    assert "…" not in text


def test_latex_is_balanced(tmp_path: Path) -> None:
    for path in report(tmp_path).glob("*.tex"):
        text = path.read_text()
        assert text.count("{") == text.count("}")
        for environment in ("table*", "tabular"):
            assert text.count(f"\\begin{{{environment}}}") == text.count(f"\\end{{{environment}}}") == 1
        rows = re.findall(r"^[\w-].* & .*\\\\$", text, flags=re.MULTILINE)
        assert len(rows) == 1 + {"table5_ablations": 18, "table7_longer_training": 8}.get(path.stem, 5)
        assert len({row.count("&") for row in rows}) == 1
        assert not re.search(r"(?<!\\)[%#_](?!.*usepackage)", "\n".join(rows))
        assert text.isascii()


def test_latex_compiles(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        reason = "no pdflatex: as root, apt-get install texlive-latex-recommended"
        skip(reason)
    report(tmp_path, comparable=False, reason=REASON)
    inputs = "".join(rf"\input{{{path.name}}}" for path in sorted(tmp_path.glob("*.tex")))
    packages = r"\usepackage{booktabs,graphicx}"
    (tmp_path / "all.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{inputs}\end{{document}}")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "4 pages" in done.stdout


def test_five_hundred_runs_are_reported(tmp_path: Path) -> None:
    """docs/tracking.md has the time it takes."""
    runs = classifier_runs({variant: [80.0 + seed / 1000 for seed in range(100)] for variant in VARIANT_NAMES})
    steps = np.arange(20, 6020, 20)
    lines = [
        pd.DataFrame({"variant": run.variant, "seed": run.seed, "metric": metric, "step": steps, "value": 7 / steps})
        for run in runs.itertuples()
        for metric in ("loss", "learning_rate")
    ]
    cost = runs[["variant", "seed"]].assign(task="Table 2", device="NVIDIA H200", gpu_hours=1.5)
    provenance = [Provenance(f"{run.variant}, seed {run.seed}", "dvc repro") for run in runs.itertuples()]
    report(
        tmp_path,
        classification=runs,
        curves=pd.concat(lines).assign(task="classification"),
        background=Background(cost=cost, provenance=provenance),
    )
    assert csv(tmp_path, "table2_imagenet")["seeds"].tolist() == [100] * 5
    index = tmp_path / "index.html"
    assert index.stat().st_size < 5e6
    assert "<td>750.000</td>" in index.read_text()


def test_the_page_tells_where_each_row_comes_from_and_what_it_cost(tmp_path: Path) -> None:
    cost = {"task": "Table 2", "variant": "poolformer_s12", "device": "x86_64 CPU", "rank_hours": 0.5, "gpu_hours": 0.0}
    background = Background(
        cost=pd.DataFrame([{**cost, "seed": seed, "energy_kwh": None} for seed in (0, 1)]),
        provenance=[Provenance("Table 2: PoolFormer-S12, seed 0", "dvc repro x", "0123abc", "f00d", job="slurm 7")],
        config="a: <b>",
    )
    index = (report(tmp_path, background=background) / "index.html").read_text()
    for text in ("dvc repro x", "0123abc", "f00d", "slurm 7", "a: &lt;b&gt;", "x86_64 CPU", "<td>1.000</td>"):
        assert text in index, text
    assert "Energy" not in index.partition("What it cost")[2].partition("<tbody>")[0].partition("<thead>")[2]


def test_classes_are_means_over_seeds_with_the_best_first_and_absent_ones_last() -> None:
    values = {"sky": [90.0, 92.0], "door": [40.0, 44.0], "ghost": [float("nan")] * 2}
    iou = pd.DataFrame(
        [("poolformer_s12", seed, i, name, values[name][seed]) for i, name in enumerate(values) for seed in (0, 1)],
        columns=["variant", "seed", "label", "name", "iou"],
    )
    rows = class_rows(iou.sample(frac=1, random_state=0))
    assert [row.name for row in rows] == ["sky", "door", "ghost"]
    assert [row.iou["poolformer_s12"] for row in rows][:2] == [91.0, 42.0]
    assert rows[2].iou["poolformer_s12"] != rows[2].iou["poolformer_s12"]


def test_pictures_have_their_pixels_and_a_legend_of_what_they_show(tmp_path: Path) -> None:
    image = np.zeros((8, 12, 3), np.uint8)
    mask = np.zeros((8, 12), np.uint8)
    mask[0], mask[1] = 255, 2
    for name in ("a", "b"):
        np.savez_compressed(tmp_path / f"{name}.npz", image_00003=image, label_00003=mask, prediction_00003=mask * 0)
    files = {"poolformer_s12": tmp_path / "a.npz", "poolformer_s24": tmp_path / "b.npz"}
    shown = pictures(files, {0: "wall", 2: "sky"})
    assert [name for name, _ in shown.legend] == ["wall", "sky"]
    (row,) = shown.rows
    assert list(row.predictions) == ["PoolFormer-S12", "PoolFormer-S24"]
    label = Image.open(io.BytesIO(base64.b64decode(row.label.partition(",")[2]))).convert("RGBA")
    assert label.size == (12, 8)
    assert label.getpixel((0, 0))[3] == 0, "ignored pixels are see-through"
    colours = dict(shown.legend)
    assert "#{:02x}{:02x}{:02x}".format(*label.getpixel((0, 1))[:3]) == colours["sky"]
    assert "#{:02x}{:02x}{:02x}".format(*label.getpixel((0, 5))[:3]) == colours["wall"]


def test_a_subset_of_the_images_is_never_within_or_outside(tmp_path: Path) -> None:
    """Neither of the images that are counted nor of those that were trained on, the backbone's among them."""
    classifiers = classifier_runs({"poolformer_s12": [77.2], "poolformer_s24": [80.3], "poolformer_s36": [81.4]})
    classifiers.loc[0, "images"] = 10_000
    classifiers.loc[1, "training_images"] = 100_000
    classifiers.loc[2, "training_images"] = 1_281_167
    segmenters = segmenter_runs({"poolformer_s12": [37.2], "poolformer_s24": [40.3]})
    segmenters.loc[0, "backbone_images"] = 100_000
    released = released_files("classification", "poolformer_m48").assign(images=5_000)
    report(tmp_path, classification=classifiers, segmentation=segmenters, released_classification=released)
    table2, table4 = csv(tmp_path, "table2_imagenet"), csv(tmp_path, "table4_ade20k")
    assert table2.loc["poolformer_s12", "verdict"] == (
        "not comparable: 10,000 images of ImageNet's val in place of 50,000"
    )
    assert "100,000 images of ImageNet's train in place of 1,281,167" in table2.loc["poolformer_s24", "verdict"]
    assert table2.loc["poolformer_s36", "verdict"] == "within"
    assert "100,000 images of ImageNet's train in place of" in table4.loc["poolformer_s12", "verdict"]
    assert table4.loc["poolformer_s24", "verdict"] == "within"
    assert table2["released_verdict"].str.startswith("not comparable: 5,000 images").sum() == 4
    assert table2.loc[["poolformer_s12", "poolformer_s24"], "difference"].isna().all()


def test_the_tables_findings_stand_under_it(tmp_path: Path) -> None:
    short = {"poolformer_s12": [36.5], "poolformer_s24": [39.6], "poolformer_s36": [41.3], "poolformer_m36": [41.7]}
    report(tmp_path, segmentation=segmenter_runs(short))
    page = (tmp_path / "index.html").read_text()
    assert "Over 4 rows the measured numbers are 0.70 points below the paper" in page
    assert "the table as a whole is short" in page
    assert "does not tell apart PoolFormer-S36, PoolFormer-M36, PoolFormer-M48" in page
    assert "sd between seeds, 0.35 points, is pooled over mmsegmentation pull request 2191; official issue 19" in page
    assert "the table as a whole is short" in (tmp_path / "table4_ade20k.md").read_text()


def test_claims_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    report(tmp_path)
    claims = pd.read_csv(tmp_path / "claims.csv").set_index("predicate")
    assert claims.loc["S24 > 80", "outcome"] == "fails", "S24 was measured at 79.0"
    assert claims.loc["S36 > PVT_Medium", "outcome"] == "fails"
    assert claims.loc["(M36 > DeiT_B) & (M36 > ResMLP_B24)", "outcome"] == "holds"
    assert claims.loc["identity >= 74", "outcome"] == "not measured"
    report(tmp_path, comparable=False, reason=REASON)
    assert set(pd.read_csv(tmp_path / "claims.csv")["outcome"]) == {"not measured"}


def test_paired_tests_are_shown(tmp_path: Path) -> None:
    row = {"table": "Table 2", "variant": "poolformer_s12", "seed": 0, "against": "released weights"}
    row |= {"difference": 0.5, "low": -0.1, "high": 1.1}
    paired = pd.DataFrame([{**row, "p": 0.08, "only_here": 1250, "only_there": 1000}])
    report(tmp_path, paired=paired)
    assert pd.read_csv(tmp_path / "paired_tests.csv")["only_here"].tolist() == [1250]
    page = (tmp_path / "index.html").read_text()
    for text in ("Table 2: PoolFormer-S12, seed 0", "-0.10 to +1.10", "<td>1250</td>", "<td>0.08</td>"):
        assert text in page
