"""What is inside a weight: its singular values and vectors, of a model or of a file, and windows on them."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
