"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

from lora_lens._base.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
