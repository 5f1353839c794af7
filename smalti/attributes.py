"""The metadata of a token set: the `smalti` object in the attributes of its group, format version 1.

FORMAT.md in this folder lists the fields. Six are required; a field that is None or empty is left out of the file. Unknown
fields are kept in `extra`, so that copying a token set loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from smalti.errors import UsageError, corrupt_error
from smalti.json_files import Json, check_format

FORMAT = 1
LARGEST_CODES = 2**32 - 1  # the dtype's maximum is reserved as fill value


@dataclass(frozen=True, kw_only=True)
class TokenAttributes:
    """Facts of a token set.

    name: of the dataset.  n_images, n_crops: counts.  grid: (height, width) in tokens.  codes: size of the codebook,
    every code lies in [0, codes).  classes: every label lies in [0, classes); 1 where there are none.
    factors: sizes of the sub-tokens of one code, for example (64, 4096), their product is codes; factor_order says
    which comes first in the bits.  tokenizer: {id, family, config_sha256, weights_sha256}.  crops: one object
    {id, kind, flip, scale} for each crop.  source: {name, licence, terms_url, files_sha256}.
    created_by: key of the stage that made it.
    """

    name: str
    n_images: int
    n_crops: int
    grid: tuple[int, int]
    codes: int
    classes: int
    split: str | None = None
    scan_order: str = "raster"
    factors: tuple[int, ...] | None = None
    factor_order: str | None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    resize_filter: str | None = None
    value_range: tuple[float, float] | None = None
    crops: tuple[Mapping[str, Any], ...] = ()
    exif: str | None = None
    colour: str | None = None
    class_names: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    created_by: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("grid", "factors", "value_range", "crops", "class_names"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        problem = _problem(self)
        if problem:
            raise UsageError(f"the attributes of the token set are not valid: {problem}")

    @property
    def tokens(self) -> int:
        """Count of tokens of one crop."""
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """Count of (image, crop) pairs; row = image * n_crops + crop."""
        return self.n_images * self.n_crops

    @property
    def dtype(self) -> str:
        """uint16 if no code is its maximum (the fill value), else uint32."""
        return "uint16" if self.codes <= 2**16 - 1 else "uint32"


def attributes_to_document(attributes: TokenAttributes) -> dict[str, Any]:
    """The group's attributes, `{"smalti": {"format": 1, ...}}`, ready for JSON."""
    known = {name: _plain(value) for name, value in asdict(attributes).items() if name != "extra"}
    given = {name: value for name, value in known.items() if value is not None and value != [] and value != {}}
    return {"smalti": {"format": FORMAT, **given, **_plain(dict(attributes.extra))}}


def attributes_from_document(document: Json, path: str) -> TokenAttributes:
    """The facts in a parsed zarr.json of a group; CorruptError, naming path, where they are missing or impossible."""
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or document.get("zarr_format") != 3 or document.get("node_type") != "group":
        raise corrupt_error(path, "is not the metadata of a zarr version 3 group")
    found = attributes.get("smalti")
    if not isinstance(found, dict):
        raise corrupt_error(path, "has no attributes named smalti", hint="open a folder that is a token set")
    check_format(found.get("format"), FORMAT, path)
    known = {item.name for item in fields(TokenAttributes)} - {"extra"}
    given = {name: value for name, value in found.items() if name in known}
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise corrupt_error(path, f"lacks the attributes {', '.join(missing)}")
    extra = {name: value for name, value in found.items() if name not in known | {"format"}}
    try:
        return TokenAttributes(**given, extra=extra)
    except UsageError as cause:
        raise corrupt_error(path, f"has invalid attributes ({cause.message})") from cause


_REQUIRED = ("name", "n_images", "n_crops", "grid", "codes", "classes")


def _problem(of: TokenAttributes) -> str | None:
    """The first invalid attribute in a sentence, or None."""
    for name, is_right, expected in _RULES:
        value = getattr(of, name)
        if not is_right(value):
            return f"{name} is {str(value)[:80]!r}, expected {expected}"
    if of.class_names and len(of.class_names) != of.classes:
        return f"{len(of.class_names)} class names are given for {of.classes} classes"
    if of.crops and len(of.crops) != of.n_crops:
        return f"{len(of.crops)} crops are described, but n_crops is {of.n_crops}"
    if of.factors and math.prod(of.factors) != of.codes:
        return f"factors {list(of.factors)} multiply to {math.prod(of.factors)}, but there are {of.codes} codes"
    return None


def _count(largest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= largest


def _optional(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _tuple(is_right: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, tuple) and (not lengths or len(value) in lengths) and all(map(is_right, value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", lambda value: _is_text(value) and value != "", "a name"),
    ("n_images", _count(2**48), "a positive count"),
    ("n_crops", _count(2**20), "a positive count"),
    ("grid", _tuple(_count(2**15), 2), "(height, width) in tokens"),
    ("codes", _count(LARGEST_CODES), f"a count from 1 to {LARGEST_CODES}"),
    ("classes", _count(2**31 - 1), "a positive count"),
    ("factors", _optional(_tuple(_count(LARGEST_CODES))), "sizes whose product is codes"),
    (
        "value_range",
        _optional(_tuple(lambda value: type(value) in (int, float) and math.isfinite(value), 2)),
        "(lowest, highest)",
    ),
    ("resolution", _optional(_count(2**20)), "a count of pixels"),
    ("scan_order", _is_text, "text"),
    *((name, _optional(_is_text), "text") for name in ("split", "factor_order", "resize_filter", "exif", "colour")),
    *((name, _optional(_is_text), "text") for name in ("licence", "created_by")),
    *((name, _is_object, "an object") for name in ("tokenizer", "source", "extra")),
    ("crops", _tuple(_is_object), "one object for each crop"),
    ("class_names", _tuple(_is_text), "a list of names"),
)


def _plain(value: Any) -> Json:
    """The value with tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
