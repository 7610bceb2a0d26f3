"""What a model can be taught or asked: examples, and how answers to them are read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
