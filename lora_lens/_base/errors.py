"""The exceptions that lora_lens raises on purpose: something about the input, and what to do about it.

Each is a :class:`LoraLensError` and also the built-in exception that fits, so ``except ValueError`` works as
usual, while ``except ll.errors.LoraLensError`` tells a mistake in the input from a bug in the package.
"""


class LoraLensError(Exception):
    """Base of all exceptions that lora_lens raises on purpose; any other exception is a bug."""


class InputError(LoraLensError, ValueError):
    """A value, a file's content or a model that cannot be worked with."""


class InputTypeError(LoraLensError, TypeError):
    """An object of another type than expected, or a setting that does not exist."""


class MissingFileError(LoraLensError, FileNotFoundError):
    """A file or folder that is not there."""


class ExistingFileError(LoraLensError, FileExistsError):
    """Something is where a file should be written, and it is not lora_lens's to replace."""


class StoreError(LoraLensError, OSError):
    """A file or folder that cannot be written."""


class MissingPackageError(LoraLensError, ImportError):
    """An optional package that is needed and not installed."""


class EngineError(LoraLensError, RuntimeError):
    """A cluster that runs were handed to is gone."""
