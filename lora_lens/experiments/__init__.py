"""Many runs: grids, sweeps, their store on disk, and what to take from them."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
