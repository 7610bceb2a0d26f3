"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
