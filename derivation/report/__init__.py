"""The derivation notes of a model: HTML, Markdown and LaTeX source with figures, written to a folder."""

from derivation.report.files import build, report_files

__all__ = ["build", "report_files"]
