"""How a table reads: which columns people see, and the same cells as Markdown, LaTeX and (in the templates) HTML.

The CSV holds the raw numbers; every other format is made from it, so that none can differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.paper import label

NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Column:
    """A column that people see: `key` in the CSV, and how its numbers are written."""

    group: str
    heading: str
    key: str
    digits: int = 2
    sign: str = ""
    """"+" to write the sign of positive numbers too, "±" before a tolerance."""
    spread: str = ""
    """Key of a standard deviation to write behind the number."""
    terminal: str = ""
    """Heading in a terminal, where only a few columns fit; empty: not among them."""

    @property
    def is_text(self) -> bool:
        return self.key in ("model", "verdict")


@dataclass(frozen=True)
class Layout:
    """One table's name, title and visible columns."""

    name: str
    """File name without suffix."""
    title: str
    metric: str
    """What `paper`, `released` and `measured` are."""
    columns: tuple[Column, ...]


TABLE2 = Layout(
    "table2_imagenet",
    "Table 2: ImageNet-1K classification",
    "top-1, %",
    (
        Column("", "Model", "model", terminal="Model"),
        Column("Parameters, M", "paper", "paper_params_m", 0),
        Column("Parameters, M", "counted", "params_m"),
        Column("MACs, G", "paper", "paper_macs_g", 1),
        Column("MACs, G", "counted", "macs_g"),
        Column("Top-1, %", "paper", "paper", 1, terminal="Paper"),
        Column("Top-1, %", "released", "released", terminal="Released"),
        Column("Top-1, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("Top-1, %", "difference", "difference", sign="+", terminal="Diff."),
        Column("Top-1, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Top-5, %", "measured", "measured_top5"),
        Column("Training", "images/s", "train_images_per_s", 0),
        Column("Training", "GPU-hours", "gpu_hours", 0),
    ),
)

TABLE4 = Layout(
    "table4_ade20k",
    "Table 4: ADE20K semantic segmentation with Semantic FPN",
    "mIoU*, %",
    (
        Column("", "Model", "model", terminal="Model"),
        Column("Parameters, M", "paper", "paper_params_m", 1),
        Column("Parameters, M", "counted", "params_m"),
        Column("MACs, G", "counted", "macs_g"),
        Column("mIoU*, %", "paper", "paper", 1, terminal="Paper"),
        Column("mIoU*, %", "released", "released", terminal="Released"),
        Column("mIoU*, %", "measured", "measured", spread="sd", terminal="Measured"),
        Column("mIoU*, %", "difference", "difference", sign="+", terminal="Diff."),
        Column("mIoU*, %", "tolerance", "tolerance", sign="±"),
        Column("", "Seeds", "seeds", 0, terminal="Seeds"),
        Column("", "Verdict", "verdict", terminal="Verdict"),
        Column("Released, %", "mIoU* ms+flip", "released_miou_aligned_ms_flip"),
        Column("Released, %", "mIoU", "released_miou"),
        Column("Released, %", "mIoU ms+flip", "released_miou_ms_flip"),
        Column("Measured, %", "mIoU* ms+flip", "measured_miou_aligned_ms_flip"),
        Column("Measured, %", "mIoU", "measured_miou"),
        Column("Measured, %", "mIoU ms+flip", "measured_miou_ms_flip"),
        Column("mmseg, %", "mIoU*", "mmseg_miou_aligned"),
        Column("mmseg, %", "mIoU", "mmseg_miou"),
        Column("Memory, GB", "mmseg", "mmseg_train_memory_gb"),
        Column("Memory, GB", "here", "train_memory_gb"),
        Column("Images/s", "mmseg", "mmseg_images_per_s", 1),
        Column("Images/s", "here", "images_per_s", 1),
    ),
)

ALWAYS_SHOWN = {
    "model",
    "params_m",
    "macs_g",
    "paper",
    "released",
    "measured",
    "difference",
    "seeds",
    "verdict",
}


def visible_columns(numbers: pd.DataFrame, layout: Layout) -> list[Column]:
    """The columns to show: those without a single number are left out, but for the ones a reader looks for."""
    return [column for column in layout.columns if column.key in ALWAYS_SHOWN or numbers[column.key].notna().any()]


def readable(numbers: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """The table as text cells under two rows of headings, an en dash where there is no number."""
    return pd.DataFrame(
        [[_cell(row, column) for column in columns] for _, row in numbers.iterrows()],
        columns=pd.MultiIndex.from_tuples([(column.group, column.heading) for column in columns]),
    )


def to_markdown(numbers: pd.DataFrame, layout: Layout, notes: Sequence[str]) -> str:
    columns = visible_columns(numbers, layout)
    text = readable(numbers, columns)
    text.columns = pd.Index([f"{c.group} ({c.heading})" if c.group else c.heading for c in columns])
    alignment = ["left" if column.is_text else "right" for column in columns]
    grid = text.to_markdown(index=False, disable_numparse=True, colalign=alignment)
    return f"# {layout.title}\n\n{grid}\n\n" + "".join(f"- {note}\n" for note in notes)


def to_latex(numbers: pd.DataFrame, layout: Layout, notes: Sequence[str]) -> str:
    """A table in landscape's width; needs the packages booktabs and graphicx."""
    columns = visible_columns(numbers, layout)
    text = readable(numbers, columns).map(_latex_escape)
    text.columns = pd.MultiIndex.from_tuples([tuple(map(_latex_escape, pair)) for pair in text.columns])
    tabular = text.to_latex(
        index=False,
        column_format="".join("l" if column.is_text else "r" for column in columns),
        multicolumn_format="c",
    )
    return "\n".join(
        (
            r"% \usepackage{booktabs,graphicx}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_latex_escape(layout.title)}}}",
            rf"\label{{tab:{layout.name.replace('_', '-')}}}",
            r"\resizebox{\linewidth}{!}{%",
            f"{tabular.strip()}}}",
            *(rf"\par\noindent{{\footnotesize {_latex_escape(note)}}}" for note in notes),
            r"\end{table*}",
            "",
        )
    )


@dataclass(frozen=True)
class Heading:
    """A cell of an HTML table's head; `column` is None over a group."""

    text: str
    column: Column | None
    colspan: int = 1
    rowspan: int = 1


def heading_rows(columns: Sequence[Column]) -> tuple[list[Heading], list[Heading]]:
    """The two rows of an HTML table's head."""
    upper, lower = [], []
    for group, members in _runs(columns):
        if group:
            upper.append(Heading(group, None, colspan=len(members)))
            lower += [Heading(column.heading, column) for column in members]
        else:
            upper += [Heading(column.heading, column, rowspan=2) for column in members]
    return upper, lower


def _runs(columns: Sequence[Column]) -> Iterator[tuple[str, list[Column]]]:
    members: list[Column] = []
    for column in columns:
        if members and column.group != members[0].group:
            yield members[0].group, members
            members = []
        members.append(column)
    yield members[0].group, members


def _cell(row: "pd.Series[Any]", column: Column) -> str:
    value = row[column.key]
    if column.key == "model":
        return label(str(value))
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOTHING
    text = f"{value:{'+' if column.sign == '+' else ''}.{column.digits}f}"
    if column.sign == "±":
        text = f"±{text}"
    if column.spread and not pd.isna(row[column.spread]):
        text += f" ± {row[column.spread]:.{column.digits}f}"
    return text


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
_LATEX |= {NOTHING: "--", "±": r"$\pm$", "*": r"$^*$"}


def _latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
