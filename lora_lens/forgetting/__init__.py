"""What training changed: what was learned and forgotten, in which examples, in which directions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
