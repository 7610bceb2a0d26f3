from .sweep_report import report as report
