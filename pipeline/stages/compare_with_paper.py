"""Put what was measured beside what the paper printed.

Reads   results/, predictions/
Writes  reports/
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.report import write_reports
from pipeline.report.collect import background, curves, measured, paired, recipe_differences_of, released, settings
from pipeline.tracking.measured import log_comparisons


def run(params: Params) -> None:
    runs, files = measured(params), released(params)
    write_reports(
        paths.REPORTS,
        runs=runs,
        released=files,
        comparable=params.comparable,
        reason=params.not_comparable_because,
        recipe_differences=recipe_differences_of(params),
        settings=settings(params),
        curves=curves(params),
        background=background(params),
        paired=paired(params),
    )
    log_comparisons(params, runs, files)
