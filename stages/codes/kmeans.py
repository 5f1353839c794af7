"""`kmeans`: cluster features to a codebook, one checkpoint per iteration."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import InputError, NumericError
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.arrays import MappedArray
from smalti.counting import counted
from stages.codes.code_usage import CodeUsage
from stages.codes.encoders import ENCODER, ENCODER_WEIGHTS
from stages.codes.reservoir import hash_rows, smallest_rows
from stages.codes.tokenizing import CENTROIDS, ENCODER_PREFIX
from stages.devices import pick_device
from stages.weights.cards import digest_of
from stages.weights.files import save_weights

if TYPE_CHECKING:
    import faiss

# N rows that are clustered, K clusters, D values of a feature
ROWS_AT_ONCE = 2**16
SAMPLE, START = 0, 1  # streams of the hash: which rows are clustered, and from which the centroids start


class KMeansConfig(Config):
    """How many codes, and how long they are sought."""

    clusters: int = Field(default=128, ge=1, description="codes of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of assignment and averaging")
    seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the rows that are chosen")
    max_rows: int = Field(
        default=1_000_000, ge=1, description="features that are clustered; of more, those of the smallest hash"
    )


def foresee(config: KMeansConfig, inputs: KnownInputs) -> Facts:
    """The codes are those of the encoder's grid; there must be as many features as clusters."""
    features = inputs["features"]
    if config.max_rows < config.clusters:
        raise inputs.refusal(f"wants {config.clusters} clusters of at most {config.max_rows} features (max_rows)")
    known = [features.get(name) for name in ("images", "views", "grid")]
    if None not in known:
        images, views, (height, width) = known
        rows = images * views * height * width
        if rows < config.clusters:
            raise inputs.refusal(
                f"wants {counted(config.clusters, 'cluster')}, but {features.name} has {counted(rows, 'feature')} of {counted(images, 'image')}",
                hint="lower clusters, or extract features of more images",
            )
    return {
        "tokenizer": inputs.own(digest_of(inputs.made)),
        "codes": config.clusters,
        **features.only("grid", "pixels"),
    }


@stage(
    "kmeans",
    version=1,
    config=KMeansConfig,
    reads={"features": read("features", help="features to cluster")},
    writes="codebook",
    example="smalti kmeans --features digits/rar/features --clusters 128",
    foresees=foresee,
)
def fit_kmeans(config: KMeansConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Cluster features with K-Means; the centroids and the encoder together turn images into codes.

    reads: features.  writes: config.json and weights.safetensors (centroids, encoder).  resumes: after the last
    iteration.  On the CPU faiss runs with one thread, so that the same features give the same bytes.
    """
    rows_ND = read_sample(inputs["features"], config)
    with clustering(config, rows_ND, run) as faiss_run:
        centroids_KD = iterate(config, rows_ND, out, run, faiss_run)
        usage, inertia = faiss_run.judge(rows_ND, centroids_KD)
    if not (out.is_done("weights") and out.is_done("config")):
        save_codebook(inputs["features"], centroids_KD, out)
    facts = inputs["features"].facts
    out.facts |= {
        "codebook_size": config.clusters,
        "rows": len(rows_ND),
        "inertia": inertia,
        "perplexity": usage.perplexity,
        "used": usage.used,
        **{name: facts[name] for name in ("grid", "dims", "encoder", "image_size")},
    }
    out.figure = f"{usage.sentence}, {facts['encoder']}"


def read_sample(features: Artifact, config: KMeansConfig) -> NDArray[np.float32]:
    """The features that are clustered, (N, D), in the order of their rows."""
    array = MappedArray(features.file("features/zarr.json").parent)
    rows = int(np.prod(array.shape[:-1]))
    if rows < config.clusters or config.max_rows < config.clusters:
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
    chosen_N = smallest_rows(rows, config.max_rows, seed=config.seed, stream=SAMPLE)
    rows_ND = np.empty((len(chosen_N), array.shape[-1]), dtype=np.float32)
    for start in range(0, len(chosen_N), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows_ND[part] = array.rows(chosen_N[part], axes=3)
        if not np.isfinite(rows_ND[part]).all():
            raise NumericError(f"the features of {features.name} hold NaN or infinity", path=features.path)
    return rows_ND


def iterate(
    config: KMeansConfig, rows_ND: NDArray[np.float32], out: Draft, run: Runtime, faiss_run: FaissRun
) -> NDArray[np.float32]:
    """Centroids (K, D) after all iterations; each is kept in scratch/ until the next one is."""
    done, centroids_KD = last_checkpoint(out, rows_ND, config)
    with run.progress.bar("k-means", total=config.iterations, unit="iterations") as bar:
        bar.skip(done)
        for iteration in range(done + 1, config.iterations + 1):
            centroids_KD, inertia = faiss_run.step(rows_ND, centroids_KD)
            if not np.isfinite(centroids_KD).all():
                raise NumericError(
                    f"centroids of iteration {iteration} are not finite; the checkpoint before it is kept"
                )
            keep_checkpoint(out, iteration, centroids_KD)
            run.progress.record("iteration", iteration=iteration, inertia=inertia)
            bar.advance(1, inertia=inertia / len(rows_ND))
    return centroids_KD


def last_checkpoint(out: Draft, rows_ND: NDArray[np.float32], config: KMeansConfig) -> tuple[int, NDArray[np.float32]]:
    """Iterations that are done and their centroids; at the start the rows of the smallest hash."""
    units = sorted(unit for unit in out.units() if unit.startswith("iteration-"))
    if units:
        centroids_KD: NDArray[np.float32] = np.load(out.files(units[-1])[0], allow_pickle=False)
        return int(units[-1].removeprefix("iteration-")), centroids_KD
    hashes_N = hash_rows(np.arange(len(rows_ND), dtype=np.uint64), seed=config.seed, stream=START)
    return 0, rows_ND[np.argsort(hashes_N)[: config.clusters]]


def keep_checkpoint(out: Draft, iteration: int, centroids_KD: NDArray[np.float32]) -> None:
    older = [unit for unit in out.units() if unit.startswith("iteration-")]
    buffer = io.BytesIO()
    np.save(buffer, centroids_KD, allow_pickle=False)
    unit = f"iteration-{iteration:06d}"
    out.put(unit, {f"scratch/{unit}.npy": buffer.getvalue()})
    for unit in older:
        out.drop(unit)


def save_codebook(features: Artifact, centroids_KD: NDArray[np.float32], out: Draft) -> None:
    """The centroids, and the encoder as it is in the features: enough to turn images into codes."""
    import torch
    from safetensors.torch import load_file

    state = load_file(features.file(ENCODER_WEIGHTS))
    encoder = json.loads(features.file(ENCODER).read_bytes())
    tensors = {f"{ENCODER_PREFIX}{name}": value for name, value in state.items()}
    save_weights(
        out,
        {CENTROIDS: torch.from_numpy(centroids_KD), **tensors},
        {"kind": "kmeans", "clusters": len(centroids_KD), "encoder": encoder},
    )


class FaissRun:
    """faiss's index and parameters for one clustering; `step` is one iteration from given centroids."""

    def __init__(self, clusters: int, rows: int, index: faiss.Index):
        import faiss

        self.index = index
        self.clusters = clusters
        self.parameters = faiss.ClusteringParameters()
        self.parameters.niter = 1
        self.parameters.min_points_per_centroid = 1
        self.parameters.max_points_per_centroid = rows  # never another sample than ours

    def step(
        self, rows_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float]:
        """New centroids (empty clusters split a full one), and the inertia of the assignment that they come from."""
        import faiss

        clustering = faiss.Clustering(rows_ND.shape[1], self.clusters, self.parameters)
        faiss.copy_array_to_vector(np.ascontiguousarray(centroids_KD).ravel(), clustering.centroids)
        clustering.train(rows_ND, self.index)
        moved_KD = faiss.vector_float_to_array(clustering.centroids).reshape(self.clusters, -1).copy()
        return moved_KD, float(clustering.iteration_stats.at(0).obj)  # type: ignore[attr-defined]  # a wrapped vector

    def judge(self, rows_ND: NDArray[np.float32], centroids_KD: NDArray[np.float32]) -> tuple[CodeUsage, float]:
        """How the final centroids are used, and the mean squared distance to them."""
        self.index.reset()
        self.index.add(centroids_KD)
        usage, inertia = CodeUsage(self.clusters), 0.0
        for start in range(0, len(rows_ND), ROWS_AT_ONCE):
            distances_n1, codes_n1 = self.index.search(rows_ND[start : start + ROWS_AT_ONCE], 1)
            usage.add(codes_n1)
            inertia += float(distances_n1.sum(dtype=np.float64))
        return usage, round(inertia / len(rows_ND), 6)


@contextmanager
def clustering(config: KMeansConfig, rows_ND: NDArray[np.float32], run: Runtime) -> Iterator[FaissRun]:
    """faiss on the device, with one thread on the CPU: sums depend on the number of threads."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield FaissRun(config.clusters, len(rows_ND), make_index(rows_ND.shape[1], run))
    finally:
        faiss.omp_set_num_threads(threads)


def make_index(dims: int, run: Runtime) -> Any:
    """An exact index, on the GPU if the device is one and faiss can use it."""
    import faiss

    device = pick_device(run.device)
    index = faiss.IndexFlatL2(dims)
    if device.type != "cuda":
        return index
    if faiss.get_num_gpus() == 0:
        run.progress.say("  the installed faiss has no GPU support: clustering on the CPU")
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
