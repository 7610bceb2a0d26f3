"""One page to hand on, a sweep in words, tables and pictures; and sentences that follow a table."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
