"""Protocols of image features: names of extractors, and when two sets of features are comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.compatibility import Origin
from stages.weights.networks import NetworkFile

INCEPTION_FEATURES, INCEPTION_LOGITS = 2048, 1008

ExtractorKind = Literal["classifier", "inception", "inception-pytorch-fid"]


@dataclass(frozen=True)
class Extractor:
    """What describes images. id: tells it from others.  features, logits: how many values it gives of an image."""

    kind: ExtractorKind
    id: str
    features: int
    logits: int


@dataclass(frozen=True)
class ExtractorFile:
    """An extractor, its weights, and the device that it runs on; picklable."""

    kind: ExtractorKind
    device: str
    classifier: NetworkFile | None = None
    weights: Path | None = None


def inception(kind: ExtractorKind) -> Extractor:
    """The published Inception, under one of its inputs."""
    return Extractor(kind, f"{kind}-6726825d", INCEPTION_FEATURES, INCEPTION_LOGITS)


@dataclass(frozen=True)
class Description:
    """What features depend on besides the images. extractors: those of distances.  size, views: None if unknown."""

    extractors: tuple[Origin, ...]
    size: int | None = None
    views: Any = None

    def contradiction(self, other: Description) -> tuple[str, str] | None:
        """How two descriptions differ, in words for each; None where their features can be compared."""
        pairs = zip(self.extractors, other.extractors, strict=False)
        if len(self.extractors) != len(other.extractors) or any(one.differs(another) for one, another in pairs):
            return self._by(), other._by()
        for words, one, another in (("at {} pixels", self.size, other.size), ("in views {}", self.views, other.views)):
            if None not in (one, another) and one != another:
                return words.format(one), words.format(another)
        return None

    def _by(self) -> str:
        return f"by {', '.join(map(str, self.extractors))}"
