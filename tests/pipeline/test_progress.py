"""Progress: plain lines off a terminal, bars on one, numbers in the log always."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from sweep import in_child, limit_file_size

from pipeline import progress as module
from pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(progress: Progress, *, skip: int = 0) -> module.Bar:
    with progress.bar("features", total=10, unit="images") as bar:
        bar.skip(skip)
        for _ in range(10 - skip):
            bar.advance(1, loss=0.12345678)
    return bar


def test_a_line_at_the_end_elsewhere(tmp_path: Path) -> None:
    stream = io.StringIO()
    run(Progress(stream).into(tmp_path))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("  features: 10/10 images, ")
    assert line.endswith("/s loss 0.1235")
    (event,) = events(tmp_path)
    assert {key: event[key] for key in ("event", "label", "units")} == {
        "event": "done",
        "label": "features",
        "units": 10,
    }


def test_lines_now_and_then_tell_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    stream = io.StringIO()
    run(Progress(stream).into(tmp_path))
    lines = stream.getvalue().splitlines()
    assert len(lines) > 5
    assert all("s left" in line for line in lines if " 10/10 " not in line and " 0/10 " not in line)
    assert [event["event"] for event in events(tmp_path)][-1] == "done"


def test_a_terminal_gets_bars(tmp_path: Path) -> None:
    stream = Terminal()
    run(Progress(stream).into(tmp_path))
    assert "10/10" in stream.getvalue()
    assert "images/s" in stream.getvalue()
    assert events(tmp_path)[-1]["event"] == "done"


def test_quiet_still_logs(tmp_path: Path) -> None:
    progress = Progress.on_stderr(quiet=True).into(tmp_path)
    progress.say("nobody hears this")
    run(progress)
    progress.record("step", number=3, loss=0.5)
    assert [event["event"] for event in events(tmp_path)] == ["done", "step"]


def test_units_of_an_earlier_attempt_do_not_enter_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10**6, 5))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    bar = module.Bar(Progress(), "x", 10, "images")
    bar.skip(8)
    assert bar.rate == 0.0
    bar.advance(1)
    assert 0 < bar.rate < 1
    assert bar.done == 9


def test_without_a_log_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Progress())
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_not_finished_and_what_comes_again_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in (1, 2, 3)]
    log.write_text(lines[0] + '{"event": "progress", "units": 9}\n' + "".join(lines[1:]) + '{"event": "tr')
    progress = Progress().into(tmp_path)
    assert len(events(tmp_path)) == 4
    progress.forget_after(2)
    assert [event.get("step") for event in events(tmp_path)] == [1, None, 2]
    before = log.stat()
    progress.forget_after(2)
    assert log.stat().st_ino == before.st_ino, "a log that fits is not written again"


def test_a_log_that_cannot_be_written_is_73(tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(10):
            Progress(None, tmp_path / "metrics.jsonl").record("train", step=1)

    assert in_child(write, before=lambda: limit_file_size(100)) == 73


def test_sentences_stand_above_a_bar() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.bar("features", total=10, unit="images"):
        progress.say("  warning: [odd] things")
    assert "  warning: [odd] things\n" in stream.getvalue().replace("\r", "")


def test_a_sentence_beside_a_bar_is_a_line_of_its_own() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.bar("features", total=10, unit="images") as bar:
        bar.advance(5)
        progress.say("waits for [a worker]")
    progress.say("over")
    lines = [line.split("\x1b[2K")[-1].strip() for line in stream.getvalue().splitlines()]
    assert "waits for [a worker]" in lines
    assert lines[-1].endswith("over")
