"""`kmeans`: cluster features to a codebook, one checkpoint per iteration."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import InputError, NumericError
from pipeline.keys import UNKEYED
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.arrays import MappedArray
from smalti.counting import counted
from stages.codes.clustering import Moved, Rows, move, search_threads
from stages.codes.code_usage import CodeUsage
from stages.codes.encoders import read_encoder
from stages.codes.reservoir import hash_rows, smallest_rows
from stages.codes.tokenizing import save_codebook
from stages.devices import free_bytes, pick_device
from stages.weights.cards import digest_of

if TYPE_CHECKING:
    import torch

# N rows that are clustered, K clusters, D values of a feature
SIZES = "sizes.npy"  # rows of each cluster, int64 (K,)
OF_CODES = "holds a generator's hidden states of codes: no image could be encoded with their centroids"
SAMPLE, START = 0, 1  # streams of the hash: which rows are clustered, and from which the centroids start


class KMeansConfig(Config):
    """Number of codes, iterations, and the rows that are clustered."""

    clusters: int = Field(default=128, ge=1, description="codes of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of assignment and averaging")
    seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the rows that are chosen")
    max_rows: int | None = Field(
        default=None,
        ge=1,
        description="features that are clustered; of more, those of the smallest hash; null: 256 per cluster, as in faiss",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="memory of the whole process, in GiB; features that do not fit are read again in every iteration, with "
        "the same result; null: half of what is free",
        json_schema_extra=UNKEYED,
    )

    @property
    def most_rows(self) -> int:
        """Largest number of features that are clustered."""
        return self.max_rows or 256 * self.clusters


def foresee(config: KMeansConfig, inputs: KnownInputs) -> Facts:
    """The codes are those of the encoder's grid; there must be as many features as clusters."""
    features = inputs["features"]
    if "layer" in features.facts:
        raise inputs.refusal(f"cannot read {features.name}, which {OF_CODES}")
    if config.most_rows < config.clusters:
        raise inputs.refusal(f"wants {config.clusters} clusters of at most {config.max_rows} features (max_rows)")
    images, *known = (features.get(name) for name in ("images", "views", "grid"))
    if images is not None and None not in known:
        views, (height, width) = known
        rows = features.get("rows", images * views * height * width)
        if rows < config.clusters:
            raise inputs.refusal(
                f"wants {counted(config.clusters, 'cluster')}, but {features.name} has {counted(rows, 'feature')} of {counted(images, 'image')}",
                hint="lower clusters, or extract features of more images",
            )
    return {
        "tokenizer": inputs.own(digest_of(inputs.made)),
        "codes": config.clusters,
        **features.only("grid", "pixels", "accepts"),
    }


@stage(
    "kmeans",
    version=2,
    config=KMeansConfig,
    reads={"features": read("features", help="features to cluster")},
    writes="codebook",
    example="smalti kmeans --features digits/rar/features --clusters 128",
    foresees=foresee,
)
def fit_kmeans(config: KMeansConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Cluster features with K-Means; the centroids and the encoder together turn images into codes.

    reads: features.  writes: config.json and weights.safetensors (centroids, encoder), sizes.npy.  resumes: after the last
    iteration.  Threads and memory change no byte. Figures are those of the last assignment.
    """
    device = pick_device(run.device)
    rows = choose_rows(inputs["features"], config)
    if fits_into_memory(rows, config, run.threads):
        rows.hold()
    last = iterate(config, rows, out, run, device)
    if not (out.is_done("weights") and out.is_done("config")):
        save_codebook(*read_encoder(inputs["features"]), last.centroids_KD, out)
    usage = CodeUsage(config.clusters, last.counts_K)
    if not out.is_done("sizes"):
        out.put("sizes", {SIZES: npy_bytes(usage.counts_K)})
    facts = inputs["features"].facts
    carried = {name: facts[name] for name in ("grid", "dims", "encoder", "image_size", "accepts") if name in facts}
    out.facts |= carried | {
        "codebook_size": config.clusters,
        "rows": rows.count,
        "inertia": round(last.inertia / rows.count, 6),
        "perplexity": usage.perplexity,
        "used": usage.used,
        "sizes": usage.sizes,
    }
    sizes = ", ".join(f"{name} cluster {size:,}" for name, size in usage.sizes.items())
    out.figure = f"{usage.sentence}, {sizes}, {facts['encoder']}"


def choose_rows(features: Artifact, config: KMeansConfig) -> Rows:
    """The features that are clustered, in the order of their rows."""
    if "layer" in features.facts:
        raise InputError(f"{features.name} {OF_CODES}", path=features.path)
    array = MappedArray(features.file("features/zarr.json").parent)
    rows = int(np.prod(array.shape[:-1]))
    if min(rows, config.most_rows) < config.clusters:
        found = (
            f"{features.name} has {counted(rows, 'feature')}"
            if rows < config.clusters
            else f"max_rows is {config.max_rows}"
        )
        raise InputError(
            f"{counted(config.clusters, 'cluster')} need at least as many features, but {found}",
            path=features.path,
            hint="lower clusters, or extract features of more images",
        )
    is_all = rows <= config.most_rows
    chosen_N = None if is_all else smallest_rows(rows, config.most_rows, seed=config.seed, stream=SAMPLE)
    return Rows(array, chosen_N, name=features.name)


def fits_into_memory(rows: Rows, config: KMeansConfig, threads: int) -> bool:
    """Whether the budget holds all rows beside this process, centroids and sums, and the blocks of all threads."""
    import psutil
    import torch

    free = free_bytes(torch.device("cpu")) / 2
    if config.memory_gib is not None:
        free = config.memory_gib * 2**30 - psutil.Process().memory_info().rss
    return rows.count * rows.dims * 4 + config.clusters * rows.dims * 40 + threads * 2**26 <= free


def iterate(config: KMeansConfig, rows: Rows, out: Draft, run: Runtime, device: torch.device) -> Moved:
    """The last iteration; each is kept in scratch/ until the next one is."""
    done, last = last_checkpoint(out, rows, config)
    with (
        run.progress.bar("k-means", total=config.iterations, unit="iterations") as bar,
        search_threads(run.threads) as pool,
    ):
        bar.skip(done)
        for iteration in range(done + 1, config.iterations + 1):
            last = move(rows, last.centroids_KD, device=device, pool=pool, threads=run.threads)
            if not np.isfinite(last.centroids_KD).all():
                raise NumericError(
                    f"centroids of iteration {iteration} are not finite; the checkpoint before it is kept"
                )
            keep_checkpoint(out, iteration, last)
            used = int(np.count_nonzero(last.counts_K))
            run.progress.record("iteration", iteration=iteration, inertia=last.inertia, used=used)
            bar.advance(1, inertia=last.inertia / rows.count)
    return last


def last_checkpoint(out: Draft, rows: Rows, config: KMeansConfig) -> tuple[int, Moved]:
    """Iterations that are done, and the last of them; at the start the centroids are the rows of the smallest hash."""
    units = sorted(unit for unit in out.units() if unit.startswith("iteration-"))
    if units:
        with np.load(out.files(units[-1])[0], allow_pickle=False) as found:
            last = Moved(found["centroids_KD"], found["counts_K"], float(found["inertia"]))
        return int(units[-1].removeprefix("iteration-")), last
    first_K = smallest_rows(rows.count, config.clusters, seed=config.seed, stream=START)
    order_K = np.argsort(hash_rows(first_K.astype(np.uint64), seed=config.seed, stream=START))
    return 0, Moved(rows.take(first_K[order_K]), np.zeros(config.clusters, dtype=np.int64), 0.0)


def keep_checkpoint(out: Draft, iteration: int, last: Moved) -> None:
    older = [unit for unit in out.units() if unit.startswith("iteration-")]
    buffer = io.BytesIO()
    np.savez(buffer, **last._asdict(), allow_pickle=False)
    unit = f"iteration-{iteration:06d}"
    out.put(unit, {f"scratch/{unit}.npz": buffer.getvalue()})
    for unit in older:
        out.drop(unit)


def npy_bytes(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
