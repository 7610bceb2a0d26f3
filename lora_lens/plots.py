"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

from lora_lens.continual_plots import accuracy_heatmap, accuracy_over_time, update_over_time, window_survival
from lora_lens.continual_score_plots import continual_tradeoff, forgetting_by_position
from lora_lens.drift_plots import against_forgetting, predictors, rotation_matrix, shares
from lora_lens.item_plots import confusion, forgotten_examples
from lora_lens.plot_style import house_style
from lora_lens.setting_plots import by_setting
from lora_lens.spectrum_plots import (
    by_depth,
    cumulative_energy,
    depth_map,
    overlap,
    small_multiples,
    spectrum,
)
from lora_lens.sweep_plots import (
    accuracy_curve,
    forgetting_curve,
    learning_curve,
    learning_curves,
    tradeoff,
    watched,
)
from lora_lens.text_plots import token_shares
from lora_lens.tradeoff_plots import comparison, fronts_by_method, robustness, surface
from lora_lens.window_plots import decomposition, feature_maps

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
