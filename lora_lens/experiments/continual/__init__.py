"""Tasks one after the other: strategies, sweeps over them, and what they leave behind."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
