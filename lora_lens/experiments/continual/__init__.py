"""Tasks one after the other: strategies, sweeps over them, and what they leave behind."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
