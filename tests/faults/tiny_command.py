"""The real command line over the tiny stages: `PYTHONPATH=. python tests/faults/tiny_command.py run ...`."""

from __future__ import annotations

import sys

from tiny_stages import STAGES

import stages

stages.stages = lambda: STAGES  # before cli is imported: it asks once

from cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.argv[0] = "smalti"
    main()
