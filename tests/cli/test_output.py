"""Tables: ids, refs and paths stay whole, whatever the width of the terminal."""

from __future__ import annotations

import re
import sys

import pytest

from cli.output import fit, print_table

REF = "digits/rar/held-out-images"
ID = "train-tokenizer/0123456789ab"
FIGURE = "PSNR 24.3 dB on held-out, 251/256 codes used, perplexity 180"
COLUMNS = ["kind", "artifact", "refs", "figure"]
ROWS = [["tokenizer", ID, f"{REF} mine/images", FIGURE], ["image-set", "index/0123456789ab", REF, "360 images"]]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 300])
def test_ids_and_refs_are_whole_on_every_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("store", COLUMNS, ROWS)
    shown = re.sub("\x1b[^m]*m", "", capsys.readouterr().out)
    for whole in (REF, ID, "mine/images", "index/0123456789ab", "perplexity", "360"):
        assert whole in shown
    if "│" in shown:
        assert max(map(len, shown.splitlines())) <= width
    assert ("│" in shown) == (width >= 100)


def test_elsewhere_lines_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("store", COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines()[1] == "\t".join(ROWS[0])


def test_columns_give_way_between_words_alone() -> None:
    assert fit([["ab cd", "x"]], 6) == [5, 1]
    assert fit([["ab cd", "x"]], 4) == [3, 1]
    assert fit([["ab cd", "x"]], 2) is None
