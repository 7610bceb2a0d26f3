"""What training changed: what was learned and forgotten, in which examples, in which directions."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
