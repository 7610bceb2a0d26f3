"""What all other packages use, and nothing about LoRA: checks at the door, errors, hashes, threads, names."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
