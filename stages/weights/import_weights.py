"""Published weights as artifacts: files are recognised by names and shapes, strictly, and converted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from models.generators.config import CodeShape
from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, UsageError
from pipeline.keys import NEUTRAL, config_value
from pipeline.runtime import Runtime
from pipeline.stage import External, Inputs, read, stage
from smalti.counting import counted
from stages.weights.cards import CodebookConfig, CodeSpace, GeneratorCard, TokenizerCard, digest_of
from stages.weights.checkpoint_reader import identify_file, read_settings, read_state
from stages.weights.files import digests_of, save_weights
from stages.weights.identity import identity_by
from stages.weights.networks import DiscriminatorCard
from stages.weights.places import HubWeights

if TYPE_CHECKING:
    import torch

IMAGENET_CLASSES = 1000
Values = Literal["auto", "ema", "raw"]
Kind = Literal["tokenizer", "generator", "discriminator"]
Part = Literal["tokenizer", "generator"]
LayoutName = Literal["rar", "maskgit-vqgan", "ibq", "open-magvit2", "digit", "discriminator"]
LAYOUTS: dict[LayoutName, Mapping[Kind, str]] = {
    "rar": {"generator": "models.adapters.rar"},
    "maskgit-vqgan": {"tokenizer": "models.adapters.maskgit_vqgan"},
    "ibq": {"tokenizer": "models.adapters.ibq", "generator": "models.adapters.llama"},
    "open-magvit2": {"tokenizer": "models.adapters.open_magvit2", "generator": "models.adapters.llama"},
    "digit": {"generator": "models.adapters.digit", "tokenizer": "models.adapters.maskgit_vqgan"},
    "discriminator": {"discriminator": "models.adapters.discriminators"},
}
"""Whose names a file uses: what may be imported from it, the usual first, and the modules whose `recognise` knows that."""
LLAMAS: dict[LayoutName, str] = {"ibq": "llama", "open-magvit2": "factorized"}
"""Layouts of Llama-style generators, and the kind of each."""
SHARED = {*LLAMAS, "digit"}
"""Layouts whose generators may lie in one file with their tokenizer."""
TELLING: dict[Kind, tuple[str, ...]] = {
    "tokenizer": ("encoder.conv_in.weight",),
    "generator": ("class_emb.embedding_table.weight", "decoder.embed_tokens.weight"),
}
"""How the name of a tensor ends that each part of such a file has."""
PIXELS, DOWNSAMPLE = 256, 16  # of the published generators


class ImportConfig(Config):
    """Which file, and how to read it."""

    layout: LayoutName = Field(
        description="whose names and shapes the file has; its size is read off the shapes (discriminator: the one in a "
        "training checkpoint of ibq or open-magvit2)"
    )
    part: Part | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="which one, where a file may hold a generator and its tokenizer; default: the tokenizer of ibq and "
        "open-magvit2, the generator of digit, elsewhere what the layout is of",
    )
    hub: HubWeights | None = Field(default=None, description="where the file comes from when --weights is not given")
    values: Values = Field(
        default="auto",
        description="averaged (ema) or raw weights, of a file that holds both; auto: the averaged ones where they are, as "
        "in published metrics (the generators of Open-MAGVIT2 were trained on codes of the raw ones)",
    )
    resolution: int | None = Field(
        default=None,
        ge=1,
        description="pixels a side of the images that a tokenizer was made for, its default view; or whose codes a "
        f"generator of ibq, open-magvit2 or digit lays (default: {PIXELS})",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=NEUTRAL,
        description="attention heads of a generator of ibq, open-magvit2 or digit; default: what its file says (digit), or 64 wide, "
        "as in all published files",
    )
    sampling: Literal["steps", "masks"] | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="how a generator of digit is sampled, which its file does not tell: position by position (default), or by "
        "masks, as its pixel decoders that are not autoregressive",
    )
    class_names: Literal["imagenet"] | None = Field(
        default=None, description="names of a generator's classes; imagenet: its 1,000 in the order of the synsets"
    )

    @model_validator(mode="after")
    def _suits_its_layout(self) -> ImportConfig:
        if self.part and self.part not in LAYOUTS[self.layout]:
            raise ValueError(f"layout {self.layout} has no {self.part}")
        fields = {
            "class_names": (self.class_names, self.kind == "generator"),
            "resolution": (self.resolution, self.kind == "tokenizer" or self.may_hold_both),
            "heads": (self.heads, self.may_hold_both),
            "sampling": (self.sampling, self.kind == "generator" and self.layout == "digit"),
        }
        for name, (value, is_of_use) in fields.items():
            if value is not None and not is_of_use:
                raise ValueError(f"{name} says nothing about a {self.kind} of layout {self.layout}")
        return self

    @property
    def kind(self) -> Kind:
        """Which part becomes an artifact, and so its kind."""
        usual = next(iter(LAYOUTS[self.layout]))
        return usual if self.part is None else self.part

    @property
    def may_hold_both(self) -> bool:
        """Whether it imports a generator from a file that may also hold its tokenizer."""
        return self.kind == "generator" and self.layout in SHARED


def foresee(config: ImportConfig, inputs: KnownInputs) -> Facts:
    """What the config says; the rest is in the file."""
    if "tokenizer" in inputs and config.kind != "generator":
        raise inputs.refusal(f"imports a {config.kind} (layout {config.layout}), and takes no tokenizer as input")
    if "condition" in inputs and (config.layout != "digit" or config.kind != "generator"):
        raise inputs.refusal(f"imports a {config.kind} (layout {config.layout}), which has no condition")
    if config.kind == "tokenizer":
        return {"tokenizer": inputs.own(digest_of(inputs.made)), "pixels": config.resolution}
    if config.kind == "discriminator":
        return {}
    tokenizer = inputs.all("tokenizer")
    named = {"classes": IMAGENET_CLASSES} if config.class_names else {}
    unnamed = {} if config.may_hold_both else {"tokenizer": None}
    return {**unnamed, **named, **(tokenizer[0].only("tokenizer", "codes") if tokenizer else {})}


@stage(
    "import-weights",
    version=2,
    config=ImportConfig,
    reads={
        "tokenizer": read(
            "tokenizer",
            "codebook",
            help="the tokenizer or codebook whose codes a generator was trained on",
            optional=True,
        ),
        "condition": read(
            "codebook", "tokenizer", help="what makes the codes that are a pixel decoder's condition", optional=True
        ),
    },
    writes=lambda config: config.kind,
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

    reads: a file or the hub, and for a generator its tokenizer, unless it lies in the same file: only then can its
    samples be decoded; for a pixel decoder also what makes its condition.  writes: config.json and weights.safetensors.  resumes: from the start. No code in the file is
    run, and every missing, surplus or misshapen tensor is refused.
    """
    path = run.paths["weights"]
    state = read_state(path)
    if config.kind == "generator":
        import_generator(config, inputs, out, state, path)
    elif "tokenizer" in inputs:
        raise UsageError(f"a {config.kind} (layout {config.layout}) takes no tokenizer as input")
    elif config.kind == "discriminator":
        import_discriminator(config, out, state, path)
    else:
        if config.part is None and config.layout in SHARED and holds(state, "generator"):
            run.progress.say("  the file holds a generator, too: --part generator")
        import_tokenizer(config, out, state, path)


def import_generator(
    config: ImportConfig, inputs: Inputs, out: Draft, state: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Write a generator, and the identity of the tokenizer whose codes it lays: that in its file, or that beside it."""
    found = recognise(config, state, path)
    tokenizers = [TokenizerCard.of(inputs["tokenizer"])] if "tokenizer" in inputs else []
    if config.may_hold_both and holds(state, "tokenizer"):
        tokenizers.insert(0, own_tokenizer(config, state, path))
    card = make_card(config, found, path)
    if config.may_hold_both:
        grid = grid_of(config, next(iter(tokenizers), None))
        card = card.model_copy(update={"space": card.space.model_copy(update={"grid": grid})})
    for tokenizer in tokenizers:
        card = card.join(tokenizer, what=str(path), path=path)
    if "condition" in inputs:
        card = card.join_condition(TokenizerCard.of(inputs["condition"]), what=str(path), path=path)
    parameters = save(out, found.state, config_value(card), path)
    size = f"-{found.size}" if found.size else ""
    out.facts = {
        **card.space.facts,
        **({"condition": card.condition.facts} if card.condition else {}),
        "tokens": card.space.tokens,
        "parameters": parameters,
        "weights": hash_file(path),
    }
    out.figure = f"{config.layout}{size}, {counted(parameters, 'parameter')}"


def own_tokenizer(config: ImportConfig, state: Mapping[str, torch.Tensor], path: Path) -> TokenizerCard:
    """The tokenizer that lies in the file of a generator, with the identity that it has once it is imported, too."""
    found = recognise(ImportConfig(layout=config.layout, part="tokenizer"), state, path)
    digests = digests_of(separate(found.state, path), config_value(found.config))
    identity = identity_by(digests, found.config.quantizer.kind)
    return TokenizerCard(
        f"the tokenizer in {path}", path, found.config, found.config.codebook_size, config.resolution, identity
    )


def grid_of(config: ImportConfig, tokenizer: TokenizerCard | None) -> tuple[int, int]:
    """Rows and columns of codes of an image; UsageError where the tokenizer makes none of images of that size."""
    pixels = config.resolution or PIXELS
    if tokenizer is not None and isinstance(tokenizer.config, CodebookConfig):
        return tokenizer.config.encoder.grid
    if tokenizer is None and pixels % DOWNSAMPLE == 0:
        return (pixels // DOWNSAMPLE, pixels // DOWNSAMPLE)
    if tokenizer is None:
        raise UsageError(f"resolution {pixels} is not a multiple of {DOWNSAMPLE}, and no tokenizer says another one")
    try:
        return tokenizer.decoder.grid(pixels, pixels)
    except ValueError as error:
        raise UsageError(f"resolution {pixels} does not fit {tokenizer.name}: {error}") from error


def make_card(config: ImportConfig, found: Any, path: Path) -> GeneratorCard:
    """The weights of a generator's file, recognised by its shapes."""
    shape = found.shape
    if config.class_names and shape.classes != IMAGENET_CLASSES:
        raise UsageError(f"class_names: imagenet names {IMAGENET_CLASSES} classes, but {path} has {shape.classes}")
    space = space_of(shape).model_copy(update={"class_names": imagenet_names() if config.class_names else ()})
    return GeneratorCard(model=found.config, space=space, condition=shape.condition and space_of(shape.condition))


def space_of(shape: CodeShape) -> CodeSpace:
    """The codes of a published generator; those that know no classes have images of one."""
    return CodeSpace(codes=shape.codes, grid=shape.grid, classes=max(1, shape.classes), factors=shape.factors)


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
    """The result of the adapter; CorruptError (exit code 4) with a table of all differences."""

    adapter: Any = import_module(LAYOUTS[config.layout][config.kind])
    holds_both = hasattr(adapter, "has_averages") and adapter.has_averages(state)
    if config.values == "ema" and not holds_both:
        raise CorruptError(f"{path} holds no averaged weights", path=path, hint="leave values out")
    told: dict[str, Any] = {"averaged": config.values != "raw"} if holds_both else {}
    if config.layout in SHARED:
        check_part(config, state, path)
    if config.may_hold_both:
        told = told_by_settings(config, path) if config.layout == "digit" else told_by_layout(config)
    try:
        return adapter.recognise(state, **told)
    except ValueError as error:
        raise CorruptError(f"{path} is not of layout {config.layout}: {error}", path=path) from error


def told_by_layout(config: ImportConfig) -> dict[str, Any]:
    return {"kind": LLAMAS[config.layout], "heads": config.heads}


def told_by_settings(config: ImportConfig, path: Path) -> dict[str, Any]:
    """Heads are in the file's own settings, or in the config; semantic codes have the grid of pixel codes."""
    heads = {"decoder_attention_heads": config.heads} if config.heads else {}
    side = (config.resolution or PIXELS) // DOWNSAMPLE
    return {"settings": read_settings(path) | heads, "sampling": config.sampling or "steps", "grid": (side, side)}


def check_part(config: ImportConfig, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """CorruptError where a file has only the other part."""
    other: Kind = "generator" if config.kind == "tokenizer" else "tokenizer"
    if holds(state, other) and not holds(state, config.kind):
        raise CorruptError(f"{path} holds a {other}, but no {config.kind}", path=path, hint=f"give --part {other}")


def holds(state: Mapping[str, torch.Tensor], part: Kind) -> bool:
    """Whether a file has this part, judged by the name of one tensor."""
    return any(name.endswith(TELLING[part]) for name in state)


def config_of(path: Path, kinds: Collection[str]) -> ImportConfig:
    """The config that imports a file whose layout nobody named, as one of these kinds; CorruptError where it is none."""
    found = configs_of(path)
    for config in found:
        if config.kind in kinds:
            return config
    if not found:
        raise CorruptError(
            f"{path} has none of the layouts {', '.join(LAYOUTS)}",
            path=path,
            hint=f"see what differs: smalti import-weights --weights {path} --layout LAYOUT",
        )
    held = " and ".join(f"a {config.kind} (layout {config.layout})" for config in found)
    raise CorruptError(f"{path} holds {held}, not a {' or a '.join(kinds)}", path=path)


def configs_of(path: Path) -> list[ImportConfig]:
    """What could be imported from a file, but discriminators: one config of each kind at most, none for an unknown layout."""
    state = read_state(path)
    usual = [ImportConfig(layout=layout) for layout in LAYOUTS if layout != "discriminator"]
    found: dict[Kind, ImportConfig] = {}
    for config in [*usual, *(ImportConfig(layout=layout, part="generator") for layout in LLAMAS)]:
        try:
            weights = recognise(config, state, path)
        except CorruptError:
            continue
        has_names = config.kind == "generator" and weights.shape.classes == IMAGENET_CLASSES
        found.setdefault(config.kind, config.model_copy(update={"class_names": "imagenet"} if has_names else {}))
    return list(found.values())


def save(out: Draft, state: Mapping[str, torch.Tensor], config: dict[str, Any], path: Path) -> int:
    """Write tensors in float32 and the config; returns how many numbers there are. CorruptError for NaN or infinity."""
    saved = separate(state, path)
    save_weights(out, saved, config)
    return sum(tensor.numel() for tensor in saved.values())


def separate(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors in float32, none a part of another; CorruptError for NaN or infinity."""
    import torch

    saved: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        value = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        if not bool(value.isfinite().all()):
            raise CorruptError(f"{name} in {path} holds NaN or infinity", path=path)
        is_apart = value.untyped_storage().nbytes() == value.nbytes and value.data_ptr() not in storages
        saved[name] = value if is_apart else value.clone()
        storages.add(value.data_ptr())
    return saved


def imagenet_names() -> tuple[str, ...]:
    """Short English names of the 1,000 classes, in the alphabetical order of their synsets (WordNet)."""
    lines = files("stages").joinpath("imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.split(" ", 1)[1] for line in lines)
