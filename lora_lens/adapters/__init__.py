"""How a window gets into a model as a LoRA adapter, and out of it: attach, save, export, detach."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
