"""Token sets: images as discrete codes, in files that anybody can reuse. Needs numpy and zarr alone."""

from smalti.errors import CorruptError, InputError, SmaltiError, UsageError

__version__ = "0.1.0"
__all__ = ["CorruptError", "InputError", "SmaltiError", "UsageError", "__version__"]
