"""Reports: a run folder or a finished demo as one self-contained HTML page."""

from sateen.report.build import build_report, main
from sateen.report.folder import ReportError

__all__ = ["ReportError", "build_report", "main"]
