"""One short training run: a loop, and what holds a model back from forgetting."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
