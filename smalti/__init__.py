"""Token sets: images as discrete codes, in files for reuse. Needs only numpy and zarr.

token_set = smalti.open_tokens("folder")
token_set = smalti.create_tokens("new-folder", codes_ICT, labels=labels_I, codes=1024, grid=(16, 16), name="mine")
smalti.verify_tokens("folder")
"""

from smalti.attributes import FORMAT, TokenAttributes
from smalti.epoch import Epoch, TokenDataset
from smalti.errors import CorruptError, InputError, SmaltiError, UsageError
from smalti.tokens import TokenSet, open_tokens, verify_tokens
from smalti.writing import create_tokens

__version__ = "0.1.0"
__all__ = [
    "FORMAT",
    "CorruptError",
    "Epoch",
    "InputError",
    "SmaltiError",
    "TokenAttributes",
    "TokenDataset",
    "TokenSet",
    "UsageError",
    "__version__",
    "create_tokens",
    "open_tokens",
    "verify_tokens",
]
