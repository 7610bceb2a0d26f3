"""Where runs are computed: this machine's processes, Dask's workers or Ray's."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
