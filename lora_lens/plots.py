"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

from lora_lens.plot_style import house_style
from lora_lens.spectrum_plots import (
    by_depth,
    cumulative_energy,
    decomposition,
    depth_map,
    feature_maps,
    overlap,
    small_multiples,
    spectrum,
)
from lora_lens.sweep_plots import accuracy_curve, forgetting_curve, learning_curve, tradeoff

__all__ = [
    "accuracy_curve",
    "by_depth",
    "cumulative_energy",
    "decomposition",
    "depth_map",
    "feature_maps",
    "forgetting_curve",
    "house_style",
    "learning_curve",
    "overlap",
    "small_multiples",
    "spectrum",
    "tradeoff",
]
