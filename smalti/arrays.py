"""The array layer that every stage writes and reads: tokens, features, images, boxes.

    spec = ArraySpec(shape=(1000, 10, 256), dtype="uint16", chunk_rows=128, shard_rows=256)
    metadata_bytes(spec)                         the array's zarr.json
    encode_shard(spec, 3, block)                 ("c/3/0/0", bytes)
    group_files({"smalti": {...}}, specs)        the zarr.json of a group, and of each of its arrays
    MappedArray(folder).rows([5, 900, 2])        checked, then mapped

Writers put these bytes where they belong; readers need nothing of ours, since any zarr version 3 library opens them.
"""

from smalti.encoding import cast_in_range, encode_shard, group_files, metadata_bytes
from smalti.layout import ArraySpec, Profile
from smalti.mapped import ArrayVerify, MappedArray

__all__ = [
    "ArraySpec",
    "ArrayVerify",
    "MappedArray",
    "Profile",
    "cast_in_range",
    "encode_shard",
    "group_files",
    "metadata_bytes",
]
