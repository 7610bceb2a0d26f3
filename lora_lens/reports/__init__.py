"""One page to hand on, a sweep in words, tables and pictures; and sentences that follow a table."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
