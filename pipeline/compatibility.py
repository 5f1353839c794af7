"""Facts about artifacts before they are made, and whether the steps of a recipe fit together.

A stage declares `foresees(config, inputs)`: it refuses inputs that do not fit, and returns the facts of the stage's
output. Facts of an existing artifact are read from it, such as the classes of a folder or the codebook of a published file.
Names of facts are the same for all kinds of artifacts:

| fact | meaning |
|---|---|
| images, crops | counts; crops are the views per image |
| classes, class_names | number of classes, and their names |
| labels | upper bound of the labels, where only some of the classes are used |
| listed | Origin: which images, in which order |
| pixels | pixels per side of the images, or of those that a network was made for |
| accepts | the sides of images that a codebook's encoder takes, where there are several |
| rows | how many features were kept, where they were chosen |
| codes, grid, downsample | the codebook's size, rows and columns of codes, pixels of a code |
| factors | values of each sub-token of a code, where it has some |
| model | the config of a generator |
| condition | codes, grid, tokenizer ... of the codes that a generator is given, where it is given some |
| tokenizer | Origin: what made the codes |
| generator, layer | Origin: whose hidden states the features are, and of which layer |
| decoded | Origin: the token set whose codes the images show |

A fact that is None is known to be missing. A fact that is left out is not known yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, UsageError
from pipeline.keys import canonical_bytes, config_value, sha256
from pipeline.recipe import Recipe, Step
from pipeline.stage import Inputs, Stage

Facts = dict[str, Any]
FORMER_NAMES = {"codebook_size": "codes", "image_size": "pixels", "resolution": "pixels", "size": "pixels"}
"""Names in manifests -> names here."""
WORDS = {
    "tokenizer": "codes of {}",
    "codes": "a vocabulary of {}",
    "grid": "a grid of {} codes",
    "pixels": "images of {} pixels",
    "classes": "{} classes",
    "class_names": "the classes {}",
    "factors": "sub-tokens of {} values",
    "generator": "hidden states of {}",
    "layer": "hidden states of layer {}",
    "listed": "the images of {}",
    "images": "{} images",
    "crops": "{} views of each image",
}


@dataclass(frozen=True)
class Origin:
    """The origin of codes or images. name: of a step or an artifact, for messages.

    step: identity of a step of a recipe.  digest: of the content of a finished artifact.
    """

    name: str
    step: str | None = None
    digest: str | None = None

    def differs(self, other: Origin) -> bool:
        """Whether they are known to differ."""
        if self.digest and other.digest:
            return self.digest != other.digest
        return bool(self.step and other.step) and self.step != other.step

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Known:
    """An input. name: of its step or artifact.  artifact: None if it is not made yet."""

    name: str
    kind: str
    facts: Mapping[str, Any]
    artifact: Artifact | None = None
    step: str | None = None

    def get(self, fact: str, otherwise: Any = None) -> Any:
        found = self.facts.get(fact)
        return otherwise if found is None else found

    def only(self, *names: str) -> Facts:
        """Those of these facts that are known."""
        return {name: self.facts[name] for name in names if name in self.facts}

    @property
    def origin(self) -> Origin:
        """This artifact as an origin."""
        return Origin(self.name, self.step, self.artifact.content if self.artifact else None)


@dataclass(frozen=True)
class KnownInputs:
    """The inputs of a step, and the step itself: its name, its identity, and its artifact if it is done."""

    name: str
    inputs: Mapping[str, list[Known]]
    step: str | None = None
    made: Artifact | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def __getitem__(self, name: str) -> Known:
        (known,) = self.inputs[name]
        return known

    def all(self, name: str) -> list[Known]:
        return list(self.inputs.get(name, []))

    def own(self, digest: str | None = None) -> Origin:
        """The step itself as an origin. digest: of its artifact, if it is done."""
        return Origin(self.name, self.step, digest)

    def refusal(self, sentence: str, *, hint: str | None = None) -> UsageError:
        """An error (exit code 2) that begins with the name of the step, or of the command."""
        return UsageError(f"step {self.name} {sentence}" if self.step else f"{self.name} {sentence}", hint=hint)

    def agree(self, known: Iterable[Known], *names: str) -> Facts:
        """The facts of these names, which must agree; an error names the first two inputs that contradict each other.

        Steps that contradict each other are a UsageError (exit code 2), given artifacts a CorruptError (4).
        """
        common: Facts = {}
        origins: dict[str, str] = {}
        for one in known:
            for name in names:
                fact = one.facts.get(name)
                if fact is None:
                    continue
                before = common.setdefault(name, fact)
                if contradicts(before, fact):
                    refusal = self.refusal(
                        f"cannot use {origins[name]} and {one.name} together: {WORDS[name].format(_said(fact))} in "
                        f"{one.name}, but {WORDS[name].format(_said(before))} in {origins[name]}"
                    )
                    raise refusal if self.step else CorruptError(refusal.message)
                origins.setdefault(name, one.name)
        return common


def either(sizes: Iterable[int]) -> str:
    """Sizes in words: "224 or 256"."""
    return " or ".join(map(str, sizes))


def contradicts(one: Any, other: Any) -> bool:
    return one.differs(other) if isinstance(one, Origin) else bool(one != other)


def facts_of(artifact: Artifact) -> Facts:
    """Facts of a finished artifact, by the names above."""
    facts = _renamed(artifact.facts, artifact.name)
    if "condition" in facts:
        facts["condition"] = _renamed(facts["condition"], artifact.name)
    return facts


def _renamed(said: Mapping[str, Any], owner: str) -> Facts:
    facts = {FORMER_NAMES.get(name, name): value for name, value in said.items()}
    for name in ("grid", "class_names", "factors"):
        if name in facts:
            facts[name] = tuple(facts[name])
    if "tokenizer" in facts:
        facts["tokenizer"] = made_by(facts["tokenizer"], owner)
    if "generator" in facts:
        facts["generator"] = Origin(f"the generator that {owner} names", digest=facts["generator"])
    return facts


def made_by(identity: Mapping[str, Any], owner: str) -> Origin | None:
    """The tokenizer of an identity (`stages.weights.identity`), or None."""
    digests = [str(identity.get(name, "")) for name in ("config_sha256", "weights_sha256")]
    if not all(digests):
        return None
    return Origin(f"the tokenizer that {owner} names ({digests[1][:12]})", digest=" ".join(digests))


def _said(fact: Any) -> str:
    if isinstance(fact, tuple):
        parts = [str(part) for part in fact]
        return "x".join(parts) if all(isinstance(part, int) for part in fact) else ", ".join(parts)[:80]
    return str(fact)


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe; UsageError (exit code 2) where two steps cannot fit together."""
    foresee(recipe, {})
    return recipe


def foresee(recipe: Recipe, made: Mapping[str, Artifact]) -> None:
    """UsageError where a step contradicts the known facts of its inputs. made: existing artifacts, by step."""
    known: dict[str, Known] = {}
    for step in recipe.steps:
        known[step.name] = look_ahead(settled(step, known), known, made.get(step.name))


def settled(step: Step, known: Mapping[str, Known]) -> Step:
    """The step with the settings that are derived from its inputs, as far as they are known."""
    if step.stage.settles is None:
        return step
    return replace(step, config=step.stage.settles(step.config, inputs_of(step, known, None)))


def settle(declared: Stage, config: BaseModel, inputs: Inputs) -> BaseModel:
    """The config with the settings that are derived from finished inputs."""
    if declared.settles is None:
        return config
    settled_config: BaseModel = declared.settles(config, _finished(declared, inputs))
    return settled_config


def check_together(declared: Stage, config: BaseModel, inputs: Inputs) -> None:
    """UsageError or CorruptError (exit codes 2 and 4) where a stage does not fit to finished inputs, or these to each other."""
    if declared.foresees is not None and declared.checks_inputs:
        declared.foresees(config, _finished(declared, inputs))


def _finished(declared: Stage, inputs: Inputs) -> KnownInputs:
    """What is known of finished inputs, whoever made them."""
    found = {
        name: [Known(one.name, one.kind, facts_of(one), one) for one in inputs.all(name)] for name, _ in inputs.items()
    }
    return KnownInputs(declared.name, found)


def look_ahead(step: Step, known: Mapping[str, Known], made: Artifact | None) -> Known:
    """The known facts of a step's output; UsageError where the step does not fit its inputs."""
    inputs = inputs_of(step, known, made)
    for name, wanted in step.stage.reads.items():
        for one in inputs.all(name):
            if one.kind not in wanted.kinds:
                expected = f"step {step.name} reads a {' or '.join(wanted.kinds)} as {name}"
                raise UsageError(f"{expected}, but {one.name} makes a {one.kind}")
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


def _identity(step: Step, inputs: Mapping[str, list[Known]]) -> str:
    """A digest that is equal for two steps with the same request."""
    asked = {
        "stage": step.stage.name,
        "config": config_value(step.config),
        "inputs": {name: [known.step or known.name for known in all_known] for name, all_known in inputs.items()},
        "paths": {name: str(path) for name, path in step.paths.items()},
    }
    return sha256(canonical_bytes(asked))
