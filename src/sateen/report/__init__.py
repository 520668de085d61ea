"""Reports: a run folder or a finished demo as one self-contained HTML page."""

from sateen.report.build import ReportError, build_report, main

__all__ = ["ReportError", "build_report", "main"]
