"""One line from published weights to a picture: imported, sampled, decoded, shown with the names of the classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cli.main import app
from models.generators.config import CodeShape, RarConfig
from models.generators.rar.network import Rar
from pipeline.store import Store
from smalti.arrays import MappedArray
from smalti.tokens import open_tokens
from stages.weights.places import PUBLISHED
from tests.hub import Hub
from tests.lightning import write_generator, write_tokenizer

MASKGIT = Path(__file__).parents[1] / "golden" / "rar" / "maskgit_vqgan.safetensors"
TOKENIZER = "maskgit-vqgan-imagenet-f16-256.bin"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generator and a small tokenizer under the published names."""
    folder = tmp_path_factory.mktemp("files")
    named = load_file(MASKGIT).items()
    torch.save({name.removeprefix("weights/"): one for name, one in named if "weights/" in name}, folder / TOKENIZER)
    torch.manual_seed(0)
    rar = Rar(RarConfig(width=16, layers=1, heads=2, mlp_width=16), CodeShape(codes=48, grid=(4, 4), classes=1000))
    torch.save(rar.state_dict(), folder / "rar_b.bin")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def published(files: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that holds the files, which are published with their digests."""
    for name, place in list(PUBLISHED.items()):
        if (files / name).exists():
            sha256 = hub.keep(place.repository, name, (files / name).read_bytes())
            monkeypatch.setitem(PUBLISHED, name, place.model_copy(update={"sha256": sha256}))
    return hub


def smalti(line: str, *words: object) -> Result:
    return CliRunner().invoke(app, [*line.split(), *(str(word) for word in words), "--device", "cpu"])


def answer(line: str, *words: object) -> dict[str, Any]:
    done = smalti(line, *words, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


DRAWN = f"--weights rar_b.bin --tokenizer {TOKENIZER} --classes 207,360,387 --images 3 --rows-per-pass auto"
LINE = f"sample {DRAWN} --sampling.guidance.scale 4 --out cats.png"
UNNAMED = LINE.replace("--classes 207,360,387 ", "")


def test_from_names_on_the_hub_to_a_picture(here: Path, published: Hub) -> None:
    done = smalti(LINE)
    assert done.exit_code == 0, done.output
    assert done.stdout == "cats.png\n"
    assert "weights: rar_b.bin of yucornetto/RAR at 8562ced2ff88" in done.stderr
    assert "put rar_b.bin into the store as import-weights/" in done.stderr
    assert "--rows-per-pass 3: " in done.stderr
    places = [PUBLISHED[name] for name in ("rar_b.bin", TOKENIZER)]
    assert published.asked == [(place.repository, place.file, place.revision) for place in places]
    picture = Image.open(here / "cats.png")
    assert json.loads(picture.text["sampled"])["classes"] == [207, 360, 387]  # type: ignore[attr-defined]
    again = answer(LINE)
    assert again["reused"]
    samples = open_tokens(again["samples"]["path"])
    assert [samples.attributes.class_names[label] for label in samples.labels] == [
        "golden retriever",
        "otter",
        "lesser panda",
    ]
    assert samples.attributes.extra["sampled"]["sampling"]["guidance"]["scale"] == [4.0]
    assert Path("cats.png").read_bytes() == (Path(again["images"]["path"]) / "grid.png").read_bytes()


@pytest.mark.parametrize("layout", ["ibq", "open-magvit2"])
def test_a_file_that_holds_its_tokenizer_needs_no_other(here: Path, layout: str) -> None:
    """Two images of 16x16 codes, out of one file, with and without a picture, and by `generate`."""
    file = write_generator(here / "ar_b.ckpt", layout)
    line = f"sample --weights {file} --classes 207,360 --images 2 --rows-per-pass 2"
    shown = answer(f"{line} --out dogs.png")
    assert Image.open(here / "dogs.png").height > 256
    samples = open_tokens(shown["samples"]["path"])
    assert (samples.grid, samples.attributes.resolution) == ((16, 16), 256)
    assert samples.attributes.factors == (None if layout == "ibq" else (2, 32))
    assert [samples.attributes.class_names[label] for label in samples.labels] == ["golden retriever", "otter"]
    alone = answer(line)
    assert (alone["key"], alone["reused"]) == (shown["samples"]["key"], True)
    assert len(list((here / "store" / "import-weights").glob("*/manifest.json"))) == 2
    made = answer(line.replace("sample", "generate", 1) + " --rows-per-decoding 2")
    assert (MappedArray(Path(made["path"]) / "tokens").read()[:, 0] == samples.tokens.read()[:, 0]).all()
    other = smalti(f"{line} --tokenizer {write_tokenizer(here / 'other.ckpt', layout)}")
    assert (other.exit_code, "was made with another tokenizer" in other.stderr) == (4, True)


def test_files_and_names_of_the_hub_give_the_same_artifacts(here: Path, files: Path, published: Hub) -> None:
    first = answer(LINE)
    second = answer(LINE.replace("rar_b.bin", str(files / "rar_b.bin")).replace("cats", "again"))
    assert second["reused"]
    assert first["samples"]["key"] == second["samples"]["key"]
    assert Path("again.png").read_bytes() == Path("cats.png").read_bytes()
    assert len(published.asked) == 2


def test_a_revision_can_be_pinned(here: Path, published: Hub) -> None:
    answer(LINE.replace("rar_b.bin", "yucornetto/RAR/rar_b.bin@0123abc"))
    assert published.asked[0] == ("yucornetto/RAR", "rar_b.bin", "0123abc")


def test_out_changes_nothing_but_the_picture(here: Path, published: Hub) -> None:
    """The samples are those of the same command without --out: 64 of them, without guidance, if nobody says otherwise."""
    line = f"sample --weights rar_b.bin --tokenizer {TOKENIZER} --classes 207,360"
    shown, alone = answer(f"{line} --out cats.png"), answer(line)
    assert (alone["key"], alone["reused"]) == (shown["samples"]["key"], True)
    sampled = open_tokens(alone["path"]).attributes.extra["sampled"]
    assert (sampled["images"], sampled["rows_per_pass"], sampled["sampling"]["guidance"]["scale"]) == (64, 64, [1.0])


def test_classes_by_their_names(here: Path, published: Hub) -> None:
    numbers = answer(LINE)
    named = answer(UNNAMED, "--classes", "golden retriever, 360, lesser panda")
    assert (named["samples"]["key"], named["reused"]) == (numbers["samples"]["key"], True)
    wrong = smalti(UNNAMED, "--classes", "golden retreiver")
    assert wrong.exit_code == 2
    assert "did you mean 'golden retriever'?" in wrong.stderr


def test_generate_takes_weights_names_and_auto_as_sample_does(here: Path, published: Hub) -> None:
    line = UNNAMED.replace("sample", "generate", 1).replace("--out cats.png", "")
    done = smalti(line, "--classes", "golden retriever,otter,lesser panda")
    assert done.exit_code == 0, done.output
    assert "--rows-per-pass 3: a pass of these takes" in done.stderr
    made, picture = done.stdout.splitlines()
    assert picture == f"grid: {made}/grid.png"
    assert answer(LINE)["out"] == "cats.png"
    codes = open_tokens(answer(LINE)["samples"]["path"]).tokens.read()[:, 0]
    assert (MappedArray(Path(made) / "tokens").read()[:, 0] == codes).all()


def test_decode_alone_says_where_its_grid_is(here: Path, published: Hub) -> None:
    samples = answer(LINE)["samples"]["path"]
    line = f"decode --tokens {samples} --tokenizer {TOKENIZER} --rows-per-pass 3"
    assert (here / "cats.png").read_bytes() == Path(answer(line)["pictures"]["grid"]).read_bytes()
    made, picture = smalti(line).stdout.splitlines()
    assert picture == f"grid: {made}/grid.png"


def test_a_dry_run_downloads_and_writes_nothing(here: Path, published: Hub) -> None:
    done = smalti(LINE, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "rar_b.bin of yucornetto/RAR at 8562ced2ff88 would be downloaded and put into the store" in done.stdout
    assert "classes: [otter]" in smalti(UNNAMED, "--classes", "otter", "--dry-run").stdout
    assert "rows_per_pass: auto" in done.stdout
    assert published.asked == []
    assert list(here.iterdir()) == []


def test_no_network(here: Path, hub: Hub) -> None:
    done = smalti(LINE)
    assert done.exit_code == 74
    assert "fetch https://huggingface.co/yucornetto/RAR/resolve/" in done.stderr
    assert "give the file: --generator FILE" in done.stderr
    assert Store(here / "store").artifacts() == []


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (LINE.replace(f"--tokenizer {TOKENIZER}", ""), 2, "give --tokenizer"),
        (DRAWN.replace(f"--tokenizer {TOKENIZER}", "").join(["generate ", ""]), 2, "generate lacks --tokenizer"),
        (
            "sample --weights absent.ckpt --out cats.png",
            3,
            "there is no weight file absent.ckpt; give published weights",
        ),
        (LINE.replace("cats.png", "cats.jpg"), 2, "ends in .png"),
        (LINE.replace("cats.png", "absent/cats.png"), 73, "there is no folder"),
        (LINE + " --generator digits/rar/generator", 2, "give one of them"),
        (LINE.replace("207", "ottter"), 2, "did you mean 'otter'?"),
        (LINE.replace("207", "1000"), 2, "class 1000 was asked for"),
    ],
)
def test_nonsense_is_refused(line: str, code: int, said: str, here: Path, published: Hub) -> None:
    done = smalti(line)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert not list(here.glob("*.png"))
