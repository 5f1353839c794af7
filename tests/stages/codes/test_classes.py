"""Classes by their names become the numbers that token sets know."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from stages.codes.classes import numbers_of

NAMES = ("otter", "crane", "Lesser Panda", "crane", "7")


def test_names_and_numbers_may_be_mixed() -> None:
    assert numbers_of([1, "otter", "Lesser Panda"], NAMES, where="--classes") == [1, 0, 2]
    assert numbers_of([7, "7"], NAMES, where="--classes") == [7, 4]


@pytest.mark.parametrize(
    ("name", "names", "said"),
    [
        ("crane", NAMES, "--classes: 'crane' is the name of the classes 1 and 3; give the number"),
        ("lesser panda", NAMES, "did you mean 'Lesser Panda'?"),
        ("zebra", NAMES, "known are otter, crane"),
        ("otter", (), "the classes have no names here"),
    ],
)
def test_what_names_no_class_is_refused(name: str, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        numbers_of([name], names, where="--classes")
    assert said in str(refused.value)
