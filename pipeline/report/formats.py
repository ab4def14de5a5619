"""How a table reads: which columns people see, and the same cells as Markdown, LaTeX and (in the templates) HTML.

The CSV holds the raw numbers; every other format is made from it, so that none can differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.comparisons.description import Column, Comparison
from pipeline.paper import label

NOTHING = "–"  # noqa: RUF001


ALWAYS_SHOWN = {"model", "params_m", "macs_g", "paper", "released", "measured", "difference", "seeds", "verdict"}


def visible_columns(numbers: pd.DataFrame, comparison: Comparison) -> list[Column]:
    """The columns to show: those without a number are left out, except for the ones that every reader expects."""
    return [
        column for column in comparison.all_columns() if column.key in ALWAYS_SHOWN or numbers[column.key].notna().any()
    ]


def readable(numbers: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """The table as text cells under two rows of headings, an en dash where there is no number."""
    return pd.DataFrame(
        [[_cell(row, column) for column in columns] for _, row in numbers.iterrows()],
        columns=pd.MultiIndex.from_tuples([(column.group, column.heading) for column in columns]),
    )


def to_markdown(numbers: pd.DataFrame, comparison: Comparison, notes: Sequence[str]) -> str:
    columns = visible_columns(numbers, comparison)
    text = readable(numbers, columns)
    text.columns = pd.Index([f"{c.group} ({c.heading})" if c.group else c.heading for c in columns])
    alignment = ["left" if column.is_text else "right" for column in columns]
    grid = text.to_markdown(index=False, disable_numparse=True, colalign=alignment)
    return f"# {comparison.title}\n\n{grid}\n\n" + "".join(f"- {note}\n" for note in notes)


def to_latex(numbers: pd.DataFrame, comparison: Comparison, notes: Sequence[str]) -> str:
    """A table in landscape's width; needs the packages booktabs and graphicx."""
    columns = visible_columns(numbers, comparison)
    text = readable(numbers, columns).map(_latex_escape)
    text.columns = pd.MultiIndex.from_tuples([tuple(map(_latex_escape, pair)) for pair in text.columns])
    tabular = text.to_latex(
        index=False, column_format="".join("l" if column.is_text else "r" for column in columns), multicolumn_format="c"
    )
    return "\n".join(
        (
            r"% \usepackage{booktabs,graphicx}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_latex_escape(comparison.title)}}}",
            rf"\label{{tab:{comparison.name.replace('_', '-')}}}",
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
