from __future__ import annotations

import pytest

from lora_lens._base import errors


@pytest.mark.parametrize(
    ("kind", "built_in"),
    [
        (errors.InputError, ValueError),
        (errors.InputTypeError, TypeError),
        (errors.MissingFileError, FileNotFoundError),
        (errors.MissingPackageError, ImportError),
    ],
)
def test_each_is_one_of_ours_and_the_built_in_one_that_fits(kind, built_in):
    assert issubclass(kind, errors.LoraLensError) and issubclass(kind, built_in)
    assert str(kind("what, and what to do")) == "what, and what to do"


def test_a_bug_is_none_of_them():
    assert not issubclass(ValueError, errors.LoraLensError) and not issubclass(KeyError, errors.LoraLensError)
