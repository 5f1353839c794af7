"""`describe-tokens`: what a generator makes of codes: the mean over positions of the hidden states of one of its layers, for each row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.errors import CorruptError, NumericError
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import Inputs, read, stage
from smalti.arrays import ArraySpec, encode_shard, group_files
from smalti.tokens import TokenSet, check_codes, open_tokens
from stages.codes.classes import model_of
from stages.codes.token_files import ShardSizes
from stages.devices import Precision, pick_device, products, threads
from stages.weights.cards import read_card
from stages.weights.identity import check_same_tokenizer
from stages.weights.networks import NetworkFile, load_generator

if TYPE_CHECKING:
    import torch

# R rows (views of images) of a pass, T tokens, J positions of a generator, D width


class DescribeTokensConfig(ShardSizes):
    """Which hidden states, and how they are stored."""

    layer: int = Field(ge=0, description="0: what the first block takes; any other number: what that block gives")
    rows_per_pass: int = Field(default=64, ge=1, description="rows per forward pass; float results depend on it")
    precision: Precision = Field(
        default="float32", description="tf32: float32 with the products that CUDA rounds to 11 bits; bfloat16: autocast"
    )
    dtype: Literal["float32", "float16"] = Field(default="float32", description="type of the stored features")
    shard_images: int = Field(default=2048, ge=1, description="images per file, a multiple of chunk_images")
    chunk_images: int = Field(default=128, ge=1, description="images per chunk, the unit of checking")


def foresee(config: DescribeTokensConfig, inputs: KnownInputs) -> Facts:
    """A feature for every row of the token set, which has the generator's own codes."""
    generator, tokens = inputs["generator"], inputs["tokens"]
    inputs.agree([generator, tokens], "tokenizer", "codes", "grid")
    if model := model_of(generator):
        try:
            model.check_layer(config.layer)
        except ValueError as error:
            raise inputs.refusal(f"cannot describe codes by {generator.name}: {error}") from error
    return {
        **tokens.only("images", "classes", "class_names", "listed"),
        "views": tokens.get("crops", 1),
        "generator": generator.origin,
        "layer": config.layer,
    }


@dataclass(frozen=True)
class DescribeSpec:
    """What a worker needs for any shard."""

    generator: NetworkFile
    tokens: Path
    config: DescribeTokensConfig
    features: ArraySpec


@stage(
    "describe-tokens",
    version=1,
    config=DescribeTokensConfig,
    reads={
        "generator": read("generator", help="whose hidden states are asked for; it is not changed"),
        "tokens": read("token-set", help="codes of the generator's tokenizer"),
    },
    writes="features",
    example="smalti describe-tokens --generator mine/generator --tokens mine/tokens --layer 8",
    foresees=foresee,
    checks_inputs=True,
)
def describe_tokens(config: DescribeTokensConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn each row of codes into the mean over positions of a generator's hidden states, for `probe` to read.

    The generator is given no condition, so that no label can be read off its states.  reads: a token set and the
    generator of its codes.  writes: a zarr group of features (row, value) and labels (image,).  resumes: shard by shard.
    """
    artifact = inputs["tokens"]
    tokens = open_tokens(artifact.path)
    card = read_card(inputs["generator"])
    if card.space.tokenizer:
        identity = tokens.attributes.tokenizer
        check_same_tokenizer(
            identity, card.space.tokenizer, what=artifact.name, by=inputs["generator"].name, path=artifact.path
        )
    generator = NetworkFile.of(inputs["generator"], run.device)
    features = plan_features(config, tokens, dims_of(generator, tokens, config.layer))
    spec = DescribeSpec(generator, artifact.path, config, features)
    shards = [features.shard_range(shard) for shard in range(features.shards)]
    map_shards(out, run, describe_shard, spec, [stop - start for start, stop in shards], label="describe", unit="rows")
    write_labels_and_metadata(out, features, tokens)
    dims = features.shape[1]
    out.facts = {
        "images": tokens.n_images,
        "views": tokens.n_crops,
        "classes": tokens.attributes.classes,
        "dims": dims,
        "layer": config.layer,
        "generator": inputs["generator"].content,
    }
    out.figure = f"{len(tokens):,} features of {dims} values (layer {config.layer} of {card.model.kind})"


def dims_of(generator: NetworkFile, tokens: TokenSet, layer: int) -> int:
    """Values of a hidden state."""
    import torch

    codes_1T = torch.zeros(1, tokens.attributes.tokens, dtype=torch.int64)
    with threads(1):
        return int(mean_states(load_generator(generator), codes_1T.to(pick_device(generator.device)), layer).shape[1])


def plan_features(config: DescribeTokensConfig, tokens: TokenSet, dims: int) -> ArraySpec:
    """How the features lie in shards: all rows of an image in one of them."""
    return ArraySpec(
        shape=(len(tokens), dims),
        dtype=config.dtype,
        chunk_rows=config.chunk_images * tokens.n_crops,
        shard_rows=config.shard_images * tokens.n_crops,
        dimension_names=("row", "value"),
    )


def describe_shard(spec: DescribeSpec, number: int) -> dict[str, bytes]:
    """The features of one shard, in passes of exactly `rows_per_pass` rows, the last one padded with its first row."""
    import torch

    config, tokens, device = spec.config, open_tokens(spec.tokens), pick_device(spec.generator.device)
    start, stop = spec.features.shard_range(number)
    codes_NT = tokens.codes_of(np.arange(start, stop))
    check_codes(codes_NT, tokens.codes, start, CorruptError, str(spec.tokens / "tokens"))
    found = []
    is_half = config.precision == "bfloat16"
    with threads(1), products(config.precision), torch.autocast(device.type, torch.bfloat16, enabled=is_half):
        network = load_generator(spec.generator)
        for first in range(0, len(codes_NT), config.rows_per_pass):
            rows_R = np.arange(first, first + config.rows_per_pass)
            rows_R[rows_R >= len(codes_NT)] = first
            codes_RT = torch.from_numpy(codes_NT[rows_R].astype(np.int64)).to(device)
            found.append(mean_states(network, codes_RT, config.layer)[: len(codes_NT) - first].cpu().numpy())
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is then refused
        features_ND = np.concatenate(found).astype(config.dtype)
    check_finite(features_ND, start, spec)
    name, data = encode_shard(spec.features, number, features_ND)
    return {f"features/{name}": data}


def mean_states(network: Any, codes_RT: torch.Tensor, layer: int) -> torch.Tensor:
    """The mean over all positions of the hidden states of a layer (R, D), float32."""
    import torch

    with torch.inference_mode():
        mean_RD: torch.Tensor = network.hidden_states(codes_RT, layer).float().mean(1)
    return mean_RD


def check_finite(features_ND: NDArray[Any], first_row: int, spec: DescribeSpec) -> None:
    bad = np.flatnonzero(~np.isfinite(features_ND).all(1))
    if len(bad):
        raise NumericError(
            f"the hidden states of row {first_row + int(bad[0])} are not finite in {features_ND.dtype} ({len(bad)} of "
            f"{len(features_ND)} rows of this shard)",
            path=spec.generator.path,
            hint="check the generator's weights"
            + (", or use dtype float32" if features_ND.dtype == np.float16 else ""),
        )


def write_labels_and_metadata(out: Draft, features: ArraySpec, tokens: TokenSet) -> None:
    """What stands beside the features, after the shards."""
    images = tokens.n_images
    labels = ArraySpec(shape=(images,), dtype="int32", chunk_rows=images, dimension_names=("image",))
    if not out.is_done("labels"):
        name, data = encode_shard(labels, 0, tokens.labels)
        out.put("labels", {f"labels/{name}": data})
    if not out.is_done("metadata"):
        out.put("metadata", group_files({}, {"features": features, "labels": labels}))
