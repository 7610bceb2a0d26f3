"""Many runs: grids, sweeps, their store on disk, and what to take from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
