"""One sweep on one page: what was run, what came out, how sure it is, and where it ends.

The page is a single HTML file for readers who have neither the data nor Python. All numbers are those of
the public functions; the page only puts them into words, tables and pictures.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from lora_lens import store as stores
from lora_lens.fronts import dominance
from lora_lens.html_page import (
    bullets,
    decimal,
    figure,
    heading,
    html_page,
    html_table,
    page_path,
    paragraph,
    plain,
    points,
    with_interval,
    write_page,
)
from lora_lens.items import forgetting_interval, forgotten_by
from lora_lens.layers import block_and_kind, listed
from lora_lens.predictors import by_run
from lora_lens.sweep_plots import accuracy_curve, forgetting_curve, tradeoff
from lora_lens.tradeoff_plots import comparison, fronts_by_method, robustness, surface
from lora_lens.tradeoffs import (
    LEVEL,
    at_equal_rate,
    at_matched_accuracy,
    at_own_best_rate,
    rate_robustness,
    require_columns,
    window_columns,
)
from lora_lens.u_shape import u_shape_test
