"""Explorers for notebooks: the library's own calls, pictures and tables under sliders.

- ``spectrum_explorer``: singular values of one or several models, with a window to slide over them
- ``window_explorer``: what a window cuts out of a weight and of features, while the answers stay
- ``training_explorer``: train a window and watch both tasks; pause, stop, compare runs
- ``tradeoff_explorer``: a sweep's runs, to filter, brush and pick; what a picked run did
- ``pair_explorer``: two windows or methods side by side, paired by seed
- ``comparison_explorer``: forgetting by position, with the learning made equal
- ``forgotten_explorer``: which examples were forgotten, and what they were taken for
- ``continual_explorer``: sequences of tasks
- ``pages``: several of them under tabs

Each explorer already shows a sensible view. Bad arguments raise at the door; what does not work later,
at some setting of the controls, is said in place until the controls are moved again.
"""

from lora_lens.widgets._pages import pages
from lora_lens.widgets.continual import continual_explorer
from lora_lens.widgets.fair_comparison import comparison_explorer
from lora_lens.widgets.forgotten import forgotten_explorer
from lora_lens.widgets.live_training import training_explorer
from lora_lens.widgets.one_window import window_explorer
from lora_lens.widgets.spectra import spectrum_explorer
from lora_lens.widgets.trade_off import tradeoff_explorer
from lora_lens.widgets.two_windows import pair_explorer

__all__ = [
    "comparison_explorer",
    "continual_explorer",
    "forgotten_explorer",
    "pages",
    "pair_explorer",
    "spectrum_explorer",
    "tradeoff_explorer",
    "training_explorer",
    "window_explorer",
]
