"""What is inside a weight: its singular values and vectors, of a model or of a file, and windows on them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
