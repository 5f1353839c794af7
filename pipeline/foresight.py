"""What a recipe lets one know before anything is computed: its steps are compared with each other, one after the other.

Every stage says by its declaration what it needs of its inputs, and what follows for its output (`pipeline.known`). Where
an artifact is there already, its facts are taken from it: the classes of a folder, the codebook in a published file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel

from pipeline.artifact import Artifact
from pipeline.errors import UsageError
from pipeline.keys import canonical_bytes, config_value, sha256
from pipeline.known import Known, KnownInputs, Origin, facts_of
from pipeline.recipe import Recipe, Step
from pipeline.stage import Inputs, Stage


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe; UsageError (exit code 2) where two steps cannot fit together."""
    foresee(recipe, {})
    return recipe


def foresee(recipe: Recipe, made: Mapping[str, Artifact]) -> None:
    """UsageError where a step contradicts what is known of its inputs. made: artifacts that are there, by step."""
    known: dict[str, Known] = {}
    for step in recipe.steps:
        known[step.name] = look_ahead(settled(step, known), known, made.get(step.name))


def settled(step: Step, known: Mapping[str, Known]) -> Step:
    """The step with what its inputs decide of its config, as far as they are known."""
    if step.stage.settles is None:
        return step
    return replace(step, config=step.stage.settles(step.config, inputs_of(step, known, None)))


def settle(declared: Stage, config: BaseModel, inputs: Inputs) -> BaseModel:
    """The config with what finished inputs decide of it."""
    if declared.settles is None:
        return config
    found = {name: [known_artifact(one) for one in inputs.all(name)] for name, _ in inputs.items()}
    settled_config: BaseModel = declared.settles(config, KnownInputs(declared.name, found))
    return settled_config


def look_ahead(step: Step, known: Mapping[str, Known], made: Artifact | None) -> Known:
    """What is known of a step's output; UsageError where the step does not fit to its inputs."""
    inputs = inputs_of(step, known, made)
    _check_kinds(step, inputs)
    foreseen = step.stage.foresees(step.config, inputs) if step.stage.foresees else {}
    origins = {name: fact for name, fact in foreseen.items() if isinstance(fact, Origin)}
    facts = foreseen if made is None else {**foreseen, **facts_of(made), **origins}
    return Known(step.name, step.stage.kind(step.config), facts, made, inputs.step)


def inputs_of(step: Step, known: Mapping[str, Known], made: Artifact | None) -> KnownInputs:
    inputs = {
        name: [known[parent] for parent in ([value] if isinstance(value, str) else value)]
        for name, value in step.inputs.items()
    }
    return KnownInputs(step.name, inputs, _identity(step, inputs), made)


def known_artifact(artifact: Artifact) -> Known:
    return Known(artifact.name, artifact.kind, facts_of(artifact), artifact)


def _check_kinds(step: Step, inputs: KnownInputs) -> None:
    for name, wanted in step.stage.reads.items():
        for known in inputs.all(name):
            if known.kind not in wanted.kinds:
                raise UsageError(
                    f"step {step.name} reads a {' or '.join(wanted.kinds)} as {name}, but {known.name} makes a {known.kind}"
                )


def _identity(step: Step, inputs: Mapping[str, list[Known]]) -> str:
    """Equal for two steps that do the same."""
    asked = {
        "stage": step.stage.name,
        "config": config_value(step.config),
        "inputs": {name: [known.step or known.name for known in all_known] for name, all_known in inputs.items()},
        "paths": {name: str(path) for name, path in step.paths.items()},
    }
    return sha256(canonical_bytes(asked))
