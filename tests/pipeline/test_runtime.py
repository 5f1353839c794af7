"""Signals while a training runs: the first waits for a safe point, a second Ctrl-C does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster import InProcess
from pipeline.progress import Progress
from pipeline.runtime import Runtime

ROOT = Path(__file__).parents[2]
LONG = """
import hashlib, sys
from pathlib import Path
from pipeline.cluster import InProcess
from pipeline.progress import Progress
from pipeline.runtime import Runtime

with Runtime(InProcess(), Progress(), Path(".")).deferred():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000_000)  # minutes, without one instruction of Python in between
"""


def test_a_second_interrupt_ends_a_long_operation_of_a_library() -> None:
    process = subprocess.Popen([sys.executable, "-c", LONG], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None, "the first waits for a safe point"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()


def test_interrupts_between_instructions(tmp_path: Path) -> None:
    """The first sets the flag; the second raises at once, and leaves the process alone."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Runtime(InProcess(), Progress(), tmp_path).deferred() as stop:  # noqa: PT012 - both signals belong to one block
        signal.raise_signal(signal.SIGINT)
        assert stop.requested is KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.7)  # longer than the grace of the watcher
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
