"""Figures as SVG and PNG. Same numbers, same bytes: no dates, no random ids.

The SVG's few colours are CSS variables with a fallback, so a figure put into a page follows its light or dark mode
and still stands alone.
"""

import io
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

from pipeline.config import VARIANT_NAMES
from pipeline.paper import label, wide

INK, MUTED, GRID, PAPER, OURS, WEIGHTS = (
    "#1d2733",
    "#8a94a0",
    "#e3e7eb",
    "#5b7fa6",
    "#c2410c",
    "#0f766e",
)
CSS_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PAPER: "paper",
    OURS: "ours",
    WEIGHTS: "weights",
}
VARIANT_COLOURS = dict(zip(VARIANT_NAMES, ("#0284c7", "#16a34a", "#d39e00", "#e0402f", "#9333ea"), strict=True))

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


def accuracy_macs(numbers: pd.DataFrame, comparable: bool, reason: str) -> Figure:
    """Top-1 against MACs, as in the paper's Figure 1 (b); `numbers` is Table 2's CSV."""
    return _comparison(
        numbers, comparable, reason, table="table2_imagenet", x=("macs", "macs_g", "MACs, G"), y=("top1", "top-1, %")
    )


def accuracy_params(numbers: pd.DataFrame, comparable: bool, reason: str) -> Figure:
    """Top-1 against parameters; `numbers` is Table 2's CSV."""
    return _comparison(
        numbers,
        comparable,
        reason,
        table="table2_imagenet",
        x=("params", "params_m", "parameters, M"),
        y=("top1", "top-1, %"),
    )


def miou_params(numbers: pd.DataFrame, comparable: bool, reason: str) -> Figure:
    """mIoU against parameters of backbone and head; `numbers` is Table 4's CSV."""
    return _comparison(
        numbers,
        comparable,
        reason,
        table="table4_ade20k",
        x=("params", "params_m", "parameters, M"),
        y=("miou", "mIoU*, %"),
    )


def training_curves(curves: pd.DataFrame) -> Figure:
    """One panel for each task and metric, one line for each variant and seed.

    Args:
        curves: columns variant, seed, task, step, metric, value.
    """

    lines = curves.groupby(["task", "metric", "variant", "seed"]).ngroups
    points = max(MIN_POINTS, CURVE_POINTS // lines)

    def draw(figure: Figure) -> None:
        panels = list(curves.groupby(["task", "metric"], sort=False))
        columns = min(len(panels), CURVE_COLUMNS)
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for axes, ((task, metric), panel) in zip(grid, panels, strict=False):
            for (variant, _), line in panel.groupby(["variant", "seed"], sort=False):
                line = line.sort_values("step")
                line = line.iloc[np.unique(np.linspace(0, len(line) - 1, points).round().astype(int))]
                axes.plot(
                    line["step"],
                    line["value"],
                    color=VARIANT_COLOURS[str(variant)],
                    lw=1.4,
                    alpha=0.85,
                )
            axes.set_title(f"{task}: {metric}".replace("_", " "))
            axes.set_xlabel("step")
        for axes in grid[len(panels) :]:
            axes.remove()
        shown = [v for v in VARIANT_NAMES if v in set(curves["variant"])]
        handles = [mpl.lines.Line2D([], [], color=VARIANT_COLOURS[v], label=label(v)) for v in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(shown))

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


def _comparison(
    numbers: pd.DataFrame, comparable: bool, reason: str, *, table: str, x: tuple[str, str, str], y: tuple[str, str]
) -> Figure:
    """The paper's rows in muted colours and the measured ones on top; beside them where they cannot be compared.

    `x` is a quantity of the paper, a column of `numbers` and an axis label; `y` a quantity of the paper and a label.
    """
    paper = wide(table)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 if comparable else 2, squeeze=False)[0]
        _draw_paper(panels[0], paper, x[0], y[0])
        _draw_ours(panels[-1], numbers, x[1], names=not comparable)
        if not comparable:
            _title(panels[0], "The paper", "for reference")
            _title(panels[1], "This run, not comparable", reason)
        for axes in panels:
            axes.set_xlabel(x[2])
            axes.set_ylabel(y[1])
            axes.margins(0.08)
            if axes.has_data():
                axes.legend(loc="lower right")

    return _figure(6.4 if comparable else 9.6, 4.6, draw)


def _draw_paper(axes: Axes, paper: pd.DataFrame, x: str, y: str) -> None:
    for family, marker in FAMILIES.items():
        rows = paper[paper.index.str.startswith(f"{family}-")].sort_values(x)
        if len(rows):
            axes.plot(rows[x], rows[y], marker=marker, ms=5, lw=0.8, color=MUTED, alpha=0.75, label=family)
    rows = paper.loc[[label(variant) for variant in VARIANT_NAMES]]
    axes.plot(
        rows[x],
        rows[y],
        marker="o",
        ms=7,
        lw=1.4,
        mfc="none",
        color=PAPER,
        label="PoolFormer, paper",
    )
    _name_points(axes, rows.index, rows[x], rows[y])


def _name_points(axes: Axes, names: Iterable[str], x: Iterable[float], y: Iterable[float]) -> None:
    for name, *point in zip(names, x, y, strict=True):
        axes.annotate(
            name[-3:].upper(), (point[0], point[1]), (0, 8), textcoords="offset points", ha="center", fontsize=9
        )


def _title(axes: Axes, title: str, subtitle: str) -> None:
    lines = textwrap.wrap(subtitle, 60)
    axes.set_title(title, pad=9 + 11 * len(lines))
    axes.annotate("\n".join(lines), (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color=MUTED)


def _draw_ours(axes: Axes, numbers: pd.DataFrame, own_x: str, names: bool) -> None:
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
            _name_points(axes, rows["model"], x, y)
