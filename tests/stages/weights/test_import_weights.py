"""Published files become artifacts like any other: they encode, sample and decode; what does not fit is refused."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.generators.config import CodeShape, RarConfig
from models.generators.rar.network import Rar
from models.losses.config import AdversarialConfig, PatchConfig
from pipeline.artifact import Artifact
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError, StorageError, UsageError
from smalti.tokens import open_tokens
from stages import stages
from stages.images.image_files import open_pictures
from stages.weights.cards import TokenizerCard, read_card
from stages.weights.files import load_config, load_weights
from stages.weights.import_weights import LAYOUTS, ImportConfig
from stages.weights.networks import NetworkFile, build_adversary, load_generator, load_tokenizer
from tests.hub import Hub
from tests.lightning import KINDS, TOKENIZERS, generator_state, tokenizer_state, write, write_generator, write_tokenizer
from tests.models.generators import digit_fixtures
from tests.stages.conformance import check_every_crash, draw_folder, index_folder, run_stage

GOLDEN = Path(__file__).parents[2] / "golden"
CODES, SIDE, CLASSES = 48, 4, 3  # the codebook of the golden MaskGIT-VQGAN; a grid and classes of our own


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def published(name: str) -> dict[str, torch.Tensor]:
    """A small state dict in published names."""
    return {key.removeprefix("weights/"): value for key, value in golden(name).items() if key.startswith("weights/")}


def rar_state(*, codes: int = CODES, classes: int = CLASSES, tokens: int = SIDE * SIDE) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = Rar(
        RarConfig(width=16, layers=2, heads=2, mlp_width=24), CodeShape(codes=codes, grid=(tokens, 1), classes=classes)
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.state_dict()


def saved(folder: Path, state: dict[str, Any], name: str = "weights.bin") -> Path:
    torch.save(state, folder / name)
    return folder / name


def imported(store: Path, file: Path, config: dict[str, Any], **inputs: Artifact) -> Artifact:
    return run_stage("import-weights", store, config, inputs=inputs, paths={"weights": file})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Artifact:
    file = saved(folder, published("rar/maskgit_vqgan"), "maskgit-vqgan.bin")
    return imported(folder / "store", file, {"layout": "maskgit-vqgan", "resolution": 16})


@pytest.fixture(scope="module")
def generator(folder: Path, tokenizer: Artifact) -> Artifact:
    return imported(folder / "store", saved(folder, rar_state(), "rar.bin"), {"layout": "rar"}, tokenizer=tokenizer)


def test_an_imported_tokenizer_gives_the_published_codes(tokenizer: Artifact) -> None:
    network = load_tokenizer(NetworkFile.of(tokenizer, "cpu"))
    values = golden("rar/maskgit_vqgan")
    assert torch.equal(network.encode(values["in/image"].float()).flatten(1), values["out/codes"])
    assert (tokenizer.kind, network.rounding, network.downsample) == ("tokenizer", "truncate", 4)
    assert tokenizer.facts["codebook_size"] == CODES


def test_imported_weights_go_through_the_pipeline(
    tokenizer: Artifact, generator: Artifact, folder: Path, tmp_path: Path
) -> None:
    store = folder / "store"
    images = index_folder(draw_folder(tmp_path / "images", images=3, pixels=16), store)
    cut = {"shard_images": 8, "chunk_images": 4, "rows_per_pass": 4}
    tokens = run_stage("pretokenize", store, cut, inputs={"images": images, "tokenizer": tokenizer})
    assert open_tokens(tokens.path).grid == (SIDE, SIDE)
    samples = run_stage("sample", store, {"images": 6, **cut}, inputs={"generator": generator})
    drawn = open_tokens(samples.path)
    assert len(np.unique(drawn.tokens.read())) > 5
    assert drawn.attributes.tokenizer == TokenizerCard.of(tokenizer).identity == tokens.facts["tokenizer"]
    decoded = run_stage("decode", store, cut, inputs={"tokens": samples, "tokenizer": tokenizer})
    pictures = open_pictures(decoded, size=16)
    assert (len(pictures), pictures.size) == (6, 16)
    assert pictures.read(0, 6).std() > 0


def test_a_generator_keeps_its_numbers(generator: Artifact) -> None:
    network = load_generator(NetworkFile.of(generator, "cpu"))
    state = rar_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    facts = {name: generator.facts[name] for name in ("codes", "tokens", "grid", "classes", "parameters")}
    parameters = sum(tensor.numel() for tensor in state.values())
    assert facts == {"codes": 48, "tokens": 16, "grid": [4, 4], "classes": 3, "parameters": parameters}


def test_tensors_that_share_memory_or_are_half_precision(tmp_path: Path) -> None:
    state = rar_state()
    plain = imported(tmp_path / "store", saved(tmp_path, state), {"layout": "rar"})
    state["lm_head.bias"] = torch.cat([state["lm_head.bias"], torch.ones(5)])[:CODES]
    state["blocks.0.norm1.weight"] = state["blocks.0.norm2.weight"]
    state["cls_token"] = state["cls_token"].half()
    shared = imported(tmp_path / "store", saved(tmp_path, state, "shared.bin"), {"layout": "rar"})
    before, after = (load_generator(NetworkFile.of(artifact, "cpu")).state_dict() for artifact in (plain, shared))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "blocks.0.norm1.weight",
        "cls_token",
    }
    assert torch.equal(after["blocks.0.norm1.weight"], before["blocks.0.norm2.weight"])
    assert torch.equal(after["cls_token"], before["cls_token"].half().float())


@pytest.mark.parametrize(
    ("layout", "name"), [("ibq", "ibq/tokenizer_ckpt"), ("open-magvit2", "open_magvit2/tokenizer_checkpoint")]
)
def test_averaged_or_raw_weights_of_a_lightning_file(tmp_path: Path, layout: str, name: str) -> None:
    state = published(name)
    file = saved(tmp_path, {"state_dict": state, "epoch": 1, "optimizer_states": [{"lr": 0.1}]}, "w.ckpt")
    key = "encoder.conv_out.weight"
    wanted = {"auto": state[f"model_ema.{key.replace('.', '')}"], "raw": state[key]}
    wanted["ema"] = wanted["auto"]
    for values, tensor in wanted.items():
        artifact = imported(tmp_path / "store", file, {"layout": layout, "values": values})
        network = load_tokenizer(NetworkFile.of(artifact, "cpu"))
        assert torch.equal(network.state_dict()[f"autoencoder.{key}"], tensor.float())
        codes_Bhw = network.encode(torch.rand(1, 3, 32, 32))
        assert network.decode(codes_Bhw).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("layout", KINDS)
def test_a_generator_that_holds_its_tokenizer(tmp_path: Path, layout: str) -> None:
    """Each part is an artifact, and the generator names the tokenizer that comes out of the same file."""
    file = write_generator(tmp_path / "ar.ckpt", layout, classes=5)
    tokenizer = imported(tmp_path / "store", file, {"layout": layout, "part": "tokenizer", "resolution": 256})
    generator = imported(tmp_path / "store", file, {"layout": layout, "part": "generator"})
    assert (tokenizer.kind, generator.kind) == ("tokenizer", "generator")
    assert generator.facts["tokenizer"] == TokenizerCard.of(tokenizer).identity
    assert load_tokenizer(NetworkFile.of(tokenizer, "cpu")).config.autoencoder == TOKENIZERS[layout].autoencoder
    card = read_card(generator)
    assert (card.model.kind, card.space.grid, card.space.resolution) == (KINDS[layout], (16, 16), 256)
    weights, state = load_generator(NetworkFile.of(generator, "cpu")), generator_state(layout, classes=5)
    assert len(weights.state_dict()) == len(state)
    embedding = state["transformer.class_emb.embedding_table.weight"]
    assert torch.equal(weights.state_dict()["class_embedding.weight"], embedding)
    joined = imported(tmp_path / "store", file, {"layout": layout, "part": "generator"}, tokenizer=tokenizer)
    assert joined.facts == generator.facts
    smaller = imported(tmp_path / "store", file, {"layout": layout, "part": "generator", "resolution": 64})
    assert read_card(smaller).space.grid == (4, 4)
    other = imported(tmp_path / "store", write_tokenizer(tmp_path / "other.ckpt", layout), {"layout": layout})
    with pytest.raises(CorruptError, match="was made with another tokenizer"):
        imported(tmp_path / "store", file, {"layout": layout, "part": "generator"}, tokenizer=other)


@pytest.mark.parametrize(("layout", "heads", "pixels"), [("ibq", 2, 64), ("open-magvit2", 4, 8)])
def test_heads_that_are_not_64_wide(tmp_path: Path, layout: str, heads: int, pixels: int) -> None:
    """The published generators of the fixtures: the one alone, the other with its tokenizer of two pixels a code."""
    name = {"ibq": "ibq/ar", "open-magvit2": "open_magvit2/ar_generator"}[layout]
    config = {"layout": layout, "part": "generator", "heads": heads, "resolution": pixels}
    artifact = imported(tmp_path / "store", saved(tmp_path, published(name), "w.ckpt"), config)
    card = read_card(artifact)
    assert (card.model.heads, card.space.grid, card.space.classes) == (heads, (4, 4), 10)
    assert bool(card.space.tokenizer) == (layout == "open-magvit2")


@pytest.mark.parametrize("layout", KINDS)
def test_a_part_that_is_not_there_is_refused(tmp_path: Path, layout: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.ckpt", layout)
    with pytest.raises(CorruptError, match=r"holds a tokenizer, but no generator.*--part tokenizer"):
        imported(tmp_path / "store", tokenizer, {"layout": layout, "part": "generator"})
    generator = write(tmp_path / "generator.ckpt", generator_state(layout))
    with pytest.raises(CorruptError, match=r"holds a generator, but no tokenizer.*--part generator"):
        imported(tmp_path / "store", generator, {"layout": layout})
    assert imported(tmp_path / "store", generator, {"layout": layout, "part": "generator"}).facts["tokenizer"] == {}


@pytest.mark.parametrize("layout", KINDS)
def test_every_difference_of_a_generator_stands_in_a_table(tmp_path: Path, layout: str) -> None:
    state = generator_state(layout) | {f"first_stage_model.{k}": v for k, v in tokenizer_state(layout).items()}
    state["transformer.more.weight"] = torch.zeros(2)
    block = "blocks" if layout == "ibq" else "spatial_blocks"
    del state[f"transformer.{block}.1.feed_forward.w3.weight"]
    config = {"layout": layout, "part": "generator"}
    with pytest.raises(CorruptError) as caught:
        imported(tmp_path / "store", write(tmp_path / "w.ckpt", state), config)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["missing", f"{block}.1.feed_forward.w3.weight", "-", "256x64"] in lines
    assert ["surplus", "more.weight", "2", "-"] in lines
    other = {"ibq": "open-magvit2", "open-magvit2": "ibq"}[layout]
    with pytest.raises(CorruptError, match=f"is not of layout {other}"):
        imported(tmp_path / "store", write_generator(tmp_path / "x.ckpt", layout), {**config, "layout": other})


def digit_file(path: Path, name: str, *, settings: dict[str, Any] | None = None) -> Path:
    """A checkpoint as fairseq writes it, with all that training kept beside the generator."""
    state = digit_fixtures.published_weights(name)
    if name == "vq_baseline":  # its fixture leaves out the VQGAN of the others
        others = digit_fixtures.published_weights("stage2_ar").items()
        state |= {key: tensor for key, tensor in others if key.startswith("vqgan.")}
    model = digit_fixtures.about(name)["config"] if settings is None else settings
    cfg = {"_name": None, "model": model, "task": argparse.Namespace(seed=1)}
    torch.save(
        {"args": None, "cfg": cfg, "model": state, "extra_state": {"epoch": 3}, "last_optimizer_state": {}}, path
    )
    return path


@pytest.mark.parametrize("name", ["stage1_uncond", "stage1_classcond", "stage2_ar", "stage2_nar", "vq_baseline"])
def test_the_checkpoints_of_digit(tmp_path: Path, name: str) -> None:
    """The generator, with what it is given, and the VQGAN in the same file, where there is one."""
    file = digit_file(tmp_path / "checkpoint_best.pt", name)
    sampling = {"sampling": "masks"} if name == "stage2_nar" else {}
    generator = imported(tmp_path / "store", file, {"layout": "digit", **sampling})
    network, wanted = load_generator(NetworkFile.of(generator, "cpu")), digit_fixtures.network(name)
    assert all(torch.equal(tensor, wanted.state_dict()[key]) for key, tensor in network.state_dict().items())
    assert network.config == wanted.config
    card = read_card(generator)
    assert card.space.grid == (16, 16)
    assert (card.condition is None) == (not name.startswith("stage2"))
    part = {"layout": "digit", "part": "tokenizer"}
    if name.startswith("stage1"):
        assert card.space.tokenizer == {}
        with pytest.raises(CorruptError, match="holds a generator, but no tokenizer"):
            imported(tmp_path / "store", file, part)
    else:
        tokenizer = imported(tmp_path / "store", file, part)
        assert (card.space.tokenizer, card.space.codes) == (TokenizerCard.of(tokenizer).identity, 48)


def test_heads_that_a_digit_file_does_not_tell(tmp_path: Path) -> None:
    file = digit_file(tmp_path / "checkpoint.pt", "stage1_uncond", settings={})
    with pytest.raises(CorruptError, match="decoder_attention_heads in the file's settings must be"):
        imported(tmp_path / "store", file, {"layout": "digit"})
    assert read_card(imported(tmp_path / "store", file, {"layout": "digit", "heads": 2})).model.heads == 2


@pytest.mark.parametrize("name", ["ibq/tokenizer_ckpt", "open_magvit2/tokenizer_checkpoint"])
def test_the_discriminator_of_a_lightning_file(tmp_path: Path, name: str) -> None:
    """A training beside a discriminator starts from it; averaged weights are the default, running statistics have none."""
    state = published(name)
    file = saved(tmp_path, {"state_dict": state, "epoch": 1}, "w.ckpt")
    key = "loss.discriminator.main.3.weight"
    wanted = {"auto": state[f"model_ema.{key.replace('.', '')}"], "raw": state[key]}
    for values, tensor in wanted.items():
        artifact = imported(tmp_path / "store", file, {"layout": "discriminator", "values": values})
        weights = load_weights(artifact)
        assert torch.equal(weights["discriminator.main.3.weight"], tensor.float())
        running = state["loss.discriminator.main.3.running_var"].float()
        assert torch.equal(weights["discriminator.main.3.running_var"], running)
    card = load_config(artifact)
    config = AdversarialConfig(discriminator=PatchConfig.model_validate(card["discriminator"]))
    adversary = build_adversary(config, channels=card["channels"], start=artifact)
    assert torch.equal(adversary.discriminator.main[3].weight, wanted["raw"].float())


def test_a_discriminator_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    state = published("ibq/tokenizer_ckpt")
    del state["loss.discriminator.main.5.weight"], state["model_ema.lossdiscriminatormain8weight"]
    state["loss.discriminator.main.2.extra"] = torch.zeros(2)
    with pytest.raises(CorruptError) as caught:
        imported(tmp_path / "store", saved(tmp_path, state), {"layout": "discriminator"})
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["missing", "loss.discriminator.main.5.weight"] in [line[:2] for line in lines]
    assert ["missing", "model_ema.lossdiscriminatormain8weight"] in [line[:2] for line in lines]
    assert ["surplus", "loss.discriminator.main.2.extra", "2", "-"] in lines
    with pytest.raises(CorruptError, match=r"not of layout discriminator.*\n.*\n.*missing +loss\.discriminator\.main"):
        imported(tmp_path / "store", saved(tmp_path, published("rar/maskgit_vqgan")), {"layout": "discriminator"})


def test_averages_that_are_not_there_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, published("rar/maskgit_vqgan"))
    with pytest.raises(CorruptError, match="holds no averaged weights"):
        imported(tmp_path / "store", file, {"layout": "maskgit-vqgan", "values": "ema"})


@pytest.mark.parametrize("layout", ["rar", "maskgit-vqgan", "ibq", "open-magvit2"])
def test_every_difference_stands_in_a_table(tmp_path: Path, layout: str) -> None:
    sources = {
        "maskgit-vqgan": "rar/maskgit_vqgan",
        "ibq": "ibq/tokenizer_ckpt",
        "open-magvit2": "open_magvit2/tokenizer_checkpoint",
    }
    state = published(sources[layout]) if layout in sources else rar_state()
    bias = "decoder.conv_out.bias" if layout in sources else "blocks.1.attn.proj.bias"
    for name in (bias, f"model_ema.{bias.replace('.', '')}"):
        state.pop(name, None)
    state["more.weight"] = torch.zeros(2)
    if any(name.startswith("model_ema.") for name in state):
        state["model_ema.moreweight"] = torch.zeros(2)
    with pytest.raises(CorruptError) as caught:
        imported(tmp_path / "store", saved(tmp_path, state), {"layout": layout})
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["missing", bias] in [line[:2] for line in lines]
    assert ["surplus", "more.weight", "2", "-"] in lines


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    state = rar_state()
    state["lm_head.bias"][1] = torch.nan
    with pytest.raises(CorruptError, match=r"lm_head.bias in .* holds NaN"):
        imported(tmp_path / "store", saved(tmp_path, state), {"layout": "rar"})


def test_a_generator_of_other_codes_than_its_tokenizer_is_refused(tmp_path: Path, tokenizer: Artifact) -> None:
    file = saved(tmp_path, rar_state(codes=7))
    with pytest.raises(CorruptError, match=r"a generator of 7 codes, but .* has 48"):
        imported(tmp_path / "store", file, {"layout": "rar"}, tokenizer=tokenizer)


def test_samples_for_another_tokenizer_than_the_generator_names_are_refused(
    tmp_path: Path, generator: Artifact, tokenizer: Artifact
) -> None:
    state = published("rar/maskgit_vqgan")
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 1
    other = imported(tmp_path / "store", saved(tmp_path, state), {"layout": "maskgit-vqgan"})
    with pytest.raises(CorruptError, match="was made with another tokenizer"):
        run_stage("sample", tmp_path / "store", {"images": 2}, inputs={"generator": generator, "tokenizer": other})


def test_what_makes_no_sense_is_refused(tmp_path: Path, tokenizer: Artifact) -> None:
    file = saved(tmp_path, rar_state())
    for config, said in (
        ({"layout": "rar", "resolution": 16}, "resolution says nothing about a generator"),
        ({"layout": "ibq", "class_names": "imagenet"}, "class_names says nothing about a tokenizer"),
        ({"layout": "rar", "part": "tokenizer"}, "layout rar has no tokenizer"),
        ({"layout": "ibq", "heads": 2}, "heads says nothing about a tokenizer"),
        ({"layout": "rar", "class_names": "imagenet"}, "names 1000 classes, but .* has 3"),
    ):
        with pytest.raises(UsageError, match=said):
            imported(tmp_path / "store", file, config)
    with pytest.raises(UsageError, match="takes no tokenizer as input"):
        imported(tmp_path / "store", file, {"layout": "ibq"}, tokenizer=tokenizer)
    with pytest.raises(CorruptError, match="of a square grid"):
        imported(tmp_path / "store", saved(tmp_path, rar_state(tokens=6)), {"layout": "rar"})
    with pytest.raises(InputError, match="there is no weight file"):
        imported(tmp_path / "store", tmp_path / "absent.bin", {"layout": "rar"})


def test_names_of_the_classes_of_imagenet(tmp_path: Path) -> None:
    artifact = imported(
        tmp_path / "store", saved(tmp_path, rar_state(classes=1000)), {"layout": "rar", "class_names": "imagenet"}
    )
    card = read_card(artifact)
    assert [card.space.class_names[label] for label in (0, 207, 360, 387)] == [
        "tench",
        "golden retriever",
        "otter",
        "lesser panda",
    ]


def test_a_file_of_the_hub_enters_the_key_by_its_digest(tmp_path: Path, hub: Hub) -> None:
    """Same key, same bytes: when the hub gives another file under the same name, another artifact comes out."""
    place = {"repository": "somebody/rar", "file": "rar_b.bin"}
    config = {"layout": "rar", "hub": place}
    first = hub.keep("somebody/rar", "rar_b.bin", saved(tmp_path, rar_state()).read_bytes())
    one = run_stage("import-weights", tmp_path / "store", config)
    assert one.externals == {"weights": first}
    assert one.facts["weights"] == first
    run_stage("import-weights", tmp_path / "store", config)
    assert hub.asked == [("somebody/rar", "rar_b.bin", "main")]
    shutil.rmtree(hub.cache)
    second = hub.keep("somebody/rar", "rar_b.bin", saved(tmp_path, rar_state(classes=7), "other.bin").read_bytes())
    other = run_stage("import-weights", tmp_path / "store", config)
    assert other.key != one.key
    assert other.externals == {"weights": second}


def test_a_digest_in_the_config_gives_the_key_before_the_download(tmp_path: Path, hub: Hub) -> None:
    file = saved(tmp_path, rar_state())
    place = {"repository": "somebody/rar", "file": "rar_b.bin", "sha256": hash_file(file)}
    config = {"layout": "rar", "hub": place}
    with pytest.raises(StorageError, match=r"cannot be downloaded .*--weights FILE"):
        run_stage("import-weights", tmp_path / "store", config)
    hub.keep("somebody/rar", "rar_b.bin", file.read_bytes())
    made = run_stage("import-weights", tmp_path / "store", config)
    hub.forget()
    shutil.rmtree(hub.cache)
    assert run_stage("import-weights", tmp_path / "store", config).key == made.key
    given = run_stage("import-weights", tmp_path / "other", config, paths={"weights": file})
    assert given.key == made.key


def test_a_download_with_another_digest_is_refused(tmp_path: Path, hub: Hub) -> None:
    hub.keep("somebody/rar", "rar_b.bin", saved(tmp_path, rar_state()).read_bytes())
    place = {"repository": "somebody/rar", "file": "rar_b.bin", "sha256": "0" * 64}
    with pytest.raises(CorruptError, match=r"has SHA-256 .* expected 000000"):
        run_stage("import-weights", tmp_path / "store", {"layout": "rar", "hub": place})


def test_whole_after_every_crash(tmp_path: Path) -> None:
    file = saved(tmp_path, rar_state())
    assert check_every_crash(lambda store: imported(store, file, {"layout": "rar"}), tmp_path, most=6) >= 6


def test_the_kind_follows_from_the_layout() -> None:
    declared = stages()["import-weights"]
    kinds = {layout: declared.kind(ImportConfig(layout=layout)) for layout in LAYOUTS}
    assert (kinds.pop("rar"), kinds.pop("digit")) == ("generator", "generator")
    assert kinds.pop("discriminator") == "discriminator"
    assert declared.kind(ImportConfig(layout="ibq", part="generator")) == "generator"
    assert set(kinds.values()) == {"tokenizer"}
