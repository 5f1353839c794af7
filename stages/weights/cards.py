"""Cards: records of tokenizers, codebooks and generators in config.json, with their code spaces.

No torch here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from models.config import Config
from models.encoders.config import EncoderConfig
from models.generators.config import CodeShape, GeneratorConfig
from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import Artifact
from pipeline.compatibility import either, made_by
from pipeline.errors import CorruptError, UsageError
from smalti.attributes import TokenAttributes
from stages.weights.files import load_config
from stages.weights.identity import check_same_tokenizer, identity_of

CardT = TypeVar("CardT")


class CodebookConfig(Config):
    """config.json of a codebook: the features of an encoder, and how many centroids they have."""

    kind: Literal["kmeans"]
    clusters: int = Field(ge=1)
    encoder: EncoderConfig


@dataclass(frozen=True)
class TokenizerCard:
    """A tokenizer, or a codebook, which has no decoder.

    codes: how many.  pixels: a side of the images that it was made for, None where it does not say.  identity: what tells it
    from others (`stages.weights.identity`).
    """

    name: str
    path: Path
    config: TokenizerConfig | CodebookConfig
    codes: int
    pixels: int | None
    identity: dict[str, str]

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """Of a tokenizer or codebook artifact; CorruptError (exit code 4) where its config does not fit this version."""
        if artifact.kind == "codebook":
            book = read_config(artifact, CodebookConfig)
            identity = identity_of(artifact, book.kind)
            return cls(artifact.name, artifact.path, book, book.clusters, book.encoder.image_size, identity)
        config = read_config(artifact, TokenizerConfig)
        pixels = artifact.facts.get("image_size", artifact.facts.get("resolution"))
        identity = identity_of(artifact, config.quantizer.kind)
        return cls(artifact.name, artifact.path, config, config.codebook_size, pixels and int(pixels), identity)

    @property
    def decoder(self) -> TokenizerConfig:
        """The config of a tokenizer; CorruptError of a codebook."""
        if isinstance(self.config, TokenizerConfig):
            return self.config
        raise CorruptError(
            f"{self.name} is a K-Means codebook, which has no decoder: its codes cannot become images",
            path=self.path,
            hint="give a tokenizer of train-tokenizer or import-weights",
        )

    def grid(self, pixels: int) -> tuple[int, int]:
        """Rows and columns of codes of a square image; UsageError where images of this size cannot be encoded."""
        if isinstance(self.config, CodebookConfig):
            accepts = self.config.encoder.accepts
            if pixels not in accepts:
                raise UsageError(
                    f"{self.name} takes images of {either(accepts)} pixels, but views.size is {pixels}",
                    hint=f"set views.size to {self.pixels}",
                )
            return self.config.encoder.grid
        try:
            return self.config.grid(pixels, pixels)
        except ValueError as error:
            raise UsageError(f"views.size {pixels} does not fit {self.name}: {error}") from error


class CodeSpace(Config):
    """The codes of a token set, as a generator keeps them.

    tokenizer: identity of what made the codes; empty if that is not known.  resolution: pixels of the images behind them.
    """

    codes: int = Field(ge=1)
    grid: tuple[int, int] = Field(strict=False)
    classes: int = Field(ge=1)
    class_names: tuple[str, ...] = Field((), strict=False)
    factors: tuple[int, ...] = Field((), strict=False)
    tokenizer: dict[str, str] = Field({})
    resolution: int | None = None

    @classmethod
    def of(cls, attributes: TokenAttributes) -> Self:
        return cls(
            codes=attributes.codes,
            grid=attributes.grid,
            classes=attributes.classes,
            class_names=attributes.class_names,
            factors=attributes.factors or (),
            tokenizer={name: str(value) for name, value in attributes.tokenizer.items()},
            resolution=attributes.resolution,
        )

    def join(self, tokenizer: TokenizerCard, *, what: str, role: str, path: Path) -> Self:
        """With the identity of this tokenizer or codebook; with the grid of a codebook, which has one.

        CorruptError (exit code 4) where it has other codes, or is not the one that the codes name.
        """
        if tokenizer.codes != self.codes:
            raise CorruptError(
                f"{what} is {role} of {self.codes} codes, but {tokenizer.name} has {tokenizer.codes}",
                path=path,
                hint="give the tokenizer that it was trained with",
            )
        if self.tokenizer:
            check_same_tokenizer(self.tokenizer, tokenizer.identity, what=what, by=tokenizer.name, path=path)
        if isinstance(tokenizer.config, CodebookConfig):
            sizes = {"grid": tokenizer.config.encoder.grid, "resolution": tokenizer.pixels}
        else:
            sizes = {"resolution": self.grid[0] * tokenizer.decoder.downsample}
        return self.model_copy(update={"tokenizer": tokenizer.identity, **sizes})

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def shape(self) -> CodeShape:
        return CodeShape(codes=self.codes, grid=self.grid, classes=self.classes, factors=self.factors)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of these codes for a manifest."""
        return {
            "codes": self.codes,
            "grid": list(self.grid),
            "classes": self.classes,
            "tokenizer": self.tokenizer,
            **({"factors": list(self.factors)} if self.factors else {}),
        }


class GeneratorCard(Config):
    """config.json of a generator: the network, the codes that it draws, and those that it is given, if it is given some."""

    model: GeneratorConfig
    space: CodeSpace
    condition: CodeSpace | None = None

    @property
    def shape(self) -> CodeShape:
        """The code shape that the network is built for."""
        return self.space.shape.model_copy(update={"condition": self.condition and self.condition.shape})

    def join(self, tokenizer: TokenizerCard, *, what: str, path: Path) -> Self:
        """With this tokenizer in it: that of a published generator is not in its file, but given beside it.

        CorruptError (exit code 4) where it has other codes than the generator, or is not the tokenizer that the card names.
        """
        return self.model_copy(update={"space": self.space.join(tokenizer, what=what, role="a generator", path=path)})

    def join_condition(self, tokenizer: TokenizerCard, *, what: str, path: Path) -> Self:
        """With this tokenizer or codebook as that of its condition; CorruptError as in `join`, or where it takes none."""
        if self.condition is None:
            raise CorruptError(f"{what} has no codes of another space as its condition: leave condition out", path=path)
        condition = self.condition.join(tokenizer, what=what, role="a generator for a condition", path=path)
        return self.model_copy(update={"condition": condition})


def read_card(artifact: Artifact) -> GeneratorCard:
    return read_config(artifact, GeneratorCard)


def digest_of(made: Artifact | None) -> str | None:
    """What tells a finished tokenizer from others in `pipeline.compatibility`; None of one that is not made."""
    if made is None:
        return None
    origin = made_by(TokenizerCard.of(made).identity, made.name)
    return origin.digest if origin else None


def read_config(artifact: Artifact, model: type[CardT]) -> CardT:
    """Its config.json; one that does not validate belongs to another version or was altered: CorruptError (exit code 4)."""
    try:
        return TypeAdapter(model).validate_json(json.dumps(load_config(artifact)))
    except ValidationError as error:
        complaint = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in complaint["loc"])
        raise CorruptError(
            f"config.json of {artifact.name} does not fit this version: {place}: {complaint['msg']}", path=artifact.path
        ) from error
