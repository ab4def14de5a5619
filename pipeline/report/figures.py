"""Figures as SVG and PNG. Same numbers, same bytes: no dates, no random ids.

The SVG's few colours are CSS variables with a fallback, so a figure put into a page follows its light or dark mode
and still stands alone.
"""

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.comparisons.description import Comparison
from pipeline.comparisons.description import Figure as PaperFigure
from pipeline.paper import label, wide
from pipeline.variants import VARIANTS

INK, MUTED, GRID, PAPER, OURS, WEIGHTS = ("#1d2733", "#8a94a0", "#e3e7eb", "#5b7fa6", "#c2410c", "#0f766e")
CSS_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper", OURS: "ours", WEIGHTS: "weights"}
COLOURS = ("#0284c7", "#16a34a", "#d39e00", "#e0402f", "#9333ea", "#0f766e", "#be185d", "#4d7c0f")

FAMILIES = {
    "RSB-ResNet": "s",
    "DeiT": "^",
    "PVT": "v",
    "ResMLP": "D",
    "Swin-Mixer": "P",
    "gMLP": "X",
    "MLP-Mixer": "*",
    "ResNet": "s",
    "ResNeXt": "h",
}
"""Name's beginning and marker of the paper's competitors. ViT, at 18 and 64 G, would squeeze all others together."""

CURVE_COLUMNS = 2
LEGEND_COLUMNS = 7
LEFTMOST = 1.03
"""Points up to so many times the least x have their names on the left."""
CURVE_POINTS, MIN_POINTS = 40_000, 30
"""In all lines together, and in one at least: an eye sees no more, and the page stays small."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def against_property(comparison: Comparison, figure: PaperFigure, numbers: pd.DataFrame, reason: str | None) -> Figure:
    """The paper's rows in muted colours and the measured ones on top; beside them where they cannot be compared.

    Args:
        comparison: the table.
        figure: which of its quantities, against which property of the model.
        numbers: its CSV.
        reason: why the numbers cannot be compared; None where they can.
    """
    paper, comparable = wide(comparison.name), reason is None
    shown = figure.models or comparison.names
    numbers = numbers[numbers["model"].isin(figure.models)] if figure.models else numbers

    def draw(canvas: Figure) -> None:
        panels = canvas.subplots(1, 1 if comparable else 2, squeeze=False)[0]
        _draw_paper(panels[0], paper, figure, [label(name) for name in shown if label(name) in paper.index])
        _draw_ours(panels[-1], numbers, figure, names=not comparable and figure.is_named)
        if not comparable:
            _title(panels[0], "The paper", "for reference")
            _title(panels[1], "This run, not comparable", str(reason))
        for axes in panels:
            axes.set_xlabel(figure.x[2])
            axes.set_ylabel(figure.y[1])
            axes.margins(0.08 if figure.is_connected else 0.42 if comparable else 0.5, 0.08)
            if axes.has_data():
                axes.legend(loc="lower right")

    return _figure(6.4 if comparable else 9.6, 4.6, draw)


def training_curves(curves: pd.DataFrame) -> Figure:
    """One panel for each task and metric, one line for each variant and seed.

    Args:
        curves: columns variant, seed, task, step, metric, value; optional reference: whether it is another's training.
    """

    present = set(curves["variant"])
    shown = [v for v in dict.fromkeys((*VARIANTS, *curves["variant"])) if v in present]
    colours = dict(zip(dict.fromkeys((*VARIANTS, *shown)), itertools.cycle(COLOURS), strict=False))
    lines = curves.groupby(["task", "metric", "variant", "seed"]).ngroups
    points = max(MIN_POINTS, CURVE_POINTS // lines)

    def draw(figure: Figure) -> None:
        panels = list(curves.groupby(["task", "metric"], sort=False))
        columns = min(len(panels), CURVE_COLUMNS)
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for axes, ((task, metric), panel) in zip(grid, panels, strict=False):
            for (variant, _), line in panel.groupby(["variant", "seed"], sort=False):
                is_reference = "reference" in line and bool(line["reference"].iloc[0])
                width, alpha = (3.0, 0.3) if is_reference else (1.4, 0.85)
                line = line.sort_values("step")
                line = line.iloc[np.unique(np.linspace(0, len(line) - 1, points).round().astype(int))]
                axes.plot(line["step"], line["value"], color=colours[str(variant)], lw=width, alpha=alpha)
            axes.set_title(f"{task}: {metric}".replace("_", " "))
            axes.set_xlabel("step")
        for axes in grid[len(panels) :]:
            axes.remove()
        handles = [mpl.lines.Line2D([], [], color=colours[v], label=label(v)) for v in shown]
        if "reference" in curves and curves["reference"].any():
            handles.append(mpl.lines.Line2D([], [], color=MUTED, lw=3.0, alpha=0.4, label="reference"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), LEGEND_COLUMNS))

    rows = -(-curves.groupby(["task", "metric"]).ngroups // CURVE_COLUMNS)
    return _figure(9.6, 3.0 * rows + 0.4, draw)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element. Ids carry `name`, so that several figures fit into one page."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var(--{variable}, {colour})")
    return svg


def to_png(figure: Figure) -> bytes:
    """The figure on white, whatever the page it will stand on."""
    figure.patch.set(facecolor="white", alpha=1)
    figure.set_dpi(150)
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width_in: float, height_in: float, draw: Callable[[Figure], None]) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
    return figure


def _draw_paper(axes: Axes, paper: pd.DataFrame, figure: PaperFigure, ours: list[str]) -> None:
    x, y = figure.x[0], figure.y[0]
    for family, marker in FAMILIES.items():
        rows = paper[paper.index.str.startswith(f"{family}-")].sort_values(x)
        if len(rows):
            axes.plot(rows[x], rows[y], marker=marker, ms=5, lw=0.8, color=MUTED, alpha=0.75, label=family)
    rows, line = paper.loc[ours], "-" if figure.is_connected else "none"
    axes.plot(rows[x], rows[y], marker="o", ms=7, lw=1.4, ls=line, mfc="none", color=PAPER, label="PoolFormer, paper")
    if figure.is_named:
        _name_points(axes, figure, rows.index, rows[x], rows[y])


def _name_points(axes: Axes, figure: PaperFigure, names: Iterable[str], x: Iterable[float], y: Iterable[float]) -> None:
    """Above each point; where points stand above one another beside it, on the left of the leftmost ones."""
    above: Any = {"xytext": (0, 8), "ha": "center"}
    left: Any = {"xytext": (-8, 0), "ha": "right", "va": "center"}
    right: Any = {"xytext": (12, 0), "ha": "left", "va": "center"}
    points = list(zip(names, x, y, strict=True))
    leftmost = min((point[1] for point in points), default=0.0) * LEFTMOST
    for name, *point in points:
        text = label(name).removeprefix("PoolFormer-").replace("_", " ")
        place = above if figure.is_connected else left if point[0] <= leftmost else right
        axes.annotate(text, (point[0], point[1]), textcoords="offset points", fontsize=9, **place)


def _title(axes: Axes, title: str, subtitle: str) -> None:
    lines = textwrap.wrap(subtitle, 60)
    axes.set_title(title, pad=9 + 11 * len(lines))
    axes.annotate("\n".join(lines), (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color=MUTED)


def _draw_ours(axes: Axes, numbers: pd.DataFrame, figure: PaperFigure, names: bool) -> None:
    own_x = figure.x[1]
    for key, marker, colour, text in (
        ("released", "D", WEIGHTS, "released weights, measured here"),
        ("measured", "o", OURS, "trained here"),
    ):
        rows = numbers.dropna(subset=[key, own_x])
        if rows.empty:
            continue
        x, y = rows[own_x].astype(float), rows[key].astype(float)
        axes.plot(x, y, marker, ms=5.5, color=colour, label=text, zorder=5)
        repeated = rows["sd"].notna()
        if key == "measured" and repeated.any():
            sd = rows.loc[repeated, "sd"].astype(float)
            axes.errorbar(x[repeated], y[repeated], sd, fmt="none", ecolor=colour, capsize=3, zorder=4)
        if names:
            _name_points(axes, figure, rows["model"], x, y)
