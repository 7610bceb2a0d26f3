from .prose import (
    at_each_rate as at_each_rate,
    by_seed as by_seed,
    interval as interval,
    listing as listing,
    lowest_and_highest as lowest_and_highest,
    more_or_less as more_or_less,
    points as points,
    say as say,
)
from .sweep_report import report as report
