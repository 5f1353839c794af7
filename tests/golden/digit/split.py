"""The fixtures of DiGIT's generators as they lie here: what several of them have in common, once.

python tests/golden/digit/split.py FOLDER-OF-THE-FIXTURES

Nothing else is changed or left out: a fixture is its own file, `common.safetensors`, and for stage 2 `vqgan.safetensors`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FIXTURES = ("stage1_uncond", "stage1_classcond", "stage2_ar", "stage2_nar", "vq_baseline")
SHARED = {
    "common": ("in/imgs_uint8", "weights/pretrained_encoder.", "weights/centroids", "weights/centroid_norm"),
    "vqgan": ("weights/vqgan.",),
}


def main(folder: Path) -> None:
    shared = {name: {} for name in SHARED}
    for fixture in FIXTURES:
        arrays = load_file(folder / f"{fixture}.safetensors")
        for name, prefixes in SHARED.items():
            for key in [key for key in arrays if key.startswith(prefixes)]:
                tensor = arrays.pop(key)
                if not tensor.equal(shared[name].setdefault(key, tensor)):
                    raise ValueError(f"{fixture} has another {key} than the fixtures before it")
        save_file(arrays, HERE / f"{fixture}.safetensors")
        shutil.copyfile(folder / f"{fixture}.json", HERE / f"{fixture}.json")
    for name, arrays in shared.items():
        save_file(arrays, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
