"""The runner: what would run and why, and that exactly this runs."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_stages
from tiny_stages import RECIPE, STAGES, load, recipe_file, run_all

from pipeline.artifact import DIGEST, FORMAT, MANIFEST, manifest_bytes, open_artifact, verify_artifact
from pipeline.draft import Draft, Request
from pipeline.errors import Busy, CannotWrite, CorruptError, InputError, NewerFormat, StorageError
from pipeline.keys import sha256
from pipeline.locks import lock
from pipeline.progress import Progress
from pipeline.recipe import Recipe, load_recipe
from pipeline.runlog import Attempt
from pipeline.runner import Options, Planned, _threads, differences, make, plan, run
from pipeline.runtime import Runtime
from pipeline.stage import Inputs
from pipeline.store import Store

FORMER = (
    Path(__file__).parents[1] / "golden" / "former-store"
)  # numbers and their sum, made before the sentence went to the log
EXTERNAL = (
    RECIPE + "  far: {stage: add, inputs: {numbers: numbers}, config: {scale: -1.0}, paths: {weights: '{weights}'}}\n"
)


def planned(recipe: Recipe, root: Path) -> dict[str, Planned]:
    return {item.step.name: item for item in plan(recipe, Store(root))}


def states(recipe: Recipe, root: Path) -> dict[str, str]:
    return {name: item.state for name, item in planned(recipe, root).items()}


def made(recipe: Recipe, root: Path, options: Options | None = None) -> list[str]:
    """Steps that were made now."""
    return [step.name for step, result in run(recipe, Store(root), options or Options()) if not result.reused]


def test_a_plan_writes_nothing_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    assert {item.reason for item in planned(recipe, root).values()} == {"was never made"}
    assert not root.exists()
    assert made(recipe, root) == ["numbers", "sum"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert states(recipe, root) == {"numbers": "done", "sum": "done"}
    assert made(recipe, root) == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_plan_knows_every_key_before_anything_ran(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    keys = {name: item.key for name, item in planned(recipe, root).items()}
    assert keys == {name: artifact.key for name, artifact in run_all(recipe, root).items()}


@pytest.mark.parametrize(
    ("setting", "ran", "reasons"),
    [
        ("sum.scale=3.5", ["sum"], {"sum": "config scale: 2 -> 3.5"}),
        ("numbers.seed=4", ["numbers", "sum"], {"numbers": "config seed: 0 -> 4", "sum": "input numbers changed"}),
        ("numbers.inner.rate=1.0", ["numbers", "sum"], {"numbers": "config inner.rate: 0.001 -> 1"}),
    ],
)
def test_a_changed_field_is_named_and_reruns_only_what_depends_on_it(
    tmp_path: Path, setting: str, ran: list[str], reasons: dict[str, str]
) -> None:
    root = tmp_path / "store"
    run_all(load(tmp_path), root)
    changed = load(tmp_path, setting)
    items = planned(changed, root)
    assert [name for name, item in items.items() if item.state == "run"] == ran
    assert {name: items[name].reason for name in reasons} == reasons
    assert made(changed, root) == ran
    assert made(load(tmp_path), root) == []


def test_a_new_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    run_all(load(tmp_path), root)
    monkeypatch.setitem(STAGES, "count", replace(tiny_stages.count, version=2))
    assert planned(load(tmp_path), root)["numbers"].reason == "version 1 became 2"
    assert made(load(tmp_path), root) == ["numbers", "sum"]


def test_another_stage_under_the_same_name_is_told(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run_all(load(tmp_path), root)
    text = RECIPE.replace("sum: {stage: add, inputs: {numbers: numbers}}", "sum: {stage: count, config: {seed: 1}}")
    assert planned(load(tmp_path, text=text), root)["sum"].reason == "stage add became count"


def test_an_input_that_was_made_again_with_other_bytes_runs_the_step_again(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    first = run_all(recipe, root)
    forge_facts(first["numbers"].path, largest=8)
    assert planned(recipe, root)["sum"].reason == "input numbers was made again and differs from the one used"
    assert made(recipe, root) == ["sum"]
    assert open_artifact(first["sum"].path).inputs["numbers"]["digest"] == open_artifact(first["numbers"].path).content


def forge_facts(path: Path, **facts: object) -> None:
    """As if another platform had made it: the same key, other facts."""
    write_manifest(path, {**json.loads((path / MANIFEST).read_bytes()), "facts": facts})


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    raw = manifest_bytes(manifest)
    (path / MANIFEST).write_bytes(raw)
    (path / DIGEST).write_text(sha256(raw))


def test_other_words_for_the_same_arrays_leave_later_steps_alone(tmp_path: Path) -> None:
    """The sentence of a stage, and on what a number was measured, are for people: nothing depends on them."""
    recipe, root = load(tmp_path), tmp_path / "store"
    first = run_all(recipe, root)["numbers"]
    assert first.figure == "7 numbers"
    reworded = replace(tiny_stages.count, function=say_it_otherwise)
    make(Store(root), reworded, tiny_stages.CountConfig(), Inputs({}), {}, Options(force=True))
    again = open_artifact(first.path)
    assert again.figure == "seven"
    assert (again.digest != first.digest, again.content == first.content) == (True, True)
    assert states(recipe, root) == {"numbers": "done", "sum": "done"}
    assert made(recipe, root) == []


def say_it_otherwise(config: tiny_stages.CountConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    tiny_stages.count.function(config, inputs, out, run)
    out.figure = "seven"
    out.facts["counted_on"] = "fingers"


def test_a_store_of_former_artifacts_is_whole_and_done(tmp_path: Path) -> None:
    """Their facts hold the sentence, and they recorded the digests of whole manifests."""
    recipe, root = load(tmp_path), tmp_path / "store"
    shutil.copytree(FORMER, root)
    assert states(recipe, root) == {"numbers": "done", "sum": "done"}
    assert made(recipe, root) == []
    assert [verify_artifact(path).figure for path in Store(root).artifacts()] == ["sum 72249", "7 numbers"]
    assert made(load(tmp_path, "sum.scale=3.0"), root) == ["sum"]
    forge_facts(Store(root).find("tiny/numbers").path, figure="seven")
    assert states(load(tmp_path, "sum.scale=3.0"), root) == {"numbers": "done", "sum": "done"}


def test_a_lost_input_is_made_first_and_the_step_is_kept_if_the_bytes_are_the_same(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    path = run_all(recipe, root)["numbers"].path
    path.rename(tmp_path / "lost")
    items = planned(recipe, root)
    assert items["numbers"].reason == "its artifact is missing"
    assert items["sum"].reason == "numbers is made first, and may differ from the one used"
    assert made(recipe, root) == ["numbers"]


@pytest.mark.parametrize("lost", ["numbers/c/1/0", "numbers/zarr.json", "manifest.json", "manifest.sha256"])
def test_a_damaged_artifact_is_moved_aside_and_made_again(tmp_path: Path, lost: str) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    artifact = run_all(recipe, root)["numbers"]
    (artifact.path / lost).unlink()
    assert states(recipe, root) == {"numbers": "damaged", "sum": "run"}
    assert lost in planned(recipe, root)["numbers"].reason
    before = {path for path in artifact.path.rglob("*") if "log" not in path.parts}
    assert made(recipe, root) == ["numbers"]
    aside = root / "count" / f".{artifact.key}.damaged-1"
    assert {aside / path.relative_to(artifact.path) for path in before} < set(aside.rglob("*"))
    assert lost in (aside / "log" / "damage.txt").read_text()
    assert run_all(recipe, root)["numbers"].digest == artifact.digest
    (artifact.path / lost).unlink()
    assert made(recipe, root) == ["numbers"]
    assert aside.with_suffix(".damaged-2").is_dir()


def test_damaged_data_is_found_by_the_step_that_reads_it_and_made_again(tmp_path: Path) -> None:
    """The plan opens artifacts and reads no data; both steps stay done, whose input is the same once more."""
    recipe, root = load(tmp_path), tmp_path / "store"
    artifact = run_all(recipe, root)["numbers"]
    flip_a_bit(artifact.path / "numbers/c/1/0")
    assert states(recipe, root) == {"numbers": "done", "sum": "done"}
    changed = load(tmp_path, "sum.scale=5.0")
    told = [(step.name, result.reused) for step, result in run(changed, Store(root), Options())]
    assert told == [("numbers", True), ("numbers", False), ("sum", False)]
    assert verify_artifact(artifact.path).digest == artifact.digest
    assert made(recipe, root) == []


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_an_artifact_of_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    path = run_all(recipe, root)["numbers"].path
    write_manifest(path, {**json.loads((path / MANIFEST).read_bytes()), "format": FORMAT + 1})
    for action in (plan, lambda recipe, store: list(run(recipe, store, Options()))):
        with pytest.raises(NewerFormat, match="needs a newer version"):
            action(recipe, Store(root))
    assert path.is_dir()


def test_a_file_that_the_disk_fails_to_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    run_all(recipe, root)
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == MANIFEST:
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        run_all(recipe, root)


def test_several_inputs_that_are_made_first_are_told_in_the_plural(tmp_path: Path) -> None:
    text = (
        RECIPE.replace("{numbers: numbers}", "{numbers: numbers, more: [others]}")
        + "  others: {stage: count, config: {seed: 1}}\n"
    )
    recipe, root = load(tmp_path, text=text), tmp_path / "store"
    run_all(recipe, root)
    items = {item.step.name: item for item in plan(recipe, Store(root), force=["numbers", "others"])}
    assert items["sum"].reason == "numbers, others are made first, and may differ from those used"


def test_force_names_steps_and_what_depends_on_them_stays_done(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    run_all(recipe, root)
    items = {item.step.name: item for item in plan(recipe, Store(root), force=["numbers"])}
    assert (items["numbers"].state, items["numbers"].reason) == ("run", "is forced")
    assert items["sum"].reason == "numbers is made first, and may differ from the one used"
    again = [step.name for step, result in run(recipe, Store(root), Options(), force=["numbers"]) if not result.reused]
    assert again == ["numbers"]
    assert made(recipe, root, Options(force=True)) == ["numbers", "sum"]


def test_damaged_input_data_is_found_before_the_first_step(tmp_path: Path) -> None:
    """A stage that runs alone cannot make its input again."""
    store = Store(tmp_path / "store")
    numbers = run_all(load(tmp_path), store.root)["numbers"]
    flip_a_bit(numbers.path / "numbers/c/1/0")
    with pytest.raises(CorruptError, match="c/1/0"):
        make(store, tiny_stages.add, tiny_stages.AddConfig(scale=5.0), Inputs({"numbers": numbers}), {}, Options())
    assert not list(store.root.glob("add/.*.partial/sum.txt"))


# External data.


def external(tmp_path: Path, weights: Path | None) -> Recipe:
    paths = {} if weights is None else {"weights": str(weights)}
    return load_recipe(recipe_file(tmp_path, EXTERNAL), STAGES, paths=paths)


def test_missing_external_data_is_told_and_nothing_runs(tmp_path: Path) -> None:
    root = tmp_path / "store"
    recipe = external(tmp_path, None)
    assert states(recipe, root) == {"numbers": "run", "sum": "run", "far": "missing"}
    assert "--path weights=PATH" in planned(recipe, root)["far"].reason
    with pytest.raises(InputError, match="--path weights=PATH"):
        made(recipe, root)
    assert not root.exists()
    recipe = external(tmp_path, tmp_path / "nothing")
    assert "are missing" in planned(recipe, root)["far"].reason


def test_a_step_waits_for_one_whose_data_is_missing(tmp_path: Path) -> None:
    text = EXTERNAL.replace("far:", "far0:") + "  last: {stage: add, inputs: {numbers: numbers, more: [far0]}}\n"
    recipe = load(tmp_path, text=text)
    assert planned(recipe, tmp_path / "store")["last"].state == "waits"
    assert planned(recipe, tmp_path / "store")["last"].reason == "waits for far0"


def test_changed_external_data_runs_again_and_moved_data_does_not(tmp_path: Path) -> None:
    root, weights = tmp_path / "store", tmp_path / "weights"
    weights.write_bytes(b"12345")
    artifact = run_all(external(tmp_path, weights), root)["far"]
    assert artifact.externals == {"weights": "5"}
    moved = weights.rename(tmp_path / "moved")
    assert made(external(tmp_path, moved), root) == []
    assert (artifact.path / "log" / "weights-root.txt").read_text() == f"{moved}\n"
    moved.write_bytes(b"123456")
    assert planned(external(tmp_path, moved), root)["far"].reason == "external weights changed"
    assert made(external(tmp_path, moved), root) == ["far"]


# One step.


def test_options_do_not_change_what_comes_out(tmp_path: Path) -> None:
    one = run_all(load(tmp_path), tmp_path / "one")
    options = Options(device="cpu", threads=7, checkpoint_seconds=0.0, command="something else", wait=False)
    other = run_all(load(tmp_path), tmp_path / "other", options)
    assert {name: item.digest for name, item in one.items()} == {name: item.digest for name, item in other.items()}


def test_a_draft_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen when it began is used when it continues, unless another number is asked for."""
    seen: list[int] = []
    monkeypatch.setattr("pipeline.runner.usual_threads", lambda: 5)
    for threads in (0, 0, 3, 0):
        draft = Draft.open(tmp_path / "draft", Request("x", "x", 1, "0" * 64, {}, {}, {}))
        chosen = _threads(Options(threads=threads), draft)
        with Attempt(draft.log / "run.json", device="cpu", threads=chosen, command=""):
            draft.put(f"unit-{len(seen)}", {f"{len(seen)}.txt": b"1"})
        seen.append(chosen)
        monkeypatch.setattr("pipeline.runner.usual_threads", lambda: 7)
    assert seen == [5, 5, 3, 3]


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    wrong = run_all(load(tmp_path), store.root)["sum"]
    with pytest.raises(CorruptError, match=r"add reads a numbers as numbers, but add/\w+ is of kind sum"):
        make(store, tiny_stages.add, tiny_stages.AddConfig(), Inputs({"numbers": wrong}), {}, Options())


def test_the_early_check_comes_before_the_draft(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with pytest.raises(InputError, match="a scale of 0"):
        run_all(load(tmp_path, "sum.scale=0.0"), root)
    assert not (root / "add").exists()


def test_without_waiting_a_busy_step_is_75(tmp_path: Path) -> None:
    recipe, root = load(tmp_path), tmp_path / "store"
    key = planned(recipe, root)["numbers"].key
    with lock(root / "count" / f"{key}.lock", wait=True), pytest.raises(Busy):
        run_all(recipe, root, Options(wait=False))


def test_a_finished_store_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(load(tmp_path), tmp_path / "store")

    def refuse(what: str, path: Path) -> None:
        raise CannotWrite(f"read-only: {what} {path}")

    monkeypatch.setattr("pipeline.durable.watch", refuse)
    assert made(load(tmp_path), tmp_path / "store") == []


def test_differences_name_nested_fields() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2]}) == [
        "a.c: 2 -> 3",
        "d: [1] -> [2]",
    ]
    assert differences({"a": 1}, {"a": 1, "b": None}) == []
    assert differences({}, {"b": 2}) == ["b: None -> 2"]


def test_a_long_check_of_inputs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runner.CHECKED_IN_SILENCE", 1)
    said = io.StringIO()
    run_all(load(tmp_path), tmp_path / "store", Options(progress=Progress(said)))
    lines = said.getvalue().splitlines()
    assert re.fullmatch(r"  checking [0-9.]+ (bytes|kB) of inputs", lines[lines.index("sum (add)") + 1])
