"""The files of a token set beside its arrays, as bytes: dataset card, croissant.json, SHA256SUMS.

They are functions of the attributes and the list of files, without time or host: the same set gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from smalti.attributes import TokenAttributes
from smalti.counting import counted
from smalti.listing import FileEntry

CROISSANT = "http://mlcommons.org/croissant/1.1"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
}  # https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html, the terms that are used here


def card_bytes(attributes: TokenAttributes) -> bytes:
    """README.md: the YAML header of dataset hubs, a summary, and how to open the set."""
    cells = {name: str(value).replace("|", "\\|").replace("\n", " ") for name, value in _facts(attributes)}
    facts = "\n".join(f"| {name} | {cell if cell != 'None' else 'not stated'} |" for name, cell in cells.items())
    return f"""{_header(attributes)}
# {attributes.name}: images as discrete codes

{_summary(attributes)}

| | |
|---|---|
{facts}

## Use

```python
import smalti

token_set = smalti.open_tokens("path/to/this/folder")
for rows, codes, labels in token_set.epoch(512, seed=0, epoch=0):
    ...
```

The folder is a zarr version 3 group, so any zarr library reads it as well:
`zarr.open_group(path, mode="r")["tokens"]` has axes image, crop, token; `labels` has one class for each image,
`keys` its name as UTF-8 bytes. The value {2**16 - 1 if attributes.dtype == "uint16" else 2**32 - 1} never stands for a code.

## Licence and source

{_licence(attributes)}
""".encode()


def croissant_bytes(
    attributes: TokenAttributes,
    files: Iterable[FileEntry],
    *,
    url: str | None = None,
    creator: str | None = None,
    published: str | None = None,
) -> bytes:
    """croissant.json (Croissant 1.1). url, creator and published (a date) are known when a set is published."""
    said = {
        "url": url or attributes.source.get("terms_url"),
        "license": attributes.licence,
        "creator": None if creator is None else {"@type": "sc:Organization", "name": creator},
        "datePublished": published,
    }
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CROISSANT,
        "name": attributes.name,
        "description": _summary(attributes),
        **{name: value for name, value in said.items() if value is not None},
        "distribution": [_file_object(entry) for entry in sorted(files, key=lambda entry: entry.path)],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def sums_bytes(files: Iterable[FileEntry]) -> bytes:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{entry.sha256}  {entry.path}\n" for entry in sorted(files, key=lambda entry: entry.path)).encode()


def _header(attributes: TokenAttributes) -> str:
    rows = attributes.rows
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    lines = [
        "---",
        f"pretty_name: {json.dumps(attributes.name, ensure_ascii=False)}",
        "license: other",
        f"license_name: {json.dumps(attributes.licence or 'not stated', ensure_ascii=False)}",
        "task_categories:",
        "- unconditional-image-generation",
        "tags:",
        "- image-tokens",
        "- zarr",
        "size_categories:",
        f"- {names[sum(rows >= 10**power for power in range(3, 9))]}",
        "---",
    ]
    return "\n".join(lines) + "\n"


def _summary(attributes: TokenAttributes) -> str:
    family = attributes.tokenizer.get("family")
    by = f" by a tokenizer of family {family}" if family else ""
    return (
        f"{counted(attributes.n_images, 'image')} of {attributes.name}, {counted(attributes.n_crops, 'crop')} of each, turned into "
        f"{attributes.grid[0]} x {attributes.grid[1]} codes out of {attributes.codes}{by}. "
        f"Labels are 0 to {attributes.classes - 1}."
    )


def _facts(attributes: TokenAttributes) -> Iterable[tuple[str, Any]]:
    yield from (
        ("split", attributes.split),
        ("images", attributes.n_images),
        ("crops", attributes.n_crops),
        ("grid", f"{attributes.grid[0]} x {attributes.grid[1]}, {attributes.scan_order}"),
        ("codes", attributes.codes),
        ("sub-tokens", attributes.factors and " x ".join(map(str, attributes.factors))),
        ("dtype", attributes.dtype),
        ("classes", attributes.classes),
        ("resolution", attributes.resolution),
        ("resize filter", attributes.resize_filter),
        ("value range", attributes.value_range and f"{attributes.value_range[0]} to {attributes.value_range[1]}"),
        ("EXIF rotation", attributes.exif),
        ("colour", attributes.colour),
    )
    yield from ((f"tokenizer {name}", value) for name, value in attributes.tokenizer.items())
    yield from ((f"source {name}", value) for name, value in attributes.source.items())
    yield ("created by", attributes.created_by)


def _licence(attributes: TokenAttributes) -> str:
    source = attributes.source.get("name", attributes.name)
    terms = attributes.source.get("terms_url")
    return (
        f"Licence of this set: {attributes.licence or 'not stated'}. The codes are derived from {source}"
        f"{f' ({terms})' if terms else ''}; the terms of the source apply to them too."
    )


def _file_object(entry: FileEntry) -> dict[str, Any]:
    kinds = {".json": "application/json", ".md": "text/markdown"}
    suffix = "." + entry.path.rsplit(".", 1)[-1]
    size = {} if entry.size is None else {"contentSize": f"{entry.size} B"}
    return {
        "@type": "cr:FileObject",
        "@id": entry.path,
        "name": entry.path,
        "contentUrl": entry.path,
        "encodingFormat": kinds.get(suffix, "application/octet-stream"),
        **size,
        "sha256": entry.sha256,
    }
