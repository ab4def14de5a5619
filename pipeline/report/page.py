"""Writes the report: the tables in four formats, the figures, and `index.html`, which needs no other file."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import jinja2
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from pipeline.catalogue import COMPARISONS
from pipeline.paper import label, load
from pipeline.paper.claims import identifier, judge_claims
from pipeline.paper.paired import Paired
from pipeline.paper.verdict import RELEASED_TOLERANCE
from pipeline.paths import written_atomically
from pipeline.report import figures
from pipeline.report.background import Background, class_rows, cost_rows, pictures
from pipeline.report.formats import NOTHING, heading_rows, readable, to_latex, to_markdown, visible_columns
from pipeline.report.tables import Circumstances, Table, build

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)

PAIRED = ["table", "variant", "seed", "against", *(field.name for field in fields(Paired))]
STATUSES = {
    "within": "✓",
    "outside": "✗",
    "inconclusive": "?",
    "not comparable": "≠",
    "not in the paper": "+",
    "missing": "○",
}
"""A sign for each status beside its colour, for print and for eyes that see no red and green."""


def write_reports(
    folder: Path,
    *,
    runs: Mapping[str, pd.DataFrame],
    released: Mapping[str, pd.DataFrame],
    comparable: bool,
    reason: str,
    recipe_differences: dict[str, list[str]],
    settings: dict[str, str],
    curves: pd.DataFrame | None = None,
    background: Background | None = None,
    paired: pd.DataFrame | None = None,
) -> None:
    """Write the whole report into `folder`, each file atomically. The same arguments give the same bytes.

    Accuracies and mIoU are in percent. Any frame may be empty; columns marked optional may be absent or NaN.

    Args:
        folder: made when it is not there.
        runs: by table (`table2_imagenet`, ...), a row for each (variant, seed): variant, seed, parameters, macs_g,
            images (counted), and the task's metrics (Table 2: top1, top5, loss; Table 4: miou, miou_aligned, aacc);
            optional training_images, backbone_images (how many it was trained on), train_images_per_s,
            train_memory_gb, gpu_hours, images_per_s, and further metrics.
        released: the same by table, a row for each variant asked for: variant, file (its name), status ("measured" or
            "missing") and the same metrics; optional parameters, macs_g.
        comparable: whether the images are the paper's.
        reason: why not, as a clause without full stop; empty when they are.
        recipe_differences: for each variant the fields that are not the paper's, as `classification.epochs`.
        settings: what a reader needs to repeat it (commit, seeds, machine, versions), in the order to be shown.
        curves: variant, seed, task, step, metric, value.
        background: what the page tells beside the tables.
        paired: table, variant, seed, against (what) and the fields of `pipeline.paper.paired.Paired`.
    """
    background = background or Background()
    shared = Circumstances(comparable, reason, recipe_differences)
    nothing = pd.DataFrame()
    tables = [
        build(comparison, runs.get(comparison.name, nothing), released.get(comparison.name, nothing), shared)
        for comparison in COMPARISONS
    ]
    drawn = {
        figure.name: figures.against_property(table.comparison, figure, table.numbers, None if comparable else reason)
        for table in tables
        for figure in table.comparison.figures
    }
    if curves is not None and len(curves):
        drawn["curves"] = figures.training_curves(curves)
    svgs = {name: figures.to_svg(figure, name) for name, figure in drawn.items()}

    for name, figure in drawn.items():
        _write(folder / f"{name}.svg", svgs[name])
        _write(folder / f"{name}.png", figures.to_png(figure))
    for table in tables:
        name = table.comparison.name
        _write(folder / f"{name}.csv", table.numbers.to_csv(index=False, lineterminator="\n"))
        _write(folder / f"{name}.md", to_markdown(table.numbers, table.comparison, table.notes))
        _write(folder / f"{name}.tex", to_latex(table.numbers, table.comparison, table.notes))
        _write(folder / f"{name}.html", _render("table.html.j2", table=table))
    claims = judge_claims({table.comparison.name: _cells_of_claims(table) for table in tables} if comparable else {})
    _write(folder / "claims.csv", pd.DataFrame(map(asdict, claims)).to_csv(index=False, lineterminator="\n"))
    tests = pd.DataFrame(columns=PAIRED) if paired is None or paired.empty else paired[PAIRED].round(6)
    _write(folder / "paired_tests.csv", tests.to_csv(index=False, lineterminator="\n"))
    page = _render(
        "index.html.j2",
        sections=[_section(table, runs.get(table.comparison.name, nothing)) for table in tables],
        svgs=svgs,
        classes=class_rows(background.iou) if len(background.iou) else [],
        pictures=pictures(background.pictures, background.class_names),
        cost=cost_rows(background.cost) if len(background.cost) else None,
        claims=claims,
        paired=tests.to_dict("records"),
        provenance=background.provenance,
        config=background.config,
        comparable=comparable,
        reason=reason,
        settings=settings,
        rules=list({comparison.rule.metric: comparison.rule for comparison in COMPARISONS}.values()),
        released_tolerance=RELEASED_TOLERANCE,
    )
    _write(folder / "index.html", page)


def print_tables(folder: Path, console: Console) -> None:
    """Print the essence of a written report's tables, narrow enough for 80 characters."""
    for comparison in COMPARISONS:
        numbers = pd.read_csv(folder / f"{comparison.name}.csv")
        if not (numbers["seeds"].any() or numbers["released_verdict"].notna().any()):
            continue  # nothing of it is part of this run
        columns = [column for column in comparison.columns if column.terminal]
        remarks = "\n".join(dict.fromkeys(verdict for verdict in numbers["verdict"] if ":" in verdict))
        grid = RichTable(title=f"{comparison.title} ({comparison.metric_label})", title_justify="left", box=SIMPLE_HEAD)
        grid.pad_edge, grid.collapse_padding = False, True
        for column in columns:
            grid.add_column(column.terminal, justify="left" if column.is_text else "right", no_wrap=True)
        numbers["verdict"] = numbers["verdict"].str.partition(":")[0]  # the rest is among the remarks
        for cells in readable(numbers, columns).itertuples(index=False):
            grid.add_row(*cells)
        console.print(grid)
        if remarks:
            console.print(remarks, style="dim", highlight=False)


def _section(table: Table, runs: pd.DataFrame) -> dict[str, object]:
    """What the page shows for one table."""
    statuses = [verdict.status for verdict in table.verdicts.values()]
    units = load(table.comparison.name).drop_duplicates("quantity").set_index("quantity")["unit"]
    context = table.context.rename(columns={name: f"{name}, {unit}" for name, unit in units.items()})
    return {
        "table": table,
        "counts": {status: statuses.count(status) for status in STATUSES if status in statuses},
        "runs": runs.round(3).to_html(index=False, border=0, na_rep=NOTHING) if len(runs) else "",
        "context": context.rename_axis(columns=None).reset_index(names="model").to_html(index=False, border=0),
        "captions": {figure.name: figure.caption for figure in table.comparison.figures},
    }


def _cells_of_claims(table: Table) -> dict[str, float]:
    """The paper's number of each other model, and of its own what was trained, else the released weights'."""
    comparison = table.comparison
    cells = {identifier(str(model)): float(value) for model, value in table.context[comparison.quantity].items()}
    for _, row in table.numbers.iterrows():
        statuses = [table.verdicts[row["model"]].status]
        if row["model"] in table.released:
            statuses.append(table.released[row["model"]].status)
        for column, status in zip(("measured", "released"), statuses, strict=False):
            if status in ("within", "outside", "inconclusive") and pd.notna(row[column]):
                cells[identifier(label(row["model"]))] = float(row[column])
                break
    return cells


def _render(template: str, **values: object) -> str:
    return TEMPLATES.get_template(template).render(
        signs=STATUSES,
        readable=readable,
        visible_columns=visible_columns,
        heading_rows=heading_rows,
        label=label,
        nothing=NOTHING,
        **values,
    )


def _write(path: Path, content: str | bytes) -> None:
    with written_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
