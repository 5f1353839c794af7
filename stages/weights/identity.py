"""The identity of a tokenizer: the digests of its config and weights.

Every token set has the identity of its tokenizer as the `tokenizer` object of its attributes; a generator has that of the
token set it was trained on. Decoding compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError
from pipeline.keys import canonical_bytes, sha256
from stages.weights.files import CONFIG, WEIGHTS

COMPARED = ("config_sha256", "weights_sha256")
CODES_OF = "codes_of"  # the fact that names the tokenizer whose codes another one makes, too


def identity_of(artifact: Artifact, family: str) -> dict[str, str]:
    """`{id, family, config_sha256, weights_sha256}` of a tokenizer or codebook artifact, read from its manifest.

    id: SHA-256 of the two digests.  family: the quantizer's kind, or "kmeans" for a codebook. A tokenizer of which only
    the decoder was trained makes the codes of its parent, and has its identity.
    """
    if CODES_OF in artifact.facts:
        return {str(name): str(value) for name, value in artifact.facts[CODES_OF].items()}
    return identity_by({file: _digest(artifact, file) for file in (CONFIG, WEIGHTS)}, family)


def identity_by(files: Mapping[str, str], family: str) -> dict[str, str]:
    """The identity of a tokenizer whose files have these SHA-256."""
    digests = dict(zip(COMPARED, (files[CONFIG], files[WEIGHTS]), strict=True))
    return {"id": sha256(canonical_bytes(digests)), "family": family, **digests}


def is_same_tokenizer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities have the same digests of config and weights; False if one lacks a digest."""
    return all(name in one and one[name] == other.get(name) for name in COMPARED)


def check_same_tokenizer(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str, by: str, path: Path
) -> None:
    """CorruptError (exit code 4) unless `what` (which carries `found`) belongs to the tokenizer of `by` (`wanted`)."""
    if not found:
        raise CorruptError(
            f"{what} does not say which tokenizer made its codes, so that they cannot be told to be those of {by}",
            path=path,
            hint="name it where the codes are made: `smalti sample --tokenizer`, or the attribute `tokenizer` (id, family, "
            "config_sha256, weights_sha256) of smalti.create_tokens",
        )
    if not is_same_tokenizer(found, wanted):
        raise CorruptError(
            f"{what} was made with another tokenizer than {by}: weights {_short(found)}, expected {_short(wanted)}",
            path=path,
            hint="give the tokenizer that made the codes, or make the codes again with this one",
        )


def _digest(artifact: Artifact, file: str) -> str:
    artifact.file(file)
    return artifact.files[file].sha256


def _short(identity: Mapping[str, Any]) -> str:
    return str(identity.get("weights_sha256", "unknown"))[:12]
