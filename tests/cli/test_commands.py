"""Every command as a person meets it: help with an example, one JSON object, sentences and exit codes."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_stages import RECIPE, STAGES, recipe_file
from typer.testing import CliRunner, Result

import cli.main
from cli import doctor, inspection, recipes, single, sources
from pipeline.errors import SmaltiError
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages import stages

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(typer.main.get_command(cli.main.app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def smalti(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line over the tiny stages, in a folder of its own: smalti("plan x --json") -> result."""
    monkeypatch.chdir(tmp_path)
    for module in (recipes, sources):
        monkeypatch.setattr(module, "stages", lambda: STAGES)
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command("run", cls=recipes.RunCommand)(recipes.run)
    for command in (
        inspection.path,
        recipes.plan,
        recipes.schema,
        inspection.status,
        inspection.verify,
        inspection.gc,
        doctor.doctor,
    ):
        app.command()(command)
    for name, declared in STAGES.items():
        app.command(name)(single.stage_command(declared))
    recipe_file(tmp_path)

    def call(line: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["smalti", *shlex.split(line)])
        return CliRunner().invoke(app, shlex.split(line))

    return call


def one_object(result: Result) -> dict[str, Any]:
    """The single JSON object on stdout."""
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def digest(store: Path) -> dict[str, str]:
    return {
        path.parent.name: Store(store).open(path.parent.name, path.name).digest for path in Store(store).artifacts()
    }


# Help.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_of_this_command(name: str) -> None:
    result = CliRunner().invoke(cli.main.app, [name, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Example: smalti {name}\b", " ".join(result.output.split()))
    assert "--json" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_a_command_line_that_is_understood(
    name: str,
) -> None:
    command = typer.main.get_command(cli.main.app).commands[name]  # type: ignore[attr-defined]
    words = shlex.split(command.help.split("Example: smalti ")[1])
    words = words[: words.index(">")] if ">" in words else words
    assert words[0] == name
    steps = {step.name for step in load_recipe(ROOT / "recipes/digits/rar.yaml", stages()).steps}
    assert {word.removeprefix("digits/rar/") for word in words if word.startswith("digits/rar/")} <= steps
    context = command.make_context(words[0], words[1:])
    assert context.params


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = typer.main.get_command(cli.main.app).commands[name]  # type: ignore[attr-defined]
    assert [param.name for param in command.params if not getattr(param, "help", None)] == []


# Recipes.


def test_plan_run_and_a_second_run(smalti: Any, tmp_path: Path) -> None:
    planned = one_object(smalti("plan recipes/tiny.yaml --json"))
    assert [(step["step"], step["state"], step["reason"]) for step in planned["steps"]] == [
        ("numbers", "run", "was never made"),
        ("sum", "run", "was never made"),
    ]
    first = one_object(smalti("run recipes/tiny.yaml --json"))
    assert [step["state"] for step in first["steps"]] == ["made", "made"]
    assert [step["key"] for step in first["steps"]] == [step["key"] for step in planned["steps"]]
    again = smalti("run recipes/tiny.yaml")
    assert "nothing to do: all 2 steps are done" in again.stderr
    assert again.stdout.split("\n")[0] == "step\tstate\tseconds\tartifact\tfigure"
    assert not list(tmp_path.rglob("*.lock"))


def test_run_with_workers_gives_the_same_artifacts(smalti: Any, tmp_path: Path) -> None:
    assert smalti("run recipes/tiny.yaml --store one").exit_code == 0
    assert smalti("run recipes/tiny.yaml --store two --workers 1 --quiet").exit_code == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_dry_runs_write_nothing(smalti: Any, tmp_path: Path) -> None:
    assert one_object(smalti("run recipes/tiny.yaml --dry-run --json"))["steps"][0]["state"] == "run"
    assert one_object(smalti("count --dry-run --json"))["state"] == "run"
    assert not (tmp_path / "store").exists()
    smalti("run recipes/tiny.yaml")
    assert one_object(smalti("count --dry-run --json"))["state"] == "done"
    assert one_object(smalti("add --numbers tiny/numbers --dry-run --json"))["state"] == "done"


def test_schema_is_json(smalti: Any) -> None:
    assert one_object(smalti("schema")) == one_object(smalti("schema --json"))


# One stage alone.


def test_a_stage_alone_makes_what_the_recipe_makes(smalti: Any) -> None:
    made = {step["step"]: step for step in one_object(smalti("run recipes/tiny.yaml --json"))["steps"]}
    alone = one_object(smalti("count --store other --json"))
    assert (alone["key"], alone["reused"], alone["facts"]) == (made["numbers"]["key"], False, made["numbers"]["facts"])
    path = Path(alone["path"]).absolute()
    for given in (path, path.name[:10], "my/numbers"):
        smalti("count --store other --ref my/numbers")
        assert one_object(smalti(f"add --store other --numbers {given} --json"))["key"] == made["sum"]["key"]


def test_every_way_to_give_a_setting(smalti: Any, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("rows: 3\ninner: {rate: 5e-1}\n")
    (tmp_path / "recipes/other.yaml").write_text(
        RECIPE.replace("{stage: count}", "{stage: count, config: {rows: 3, inner: {rate: 0.5}}}")
    )
    lines = ["--rows 3 --inner.rate 0.5", "--set rows=3 --set inner.rate=5e-1", "--config settings.yaml",
             "--config recipes/other.yaml:numbers", "--config settings.yaml --rows 3", "--rows 9 --set rows=3 --set inner={rate: 0.5}"]  # fmt: skip
    keys = {
        one_object(smalti(f"count {line.replace('{rate: 0.5}', repr('{rate: 0.5}'))} --dry-run --json"))["key"]
        for line in lines
    }
    assert len(keys) == 1
    assert one_object(smalti("count --dry-run --json"))["key"] not in keys


def test_a_switch_that_is_on_can_be_turned_off(smalti: Any) -> None:
    smalti("count --ref n")
    on, off = (one_object(smalti(f"add --numbers n {switch} --json")) for switch in ("--verbose", "--no-verbose"))
    assert on["key"] != off["key"]
    assert not (Path(off["path"]) / "deep").exists()


def test_many_inputs_repeat_their_option(smalti: Any) -> None:
    smalti("count --ref a")
    smalti("count --rows 3 --ref b")
    one = one_object(smalti("add --numbers a --more b --json"))
    two = one_object(smalti("add --numbers a --more b --more a --json"))
    assert one["key"] != two["key"]


# Stores.


def test_status_verify_and_gc(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    smalti("count --rows 3")
    rows = one_object(smalti("status --json"))["artifacts"]
    assert sorted((row["kind"], row["refs"]) for row in rows) == [
        ("numbers", []),
        ("numbers", ["tiny/numbers"]),
        ("sum", ["tiny/sum"]),
    ]
    assert [row["kind"] for row in one_object(smalti("status --kind sum --json"))["artifacts"]] == ["sum"]
    assert one_object(smalti("verify --json")) == {"verified": 3}
    assert one_object(smalti("verify tiny/sum --json")) == {"verified": 1}
    assert one_object(smalti("gc --yes --json"))["kept"] == {"named": 2, "young": 1}
    (garbage,) = one_object(smalti("gc --older-than 0 --json"))["garbage"]
    assert "1 folder, " in smalti("gc --older-than 0s").stderr
    assert Path(garbage["path"]).exists()
    assert one_object(smalti("gc --older-than 0 --yes --json"))["removed"] == [garbage]
    assert not Path(garbage["path"]).exists()
    assert one_object(smalti("verify --json")) == {"verified": 2}
    assert smalti("gc --older-than 0").stderr == "no garbage; kept, with what they were made from: 2 named\n"


def test_variants_have_refs_of_their_own_that_serve_everywhere(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    changed = "recipes/tiny.yaml --as big --set numbers.rows=9"
    assert one_object(smalti(f"plan {changed} --json"))["steps"][0]["reason"] == "config rows: 7 -> 9"
    made = {step["step"]: step for step in one_object(smalti(f"run {changed} --json"))["steps"]}
    refs = {ref: row["key"] for row in one_object(smalti("status --json"))["artifacts"] for ref in row["refs"]}
    assert sorted(refs) == ["tiny/numbers", "tiny/sum", "tiny@big/numbers", "tiny@big/sum"]
    assert refs["tiny@big/sum"] == made["sum"]["key"] != refs["tiny/sum"]
    assert one_object(smalti("gc --older-than 0 --json"))["garbage"] == []
    assert one_object(smalti("path tiny@big/sum --json"))["path"] == made["sum"]["path"]
    assert one_object(smalti("verify tiny@big/sum --json")) == {"verified": 1}
    assert one_object(smalti("add --numbers tiny@big/numbers --json"))["key"] == made["sum"]["key"]
    assert [step["state"] for step in one_object(smalti(f"plan {changed} --json"))["steps"]] == ["done", "done"]
    result = smalti("run recipes/tiny.yaml --as ../x")
    assert (result.exit_code, "is not a valid name" in result.stderr) == (2, True)


def test_status_and_path_tell_a_running_draft_from_an_interrupted_one(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    assert one_object(smalti("path tiny/sum --json"))["state"] == "done"
    command = [sys.executable, str(ROOT / "tests/faults/tiny_command.py"), "run", "recipes/tiny.yaml", "--as", "slow"]
    command += ["--set", "sum.seconds=60.0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    try:
        while not list(tmp_path.glob("store/add/.*.partial/journal.jsonl")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        running = one_object(smalti("path tiny@slow/sum --json"))
        assert (running["state"], running["host"], running["pid"]) == ("running", platform.node(), process.pid)
        assert one_object(smalti("status --json"))["drafts"] == [running]
        assert f"running on {platform.node()} since " in smalti("status").stdout
        assert smalti("run recipes/tiny.yaml --set sum.seconds=60.0 --no-wait").exit_code == 75
        assert one_object(smalti("gc --older-than 0 --drafts --yes --json"))["kept"] == {"named": 2, "running": 1}
    finally:
        process.kill()
        process.communicate()
    stopped = one_object(smalti(f"path add/{running['key'][:8]} --json"))
    assert (stopped["state"], stopped["name"], stopped["units"]) == ("interrupted", "tiny@slow/sum", 1)
    assert "tiny@slow/sum interrupted on" in smalti("path tiny@slow/sum").stderr
    (line,) = [line for line in smalti("status").stdout.splitlines() if line.startswith("draft")]
    assert "interrupted on" in line
    assert line.endswith("1 unit done; continues when it is asked for")
    assert "continues an interrupted run" in smalti("plan recipes/tiny.yaml --as slow --set sum.seconds=60.0").stdout
    (tmp_path / stopped["path"] / "journal.jsonl").unlink()  # as before the first unit
    assert smalti("status").stdout.rstrip().endswith("nothing of it is saved, so it begins again when it is asked for")
    assert "continues" not in smalti("plan recipes/tiny.yaml --as slow --set sum.seconds=60.0").stdout


def test_damage_is_4_names_the_file_and_status_still_lists(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    (path,) = tmp_path.glob("store/add/*/sum.txt")
    path.write_bytes(b"x" * path.stat().st_size)
    result = smalti("verify --json")
    assert result.exit_code == 4
    error = one_object(result)["error"]
    assert (error["code"], error["path"]) == (4, str(path))
    assert "1 of 2 artifacts are damaged" in error["message"]
    (path.parent / "manifest.json").unlink()
    assert smalti("verify").exit_code == 4
    rows = one_object(smalti("status --json"))["artifacts"]
    assert sorted(row["kind"] for row in rows) == ["damaged", "numbers"]


def test_plan_and_run_go_on_past_a_damaged_artifact(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    (path,) = tmp_path.glob("store/count/*/manifest.json")
    path.unlink()
    steps = one_object(smalti("plan recipes/tiny.yaml --json"))["steps"]
    assert [step["state"] for step in steps] == ["damaged", "run"]
    assert "has no manifest.json" in steps[0]["reason"]
    result = smalti("run recipes/tiny.yaml")
    assert [line.split("\t")[:2] for line in result.stdout.splitlines()[1:]] == [["numbers", "made"], ["sum", "done"]]
    assert "it was moved to" in result.stderr
    (aside,) = tmp_path.glob("store/count/.*.damaged-1")
    assert (aside / "numbers" / "zarr.json").exists()
    assert "nothing to do" in smalti("run recipes/tiny.yaml").stderr


@pytest.mark.parametrize(
    ("words", "states"),
    [
        ("--force", ["run", "run"]),
        ("--force all", ["run", "run"]),
        ("--force sum", ["done", "run"]),
        ("--force sum --force numbers", ["run", "run"]),
        ("--quiet", ["done", "done"]),
    ],
)
def test_force_makes_the_named_steps_again_and_a_dry_run_lists_them(smalti: Any, words: str, states: list[str]) -> None:
    smalti("run recipes/tiny.yaml")
    for line in (f"run recipes/tiny.yaml {words} --dry-run --json", f"run {words} recipes/tiny.yaml --dry-run --json"):
        assert [step["state"] for step in one_object(smalti(line))["steps"]] == states
    made = [step["state"] for step in one_object(smalti(f"run recipes/tiny.yaml {words} --json"))["steps"]]
    assert made == [{"run": "made"}.get(state, state) for state in states]


def test_a_dry_run_of_one_stage_tells_what_is_forced_and_what_is_damaged(smalti: Any, tmp_path: Path) -> None:
    smalti("count")
    assert one_object(smalti("count --dry-run --json"))["state"] == "done"
    assert one_object(smalti("count --force --dry-run --json"))["state"] == "run"
    (path,) = tmp_path.glob("store/count/*/numbers/zarr.json")
    path.unlink()
    assert one_object(smalti("count --dry-run --json"))["state"] == "damaged"
    assert one_object(smalti("count --json"))["reused"] is False


def test_a_ref_whose_artifact_is_gone_names_no_path(smalti: Any, tmp_path: Path) -> None:
    smalti("run recipes/tiny.yaml")
    Path(one_object(smalti("path tiny/sum --json"))["path"]).rename(tmp_path / "lost")
    result = smalti("path tiny/sum")
    assert (result.exit_code, "which does not exist" in result.stderr) == (3, True)


def test_doctor_finds_what_is_needed(smalti: Any) -> None:
    found = one_object(smalti("doctor --json"))
    assert found["ok"] is True
    assert {"python", "torch", "zarr", "dask", "Inception weights"} <= {item["what"] for item in found["findings"]}


# Nonsense: one sentence, the right code, one object with --json.

NONSENSE = [
    ("plan none.yaml", 3, "cannot be read"),
    ("plan recipes/tiny.yaml --set nubmers.rows=3", 2, "did you mean 'numbers'?"),
    ("plan recipes/tiny.yaml --set numbers.rows=many", 2, "valid integer"),
    ("plan recipes/tiny.yaml --path weight=x", 2, "did you mean 'weights'?"),
    ("plan recipes/tiny.yaml --path weights", 2, "expected name=PATH"),
    ("run recipes/tiny.yaml --workers 2 --scheduler tcp://x:1", 2, "give one of them"),
    ("run recipes/tiny.yaml --force nubmers", 2, "did you mean 'numbers'?"),
    ("run recipes/tiny.yaml --device gpu", 2, "expected auto, cpu, cuda"),
    ("run recipes/tiny.yaml --set numbers.fault=raise", 70, "shard 1 of 4 failed"),
    ("run recipes/tiny.yaml --set numbers.fault=input", 3, "row 3 is no number"),
    ("run recipes/tiny.yaml --store recipes/tiny.yaml/store", 73, "is a file"),
    ("count --rows 0", 2, "greater than or equal to 1"),
    ("count --set row=3", 2, "did you mean 'rows'?"),
    ("count --set rows", 2, "expected dotted.key=value"),
    ("count --ref ../x", 2, "is not a valid ref name"),
    ("count --config none.yaml", 3, "cannot be read"),
    ("count --config recipes/tiny.yaml:nothing", 2, "holds no settings"),
    ("count --fault crash", 2, "'none', 'raise'"),
    ("add", 2, "add lacks --numbers: what to add"),
    ("add --numbers nothing", 3, "names no artifact"),
    ("add --numbers recipes", 3, "names no artifact"),
    ("gc --older-than soon", 2, "expected a number and one of s, m, h, d, w"),
    ("path nothing", 3, "names no artifact"),
    ("verify nothing", 3, "names no artifact"),
    ("verify --store nothing", 3, "no store"),
    ("status --store nothing", 3, "there is no store at"),
    ("gc --store nothing", 3, "there is no store at"),
]


@pytest.mark.parametrize(("line", "code", "words"), NONSENSE, ids=[line for line, *_ in NONSENSE])
def test_nonsense_is_one_sentence_and_its_code(smalti: Any, line: str, code: int, words: str) -> None:
    result = smalti(line)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (sentence,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert words in sentence
    assert "Traceback" not in result.stderr
    error = one_object(smalti(f"{line} --json"))["error"]
    assert sorted(error) == ["code", "hint", "message", "path"]
    assert error["code"] == code


def test_an_internal_bug_shows_where_and_is_70(smalti: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(recipes, "plan_recipe", fail)
    result = smalti("plan recipes/tiny.yaml --json")
    assert (result.exit_code, one_object(result)["error"]["code"]) == (70, 70)
    assert "ZeroDivisionError: a bug" in result.stderr


@pytest.mark.parametrize(
    ("failure", "code"),
    [(MemoryError(), 71), (OSError(28, "No space left", "/x"), 73), (OSError(5, "Input/output error", "/x"), 74),
     (KeyboardInterrupt(), 130), (SmaltiError("?"), 70)],
)  # fmt: skip
def test_every_kind_of_failure_has_its_code(
    smalti: Any, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise failure

    monkeypatch.setattr(recipes, "plan_recipe", fail)
    assert smalti("plan recipes/tiny.yaml").exit_code == code
    assert one_object(smalti("plan recipes/tiny.yaml --json"))["error"]["code"] == code


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_not_called_unwritable(
    smalti: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number), "/x/y")

    monkeypatch.setattr(recipes, "plan_recipe", fail)
    result = smalti("plan recipes/tiny.yaml")
    assert result.exit_code == 74
    assert result.stderr.startswith("error: /x/y cannot be read: ")


def test_wrong_options_of_the_console_script_are_2_and_one_object(tmp_path: Path) -> None:
    """Through the real entry point, since the parser complains before any command runs."""
    script = [sys.executable, "-c", "from cli.main import main; main()"]
    for words in (["kmeens"], ["status", "--nonsense"], ["plan"], ["kmeans", "--clusters", "x"]):
        done = subprocess.run([*script, *words, "--json"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert json.loads(done.stdout)["error"]["code"] == 2
