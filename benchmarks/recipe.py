"""The default recipe as a user runs it: the first run, and a second that finds everything done (whole processes)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path("recipes/digits/rar.yaml")
FIRST_LIMIT, SECOND_LIMIT = 360.0, 10.0


def main() -> None:
    """Print the table; one run each, since the first takes minutes."""
    with tempfile.TemporaryDirectory() as store:
        first, second = _seconds(store), _seconds(store)
    print("| run of `recipes/digits/rar.yaml` | seconds | limit | share of it |")
    print("|---|---|---|---|")
    print(f"| first, from an empty store | {first:.0f} | {FIRST_LIMIT:.0f} | {first / FIRST_LIMIT:.2f} |")
    print(f"| second, nothing to do | {second:.1f} | {SECOND_LIMIT:.0f} | {second / SECOND_LIMIT:.2f} |")


def _seconds(store: str) -> float:
    started = time.perf_counter()
    command = [str(Path(sys.executable).with_name("smalti")), "run", str(RECIPE), "--store", store, "--quiet", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
