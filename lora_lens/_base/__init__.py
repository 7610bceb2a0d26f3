"""What all other packages use, and nothing about LoRA: checks at the door, errors, hashes, threads, names."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
