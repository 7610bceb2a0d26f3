"""How a window gets into a model as a LoRA adapter, and out of it: attach, save, export, detach."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
