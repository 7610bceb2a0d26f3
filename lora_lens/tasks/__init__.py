"""What a model can be taught or asked: examples, and how answers to them are read."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
