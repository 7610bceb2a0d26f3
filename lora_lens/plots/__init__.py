"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

from lora_lens.plots._style import house_style
from lora_lens.plots.continual import accuracy_heatmap, accuracy_over_time, update_over_time, window_survival
from lora_lens.plots.continual_scores import continual_tradeoff, forgetting_by_position
from lora_lens.plots.drift import against_forgetting, predictors, rotation_matrix, shares
from lora_lens.plots.examples import confusion, forgotten_examples
from lora_lens.plots.settings import by_setting
from lora_lens.plots.spectra import by_depth, cumulative_energy, depth_map, overlap, small_multiples, spectrum
from lora_lens.plots.sweeps import (
    accuracy_curve,
    forgetting_curve,
    learning_curve,
    learning_curves,
    tradeoff,
    watched,
)
from lora_lens.plots.texts import token_shares
from lora_lens.plots.trade_offs import comparison, fronts_by_method, robustness, surface
from lora_lens.plots.windows import decomposition, feature_maps

__all__ = [
    "accuracy_curve",
    "accuracy_heatmap",
    "accuracy_over_time",
    "against_forgetting",
    "by_depth",
    "by_setting",
    "comparison",
    "confusion",
    "continual_tradeoff",
    "cumulative_energy",
    "decomposition",
    "depth_map",
    "feature_maps",
    "forgetting_by_position",
    "forgetting_curve",
    "forgotten_examples",
    "fronts_by_method",
    "house_style",
    "learning_curve",
    "learning_curves",
    "overlap",
    "predictors",
    "robustness",
    "rotation_matrix",
    "shares",
    "small_multiples",
    "spectrum",
    "surface",
    "token_shares",
    "tradeoff",
    "update_over_time",
    "watched",
    "window_survival",
]
