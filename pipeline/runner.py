"""The runner: the state of each step of a recipe and why it would run (`plan`), and running them (`run`).

A step is done when the artifact of its key exists, opens, and was made from its present inputs. Logs are not consulted,
and of times only those of folders of images (`pipeline.trees`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from rich import filesize

from pipeline import durable
from pipeline.artifact import LOG, Artifact, check_data
from pipeline.cluster import Cluster, InProcess
from pipeline.compatibility import Known, check_together, foresee, look_ahead, settle, settled
from pipeline.cores import usual_threads
from pipeline.draft import Draft, Request, is_resumable
from pipeline.errors import BadImages, CorruptError, InputError, SmaltiError
from pipeline.externals import DigestUnknown, Need, check_caches, check_files, content_ids, get_all, needs, option
from pipeline.keys import artifact_key, canonical_bytes, config_value
from pipeline.launch import Followers
from pipeline.locks import steady
from pipeline.outside_tokens import FOLDER, OUTSIDE, open_outside
from pipeline.progress import Progress
from pipeline.recipe import Recipe, Step
from pipeline.runlog import Attempt, last_threads
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, Stage, check_kinds
from pipeline.stage_cache import give_back
from pipeline.store import Store
from pipeline.trees import Memory
from smalti.counting import counted

CHECKED_IN_SILENCE = 2**28  # bytes of inputs that take less than a second

State = Literal["done", "run", "damaged", "missing", "waits"]


@dataclass(frozen=True)
class Planned:
    """One step of a plan: its key if it is known, its state, and why it would run."""

    step: Step
    key: str | None
    state: State
    reason: str
    artifact: Artifact | None = None
    absent: tuple[Need, ...] = ()
    """Published files that the step reads and that are not on this machine."""

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step.name,
            "stage": self.step.stage.name,
            "key": self.key,
            "state": self.state,
            "reason": self.reason,
            "absent": [need.as_json() for need in self.absent],
        }


@dataclass
class Options:
    """Options of a run, which do not change results."""

    cluster: Cluster = field(default_factory=InProcess)
    followers: Followers = field(default_factory=Followers)
    progress: Progress = field(default_factory=Progress)
    device: str = "auto"
    threads: int = 1
    """Of a training step; 0: those of the draft, or the default number."""
    checkpoint_seconds: float = 30.0
    wait: bool = True
    force: bool = False
    memory: Memory = field(default_factory=Memory)
    """Remembered content ids of folders."""
    command: str = ""
    title: str = ""
    """The running step of a recipe; empty: a single stage."""
    ref: str = ""
    """Ref of the artifact; empty: none."""
    before_work: Callable[[], None] = lambda: None
    """Called before anything is computed."""


@dataclass(frozen=True)
class Made:
    """A requested artifact, and whether it existed before."""

    artifact: Artifact
    reused: bool


class DamagedInput(CorruptError):
    """The data of an input is damaged, found before its step began (exit code 4)."""

    def __init__(self, artifact: Artifact, damage: CorruptError):
        super().__init__(damage.message, path=damage.path, hint=damage.hint)
        self.artifact = artifact


def plan(recipe: Recipe, store: Store, memory: Memory | None = None, *, force: Collection[str] = ()) -> list[Planned]:
    """For each step in running order: done, or why it will run, or what it lacks. Opens artifacts, computes nothing.

    memory: remembered content ids of folders; None lists them.  force: names of steps that would be made again.
    """
    asked = memory or Memory()
    planned: dict[str, Planned] = {}
    known: dict[str, Known] = {}
    for written in recipe.steps:
        step = settled(written, known)
        planned[step.name] = _plan_step(recipe, step, planned, store, asked, is_forced=step.name in force)
        known[step.name] = look_ahead(step, known, planned[step.name].artifact)
    return list(planned.values())


def run(recipe: Recipe, store: Store, options: Options, *, force: Collection[str] = ()) -> Iterator[tuple[Step, Made]]:
    """Run the steps that are not done, in order, and set the recipe's refs.

    Missing or invalid external data is reported before the first step is computed.
    force: names of steps to make again.  A damaged artifact is moved aside and made again; if the damage is only found when
    a later step reads its data, its step is yielded again.
    """
    _refuse_missing(recipe)
    unknown = [need for step in recipe.steps for need in _needs(step) if need.is_unknown]
    get_all(unknown, options.progress)  # keys depend on the digests of these files
    left = {step.name for step in recipe.steps if options.force or step.name in force}
    gather = cache(lambda: _gather_files(recipe, store, options, frozenset(left)))
    told: set[str] = set()
    mended: set[Path] = set()
    while True:
        try:
            for step, result in _run_steps(recipe, store, replace(options, before_work=gather), left):
                left.discard(step.name)
                if step.name not in told or not result.reused:
                    told.add(step.name)
                    yield step, result
            return
        except DamagedInput as damage:
            is_ours = damage.artifact.path == store.path(damage.artifact.stage, damage.artifact.key)
            if damage.artifact.path in mended or not is_ours:
                raise
            mended.add(damage.artifact.path)
            store.set_aside(damage.artifact, options.progress.say)


def _run_steps(recipe: Recipe, store: Store, options: Options, force: set[str]) -> Iterator[tuple[Step, Made]]:
    made: dict[str, Artifact] = {}
    for step in recipe.steps:
        inputs = Inputs({name: _pick(value, made) for name, value in step.inputs.items()})
        own = replace(options, title=step.name, ref=f"{recipe.name}/{step.name}", force=step.name in force)
        try:
            result = make(store, step.stage, step.config, inputs, step.paths, own)
        except BadImages as error:
            indexed = next((name for name, artifact in made.items() if artifact.key == error.image_set), step.name)
            error.advise_in_recipe(indexed)
            raise
        made[step.name] = result.artifact
        foresee(recipe, made)  # a folder's classes are known as soon as it is indexed, before anything is trained
        yield step, result


def make(
    store: Store,
    declared: Stage,
    config: BaseModel,
    inputs: Inputs,
    paths: Mapping[str, Path],
    options: Options,
) -> Made:
    """The artifact of one stage: the finished one if it is current, else it is made, or its draft continued."""
    if declared is OUTSIDE:
        return Made(open_outside(paths[FOLDER]), reused=True)
    check_kinds(declared, inputs)
    config = settle(declared, config, inputs)
    wanted = needs(declared, config, paths, step=options.title)
    for need in wanted:
        if need.is_unknown:
            need.get(options.progress)
    request = make_request(declared, config, inputs, paths, step=options.title, memory=options.memory)
    with steady(store.root, say=options.progress.say):
        if not options.force and store.is_current(request):
            return Made(_note(store, request, paths, options), reused=True)
    if options.memory.doubt(request.externals.values()):  # before anything is made, remembered folders are listed
        return make(store, declared, config, inputs, paths, options)
    check_together(declared, config, inputs)
    options.before_work()
    found = {need.external: need.get(options.progress) for need in wanted}
    say = options.progress.say
    with store.draft(request, wait=options.wait, again=options.force, name=options.ref, say=say) as draft:
        options.memory.save()  # there is a store by now
        if draft is not None:
            own = replace(options, threads=_threads(options, draft))
            _Job(store, declared, config, inputs, paths, found, own, draft).work()
        return Made(_note(store, request, paths, options), reused=draft is None)


@dataclass(frozen=True, eq=False)
class _Job:
    """One artifact to be made. paths: given external data.  files: published files."""

    store: Store
    declared: Stage
    config: BaseModel
    inputs: Inputs
    paths: Mapping[str, Path]
    files: Mapping[str, Path]
    options: Options
    draft: Draft

    def work(self) -> None:
        """Check the inputs' data, run the stage into the draft, and commit it."""
        draft, options, declared = self.draft, self.options, self.declared
        progress = options.progress.into(draft.log)
        progress.say(_heading(draft, options.title))
        self._check_inputs(progress)
        together = options.followers.training(self._order()) if declared.trains else nullcontext()
        attempt = Attempt(
            draft.log / "run.json", device=options.device, threads=options.threads, command=options.command
        )
        with attempt, together:
            runtime = Runtime(
                cluster=options.cluster,
                progress=progress,
                log=draft.log,
                device=options.device,
                threads=options.threads,
                checkpoint_seconds=options.checkpoint_seconds,
                paths={**self.paths, **self.files},
            )
            try:
                declared.function(self.config, self.inputs, draft, runtime)
            finally:
                give_back()
        draft.commit(self.store.path(declared.name, draft.request.key))

    def _check_inputs(self, progress: Progress) -> None:
        inputs = list(self.inputs.flat())
        size = sum(entry.size for artifact in inputs for entry in artifact.files.values())
        if size >= CHECKED_IN_SILENCE:
            progress.say(f"  checking {filesize.decimal(size)} of inputs")
        for artifact in inputs:
            try:
                check_data(artifact)
            except CorruptError as error:
                raise DamagedInput(artifact, error) from error

    def _order(self) -> dict[str, Any]:
        """The order for the other processes, in JSON values (`pipeline.following`)."""
        options = self.options
        return {
            "stage": self.declared.name,
            "request": asdict(self.draft.request),
            "inputs": {name: _map(value, lambda artifact: str(artifact.path)) for name, value in self.inputs.items()},
            "paths": {name: str(path.absolute()) for name, path in self.paths.items()},
            "store": str(self.store.root),
            "draft": str(self.draft.path),
            "device": options.device,
            "threads": options.threads,
            "checkpoint_seconds": options.checkpoint_seconds,
        }


def _threads(options: Options, draft: Draft) -> int:
    """As given; else those of the draft's last attempt, since float results depend on them; else the default number."""
    begun = last_threads(draft.log) if draft.units() else 0
    return options.threads or begun or usual_threads()


def make_request(
    declared: Stage,
    config: BaseModel,
    inputs: Inputs,
    paths: Mapping[str, Path],
    *,
    step: str = "",
    memory: Memory | None = None,
) -> Request:
    """The request with its key; external data is identified, without reading pixels.

    memory: remembered content ids of folders; None lists them.

    DigestUnknown where the key depends on a file that has to be downloaded first.
    """
    externals = content_ids(declared, config, paths, step=step, memory=memory)
    values = config_value(config)

    def of_inputs(what: Callable[[Artifact], Any]) -> dict[str, Any]:
        return {name: _map(value, what) for name, value in inputs.items()}

    key = artifact_key(declared.name, declared.version, values, of_inputs(lambda one: one.key), externals)
    records = of_inputs(lambda one: {"stage": one.stage, "key": one.key, "digest": one.content})
    former = of_inputs(lambda one: {"stage": one.stage, "key": one.key, "digest": one.digest})
    return Request(declared.name, declared.kind(config), declared.version, key, values, records, externals, former)


def _note(store: Store, request: Request, paths: Mapping[str, Path], options: Options) -> Artifact:
    """The finished artifact, with its ref, set within the lock that excludes garbage collection.

    Paths of external data on this machine are recorded in its log (log/images-root.txt), for later stages.
    """
    artifact = store.open(request.stage, request.key)
    for name, path in paths.items():
        note, text = artifact.path / LOG / f"{name}-root.txt", f"{path.absolute()}\n"
        if not note.exists() or note.read_text() != text:
            durable.write_file(note, text.encode())
    if options.ref:
        store.set_ref(options.ref, artifact)
    return artifact


def missing_sentence(step: Step) -> str:
    options = " and ".join(f"--{name} PATH" if name == "images" else f"--path {name}=PATH" for name in step.missing)
    return f"step {step.name} lacks external data: give {options}"


def _refuse_missing(recipe: Recipe) -> None:
    """InputError for missing paths and paths that do not exist, of all steps at once."""
    said = [missing_sentence(step) for step in recipe.steps if step.missing]
    for step in recipe.steps:
        for name, path in step.paths.items():
            if not path.exists():
                said.append(f"step {step.name}: there is no {path}; give another: {option(name, step.name)}")
    if said:
        raise InputError("; ".join(dict.fromkeys(said)))


def _gather_files(recipe: Recipe, store: Store, options: Options, force: Collection[str]) -> None:
    """Check all files that unfinished steps read, and download those that are missing."""
    steps = [item.step for item in plan(recipe, store, options.memory, force=force) if item.state != "done"]
    for step in steps:
        check_files(step.stage, step.config, step.paths, step=step.name)
    get_all([need for step in steps for need in _needs(step)], options.progress)


def _needs(step: Step) -> list[Need]:
    return needs(step.stage, step.config, step.paths, step=step.name)


def _heading(draft: Draft, title: str) -> str:
    stage = draft.request.stage
    again = f", continues after {counted(len(draft.units()), 'finished unit')}" if draft.units() else ""
    return f"{f'{title} ({stage})' if title else stage}{again}"


def _plan_step(
    recipe: Recipe, step: Step, planned: Mapping[str, Planned], store: Store, memory: Memory, *, is_forced: bool
) -> Planned:
    if step.missing:
        return Planned(step, None, "missing", missing_sentence(step))
    if step.stage is OUTSIDE:  # a token set outside of the store is never made
        try:
            artifact = open_outside(step.paths[FOLDER])
        except (InputError, CorruptError) as error:
            return Planned(step, None, "missing" if isinstance(error, InputError) else "damaged", str(error))
        return Planned(step, artifact.key, "done", "", artifact)
    found = _plan_known(recipe, step, planned, store, memory, is_forced=is_forced)
    if found.state in ("done", "missing"):
        return found
    try:
        check_caches(_needs(step))
    except CorruptError as error:
        return replace(found, state="missing", reason=str(error))
    absent = tuple(need for need in _needs(step) if need.place.find() is None)
    named = ", ".join(need.place.label for need in absent if not need.is_unknown)
    return replace(found, absent=absent, reason=f"{found.reason}; not here: {named}" if named else found.reason)


def _plan_known(
    recipe: Recipe, step: Step, planned: Mapping[str, Planned], store: Store, memory: Memory, *, is_forced: bool
) -> Planned:
    """The plan of a step with all paths given."""
    parents = {name: _pick(value, planned) for name, value in step.inputs.items()}
    try:
        externals = content_ids(step.stage, step.config, step.paths, step=step.name, memory=memory)
    except DigestUnknown as unknown:
        return Planned(step, None, "run", str(unknown))
    except (InputError, CorruptError) as error:
        return Planned(step, None, "missing", str(error))
    waits = [parent.step.name for value in parents.values() for parent in _flat(value) if parent.key is None]
    if waits:
        return Planned(step, None, "waits", f"waits for {', '.join(dict.fromkeys(waits))}")
    if not step.stage.is_settled(step.config):
        return Planned(step, None, "waits", f"takes settings from {', '.join(dict.fromkeys(step.parents()))}")
    keys: dict[str, Any] = {name: _map(value, lambda parent: parent.key) for name, value in parents.items()}
    key = artifact_key(step.stage.name, step.stage.version, config_value(step.config), keys, externals)
    artifact = store.look(step.stage.name, key)
    if isinstance(artifact, CorruptError):
        return Planned(step, key, "damaged", f"{artifact.message}; it will be moved aside and made again")
    if artifact is None:
        return Planned(step, key, "run", _reason(recipe, step, key, keys, externals, store))
    if is_forced:
        return Planned(step, key, "run", "is forced")
    parts = [parent for value in parents.values() for parent in _flat(value)]
    absent = list(dict.fromkeys(parent.step.name for parent in parts if parent.artifact is None))
    if absent:
        said = (
            "are made first, and may differ from those" if absent[1:] else "is made first, and may differ from the one"
        )
        return Planned(step, key, "run", f"{', '.join(absent)} {said} used")
    stale = [name for name, value in parents.items() if not _fits(artifact, name, value)]
    if stale:
        return Planned(step, key, "run", f"input {', '.join(stale)} was made again and differs from the one used")
    return Planned(step, key, "done", "", artifact)


def _fits(artifact: Artifact, name: str, value: Planned | list[Planned]) -> bool:
    """Whether the recorded digest of an input is that of the content, or (older) the manifest, of the present artifact."""
    pairs = zip(_flat(artifact.inputs.get(name)), [parent.artifact for parent in _flat(value)], strict=True)
    return all(one is not None and record["digest"] in (one.content, one.digest) for record, one in pairs)


def _reason(
    recipe: Recipe, step: Step, key: str, keys: Mapping[str, Any], externals: Mapping[str, str], store: Store
) -> str:
    """Why a step runs: its differences from the artifact of the recipe's ref."""
    if is_resumable(store.partial(step.stage.name, key)):
        return "continues an interrupted run"
    names = (f"{recipe.name}/{step.name}", f"{recipe.base}/{step.name}")
    ref = next((name for name in names if store.ref_path(name).is_file()), None)
    if ref is None:
        return "was never made"
    try:
        before = store.open(*store.read_ref(ref))
    except SmaltiError:
        return "its artifact is missing"
    if before.stage != step.stage.name:
        return f"stage {before.stage} became {step.stage.name}"
    changes = [f"version {before.version} became {step.stage.version}"] if before.version != step.stage.version else []
    config = json.loads(canonical_bytes(config_value(step.config)))
    changes += [f"config {change}" for change in differences(before.config, config)]
    old = {name: _map(value, lambda record: record["key"]) for name, value in before.inputs.items()}
    changes += [f"input {name} changed" for name in sorted({*old, *keys}) if old.get(name) != keys.get(name)]
    changes += [f"external {name} changed" for name in externals if before.externals.get(name) != externals[name]]
    return "; ".join(changes) or "its artifact is missing"


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Changed fields of two configs as `a.b: 1 -> 2`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = sorted({*before, *after})
        return [
            text
            for name in names
            for text in differences(before.get(name), after.get(name), f"{place}.{name}" if place else str(name))
        ]
    return [] if before == after else [f"{place}: {before} -> {after}"]


def _pick(value: str | list[str], made: Mapping[str, Any]) -> Any:
    return [made[name] for name in value] if isinstance(value, list) else made[value]


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    return [function(item) for item in value] if isinstance(value, list) else function(value)


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
