"""Explorers for notebooks: the library's own calls, pictures and tables under sliders.

Each returns one container that already shows a sensible view. Bad arguments
raise at the door; what does not work later, at some setting of the controls,
is said in place until the controls are moved again.
"""

from lora_lens.continual_explorers import continual_explorer
from lora_lens.item_explorers import forgotten_explorer
from lora_lens.pages import pages
from lora_lens.spectrum_explorer import spectrum_explorer
from lora_lens.tradeoff_explorers import comparison_explorer, tradeoff_explorer
from lora_lens.training_explorer import training_explorer
from lora_lens.window_explorer import window_explorer

__all__ = [
    "comparison_explorer",
    "continual_explorer",
    "forgotten_explorer",
    "pages",
    "spectrum_explorer",
    "tradeoff_explorer",
    "training_explorer",
    "window_explorer",
]
