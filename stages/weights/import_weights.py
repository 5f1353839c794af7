"""Published weights as artifacts: what a foreign file holds is recognised by names and shapes, strictly, and kept in our form."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, UsageError
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import External, Inputs, read, stage
from smalti.counting import counted
from stages.weights.cards import CodeSpace, GeneratorCard, TokenizerCard, digest_of
from stages.weights.checkpoint_reader import identify_file, read_state
from stages.weights.files import save_weights
from stages.weights.networks import DiscriminatorCard
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch

IMAGENET_CLASSES = 1000
Values = Literal["auto", "ema", "raw"]


class Layout(NamedTuple):
    """Whose names a file uses: what kind of artifact it becomes, and the module whose `recognise` knows them."""

    kind: Literal["tokenizer", "generator", "discriminator"]
    adapter: str


LayoutName = Literal["rar", "maskgit-vqgan", "ibq", "open-magvit2", "discriminator"]
LAYOUTS: dict[LayoutName, Layout] = {
    "rar": Layout("generator", "models.adapters.rar"),
    "maskgit-vqgan": Layout("tokenizer", "models.adapters.maskgit_vqgan"),
    "ibq": Layout("tokenizer", "models.adapters.ibq"),
    "open-magvit2": Layout("tokenizer", "models.adapters.open_magvit2"),
    "discriminator": Layout("discriminator", "models.adapters.discriminators"),
}


class ImportConfig(Config):
    """Which file, and how to read it."""

    layout: LayoutName = Field(
        description="whose names and shapes the file has; its size is read off the shapes (discriminator: the one in a "
        "training checkpoint of ibq or open-magvit2)"
    )
    hub: HubWeights | None = Field(default=None, description="where the file comes from when --weights is not given")
    values: Values = Field(
        default="auto",
        description="averaged (ema) or raw weights, of a file that holds both; auto: the averaged ones where they are, as "
        "in published metrics (the generators of Open-MAGVIT2 were trained on codes of the raw ones)",
    )
    resolution: int | None = Field(
        default=None, ge=1, description="pixels a side of the images that a tokenizer was made for; its default view"
    )
    class_names: Literal["imagenet"] | None = Field(
        default=None, description="names of a generator's classes; imagenet: its 1,000 in the order of the synsets"
    )

    @model_validator(mode="after")
    def _suits_its_layout(self) -> ImportConfig:
        kind = LAYOUTS[self.layout].kind
        fields = {"generator": ("class_names", self.class_names), "tokenizer": ("resolution", self.resolution)}
        for owner, (name, value) in fields.items():
            if owner != kind and value is not None:
                raise ValueError(f"{name} says nothing about a {kind}")
        return self


def foresee(config: ImportConfig, inputs: KnownInputs) -> Facts:
    """What the config says; the rest is in the file."""
    kind = LAYOUTS[config.layout].kind
    if "tokenizer" in inputs and kind != "generator":
        raise inputs.refusal(f"imports a {kind} (layout {config.layout}), and takes no tokenizer as input")
    if kind == "tokenizer":
        return {"tokenizer": inputs.own(digest_of(inputs.made)), "pixels": config.resolution}
    if kind == "discriminator":
        return {}
    tokenizer = inputs.all("tokenizer")
    named = {"classes": IMAGENET_CLASSES} if config.class_names else {}
    return {"tokenizer": None, **named, **(tokenizer[0].only("tokenizer", "codes") if tokenizer else {})}


@stage(
    "import-weights",
    version=2,
    config=ImportConfig,
    reads={
        "tokenizer": read("tokenizer", help="the tokenizer whose codes a generator was trained on", optional=True),
    },
    writes=lambda config: LAYOUTS[config.layout].kind,
    example="smalti import-weights --weights maskgit-vqgan-imagenet-f16-256.bin --layout maskgit-vqgan",
    externals={
        "weights": External(
            help="the published file (.safetensors, .bin, .pt, .pth, .ckpt)",
            identify=lambda config, path: identify_file(path),
            needed=lambda config: config.hub is None,
            place=lambda config: config.hub,
            is_file=True,
        )
    },
    foresees=foresee,
)
def import_weights(config: ImportConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn a published weight file into a tokenizer, a generator or a discriminator.

    reads: a file or the hub, and for a generator its tokenizer: only then can its samples be decoded.  writes:
    config.json and weights.safetensors.  resumes: from the start. No code in the file is run, and every missing, surplus
    or misshapen tensor is refused.
    """
    path = run.paths["weights"]
    state = read_state(path)
    if LAYOUTS[config.layout].kind == "generator":
        import_generator(config, inputs, out, state, path)
    elif "tokenizer" in inputs:
        raise UsageError(f"layout {config.layout} is no generator, and takes no tokenizer as input")
    elif LAYOUTS[config.layout].kind == "discriminator":
        import_discriminator(config, out, state, path)
    else:
        import_tokenizer(config, out, state, path)


def import_generator(
    config: ImportConfig, inputs: Inputs, out: Draft, state: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Write a generator, and the identity of the tokenizer whose codes it lays."""
    found = recognise(config, state, path)
    card = make_card(config, found, path)
    if "tokenizer" in inputs:
        card = card.join(TokenizerCard.of(inputs["tokenizer"]), what=str(path), path=path)
    parameters = save(out, found.state, config_value(card), path)
    size = f"-{found.size}" if found.size else ""
    out.facts = {
        **card.space.facts,
        "tokens": card.space.tokens,
        "parameters": parameters,
        "weights": hash_file(path),
    }
    out.figure = f"{config.layout}{size}, {counted(parameters, 'parameter')}"


def make_card(config: ImportConfig, found: Any, path: Path) -> GeneratorCard:
    """What a generator's file says by its shapes; its tokenizer is not in it."""
    shape = found.shape
    if config.class_names and shape.classes != IMAGENET_CLASSES:
        raise UsageError(f"class_names: imagenet names {IMAGENET_CLASSES} classes, but {path} has {shape.classes}")
    space = CodeSpace(
        codes=shape.codes,
        grid=shape.grid,
        classes=shape.classes,
        class_names=imagenet_names() if config.class_names else (),
        factors=shape.factors,
    )
    return GeneratorCard(model=found.config, space=space)


def import_tokenizer(config: ImportConfig, out: Draft, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a tokenizer."""
    found = recognise(config, state, path)
    parameters = save(out, found.state, config_value(found.config), path)
    codes = found.config.codebook_size
    out.facts = {
        "codebook_size": codes,
        "downsample": found.config.downsample,
        "parameters": parameters,
        "weights": hash_file(path),
        **({"image_size": config.resolution} if config.resolution else {}),
    }
    out.figure = f"{config.layout}, {counted(codes, 'code')}, {counted(parameters, 'parameter')}"


def import_discriminator(config: ImportConfig, out: Draft, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a discriminator. LeCAM's running means are in no published file, and start at 0."""
    import torch

    found = recognise(config, state, path)
    card = DiscriminatorCard(discriminator=found.config, channels=found.channels)
    means = {"real_mean": torch.zeros(()), "fake_mean": torch.zeros(())}
    weights = {f"discriminator.{name}": tensor for name, tensor in found.state.items()}
    parameters = save(out, weights | means, config_value(card), path)
    out.facts = {
        "parameters": parameters,
        "weights": hash_file(path),
    }
    out.figure = f"{found.config.kind} discriminator, {counted(parameters, 'parameter')}"


def recognise(config: ImportConfig, state: Mapping[str, torch.Tensor], path: Path) -> Any:
    """What the adapter makes of the tensors; CorruptError (exit code 4) with a table of all that does not fit."""
    from models.adapters.layout import LayoutError

    adapter: Any = import_module(LAYOUTS[config.layout].adapter)
    holds_both = hasattr(adapter, "has_averages") and adapter.has_averages(state)
    if config.values == "ema" and not holds_both:
        raise CorruptError(f"{path} holds no averaged weights", path=path, hint="leave values out")
    choice = {"averaged": config.values != "raw"} if holds_both else {}
    try:
        return adapter.recognise(state, **choice)
    except LayoutError as error:
        raise CorruptError(f"{path} is not of layout {config.layout}: {error}", path=path) from error


def config_of(path: Path) -> ImportConfig:
    """The config that imports a file whose layout nobody named; CorruptError where it fits none."""
    from models.adapters.layout import LayoutError

    state = read_state(path)
    for layout, (kind, _) in LAYOUTS.items():
        if kind == "discriminator":
            continue
        try:
            found = import_module(LAYOUTS[layout].adapter).recognise(state)
        except LayoutError:
            continue
        is_imagenet = kind == "generator" and found.shape.classes == IMAGENET_CLASSES
        return ImportConfig(layout=layout, class_names="imagenet" if is_imagenet else None)
    raise CorruptError(
        f"{path} has none of the layouts {', '.join(LAYOUTS)}",
        path=path,
        hint=f"see what differs: smalti import-weights --weights {path} --layout LAYOUT",
    )


def save(out: Draft, state: Mapping[str, torch.Tensor], config: dict[str, Any], path: Path) -> int:
    """Write tensors in float32 and the config; returns how many numbers there are. CorruptError for NaN or infinity."""
    import torch

    saved: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        value = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        if not bool(value.isfinite().all()):
            raise CorruptError(f"{name} in {path} holds NaN or infinity", path=path)
        is_apart = value.untyped_storage().nbytes() == value.nbytes and value.data_ptr() not in storages
        saved[name] = value if is_apart else value.clone()  # a file of ours holds no tensor that is part of another
        storages.add(value.data_ptr())
    save_weights(out, saved, config)
    return sum(tensor.numel() for tensor in saved.values())


def imagenet_names() -> tuple[str, ...]:
    """Short English names of the 1,000 classes, in the alphabetical order of their synsets (WordNet)."""
    lines = files("stages").joinpath("imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.split(" ", 1)[1] for line in lines)
