"""The report in a real browser: the right numbers, on a screen, on a phone, in the dark, on paper."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import Browser, chromium, needs_chromium
from test_report import curves, released_files, report

from pipeline.paper import label
from pipeline.report.background import Background, Provenance

pytestmark = pytest.mark.slow
CLASSES = ("wall", "sky", "flag")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    needs_chromium()
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section."""
    place = tmp_path_factory.mktemp("report")
    pixels, mask = np.full((30, 40, 3), 90, np.uint8), np.zeros((30, 40), np.uint8)
    mask[:10], mask[10:12] = 1, 255
    np.savez_compressed(place / "s12.npz", image_00000=pixels, label_00000=mask, prediction_00000=mask // 2)
    iou = [
        ("poolformer_s12", seed, index, name, 30.0 * index + seed)
        for seed in (0, 1)
        for index, name in enumerate(CLASSES)
    ]
    cost = {"device": "NVIDIA H200", "ranks": 8, "images_per_s": 9876.5, "gpu_hours": 100.25, "energy_kwh": 70.5}
    background = Background(
        iou=pd.DataFrame(iou, columns=["variant", "seed", "label", "name", "iou"]),
        class_names=dict(enumerate(CLASSES)),
        pictures={"poolformer_s12": place / "s12.npz"},
        cost=pd.DataFrame([{"task": "Table 2", "variant": "poolformer_s12", "seed": seed, **cost} for seed in (0, 1)]),
        provenance=[
            Provenance("Table 2: PoolFormer-S12, seed 0", "dvc repro evaluate_classifier@poolformer_s12-0", "0123abc")
        ],
        config="scale: paper",
    )
    return report(
        place / "out",
        curves=curves(),
        background=background,
        released_classification=released_files("classification", "poolformer_m48"),
    )


def shown(browser: Browser, table: str) -> list[list[str]]:
    """The visible text of each cell of a table's body."""
    return list(
        browser.evaluate(
            f"[...document.querySelectorAll('#{table} tbody tr')]"
            ".map(row => [...row.children].map(cell => cell.innerText.trim()))"
        )
    )


@pytest.mark.parametrize("name", ["table2_imagenet", "table4_ade20k"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_the_tables_have_the_numbers_at_every_width(
    browser: Browser, folder: Path, name: str, width: int, dark: bool
) -> None:
    browser.size(width, dark=dark)
    browser.open((folder / "index.html").as_uri())
    browser.wait_for("MetaFormer, reproduced", "Settings")
    rows = {row[0]: row[1:] for row in shown(browser, name)}
    for _, row in pd.read_csv(folder / f"{name}.csv").iterrows():
        cells = rows[label(row["model"])]
        for key, digits in (("paper", 1), ("params_m", 2), ("measured", 2), ("released", 2)):
            if pd.notna(row[key]):
                assert any(cell.startswith(f"{row[key]:.{digits}f}") for cell in cells), (key, cells)
        assert any(str(row["verdict"]).partition(":")[0] in cell for cell in cells)


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_makes_the_page_scroll_sideways(browser: Browser, folder: Path, width: int) -> None:
    browser.size(width)
    browser.open((folder / "index.html").as_uri())
    browser.wait_for("MetaFormer, reproduced", "Settings")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2's ratio of two sRGB colours."""

    def luminance(colour: list[float]) -> float:
        linear = [value / 255 / 12.92 if value <= 10.03 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_modes(browser: Browser, folder: Path, dark: bool) -> None:
    browser.size(1280, dark=dark)
    browser.open((folder / "index.html").as_uri())
    browser.wait_for("MetaFormer, reproduced", "Settings")

    def colours(selector: str, *styles: str) -> list[list[float]]:
        found = browser.evaluate(
            f"(style => [{','.join(f'style.{name}' for name in styles)}])"
            f"(getComputedStyle(document.querySelector('{selector}')))"
        )
        return [[float(number) for number in re.findall(r"[\d.]+", colour)[:3]] for colour in found]

    (page,) = colours("body", "backgroundColor")
    assert (sum(page) < 200) == dark
    for selector in ("body", "td.main", ".lead", "figcaption"):
        assert contrast(colours(selector, "color")[0], page) >= 4.5, selector
    for status in ("within", "outside", "inconclusive", "missing"):
        ink, paper = colours(f".chip.{status}", "color", "backgroundColor")
        assert contrast(ink, paper) >= 4.5, status
    ink = colours("svg text", "fill")[0]
    assert contrast(ink, page) >= 4.5


def test_everything_else_is_there(browser: Browser, folder: Path) -> None:
    browser.size(1280)
    browser.open((folder / "index.html").as_uri())
    browser.wait_for("MetaFormer, reproduced", "Settings")  # the page's end, too: else details come after the next line
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = browser.wait_for("A few segmentations", "IoU of each class", "Learning curves", "What it cost", "Provenance")
    for word in (
        "dvc repro evaluate_classifier@poolformer_s12-0",
        "0123abc",
        "scale: paper",
        "NVIDIA H200",
        "200.500",
        "141.000",
    ):
        assert word in text, word
    assert re.search(r"flag\s+60\.5\s+sky\s+30\.5\s+wall\s+0\.5", text), "classes by IoU, the mean over two seeds"
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.pictures img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[40, 30]] * 3
    assert (
        browser.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
        == 0
    )


def test_it_prints(browser: Browser, folder: Path) -> None:
    browser.size(1047)  # A4 landscape without its margins
    browser.open((folder / "index.html").as_uri())
    browser.wait_for("MetaFormer, reproduced", "Settings")
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.evaluate("document.documentElement.scrollWidth") <= 1047
        cut = browser.evaluate(
            "[...document.querySelectorAll('.wide, .classes, .plain')]"
            ".filter(table => table.getBoundingClientRect().right > 1048).length"
        )
        assert cut == 0, "a table is wider than the paper"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    pdf = browser.print_to_pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
