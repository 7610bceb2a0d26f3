"""One short training run: a loop, and what holds a model back from forgetting."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
