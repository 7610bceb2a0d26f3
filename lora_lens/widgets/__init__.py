"""Explorers for notebooks: the library's own calls, pictures and tables under sliders.

- ``spectrum_explorer``: singular values of one or several models, with a window to slide over them
- ``metric_explorer``: spectra of one weight in several metrics; do their windows hold the same directions?
- ``window_explorer``: what a window cuts out of a weight and of features, while the answers stay
- ``expert_explorer``: the experts of a mixture: which is unlike the others, and do their windows differ?
- ``training_explorer``: train a window and watch both tasks; pause, stop, compare runs
- ``tradeoff_explorer``: a sweep's runs, to filter, brush and pick; what a picked run did
- ``pair_explorer``: two windows or methods side by side, paired by seed
- ``comparison_explorer``: forgetting by position, with the learning made equal
- ``forgotten_explorer``: which examples were forgotten, and what they were taken for
- ``continual_explorer``: sequences of tasks
- ``growth_explorer``: a training's checkpoints: what was forgotten by then, and which layers had moved
- ``rewind_explorer``: the ways back from a trained adapter
- ``pages``: several of them under tabs

Each explorer already shows a sensible view; its controls are keyword arguments, too, by their labels. Bad
arguments raise at the door; what does not work later, at some setting of the controls, is said in place until
the controls are moved again.
"""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
