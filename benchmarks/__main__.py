"""`make bench`: every benchmark in turn, as Markdown on stdout. Run it on an idle machine; quote ratios, not seconds.

`python -m benchmarks large` is apart from them: memory and time at ImageNet's sizes (see benchmarks/large).
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks import large
from benchmarks.machine import describe_machine

MODULES = ("tokens", "sampling", "llama", "digit", "quantizers", "kmeans", "recipe")


def main() -> None:
    if sys.argv[1:2] == ["large"]:
        large.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], help="benchmarks to run; none: all")
    names = parser.parse_args().names or MODULES
    print(describe_machine())
    for name in names:
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
