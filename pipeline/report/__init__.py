"""The paper's tables with what was measured beside what was printed: CSV, Markdown, HTML, LaTeX, figures, one page."""

from pipeline.report.page import print_tables, write_reports

__all__ = ["print_tables", "write_reports"]
