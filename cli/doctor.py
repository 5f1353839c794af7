"""`smalti doctor`: versions, devices, disk, what is missing and how to get it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import filesize

from cli import options
from cli.output import guarded, print_json, print_table, say
from pipeline.cores import core_count
from pipeline.errors import CorruptError
from pipeline.runlog import versions
from pipeline.stage import Place
from stages import stages

NEEDED = ("torch", "torchvision", "numpy", "zarr", "faiss", "timm", "dask", "distributed", "torch_fidelity", "sklearn")
OPTIONAL = {
    "lpips": "LPIPS in losses and scores: pip install lpips",
    "skimage": "SSIM in scores: pip install scikit-image",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check: found or missing, and what to do."""

    what: str
    found: str
    advice: str = ""
    required: bool = False


@guarded
def doctor(store: options.StoreOption = options.DEFAULT_STORE, json: options.JsonOption = False) -> None:
    """Check this machine: versions, devices, disk, what is missing and how to get it.

    Example: smalti doctor
    """
    findings = [*_machine(), *_libraries(), *_devices(), _disk(store), *_weights()]
    broken = [item for item in findings if item.required and item.advice]
    if json:
        print_json({"ok": not broken, "findings": [vars(item) for item in findings], "versions": versions()})
    else:
        print_table("doctor", ["what", "found", "advice"], [[item.what, item.found, item.advice] for item in findings])
        say("a requirement is missing: see the advice above" if broken else "all requirements are met")
    if broken:
        raise SystemExit(70)


def _machine() -> list[Finding]:
    return [
        Finding("python", platform.python_version()),
        Finding("platform", f"{platform.system()} {platform.machine()}"),
        Finding("cores", str(core_count())),
    ]


def _libraries() -> list[Finding]:
    needed = [_library(name, "pip install -c constraints.txt ./smalti .", required=True) for name in NEEDED]
    return needed + [_library(name, advice, required=False) for name, advice in OPTIONAL.items()]


def _library(name: str, advice: str, *, required: bool) -> Finding:
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        return Finding(name, f"missing ({error})", advice, required)
    return Finding(name, str(getattr(module, "__version__", "here")), "", required)


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("cuda", "none", "", False)]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Finding("cuda", ", ".join(names))]


def _disk(store: Path) -> Finding:
    folder = store.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    return Finding(
        f"disk at {store}", f"{filesize.decimal(free)} free", "" if writable else "choose another --store", True
    )


def _weights() -> list[Finding]:
    """Published files that stages look for in a cache of this machine."""
    externals = [(stage, name, item) for stage in stages().values() for name, item in stage.externals.items()]
    users: dict[Place, list[str]] = {}
    for stage, name, item in externals:
        for place in item.usual:
            users.setdefault(place, []).append(f"{stage.name} --{name}")
    return [_weight_file(place, " or ".join(options)) for place, options in users.items()]


def _weight_file(place: Place, options: str) -> Finding:
    advice = f"it is downloaded when it is needed; without network, fetch {place.url} and give it: {options} FILE"
    found = place.find()
    if found is None:
        return Finding(place.what, "missing", advice)
    try:
        place.check(found)
    except CorruptError as error:
        return Finding(place.what, error.message, advice)
    return Finding(place.what, str(found))
