"""A model to adapt and short tasks, for the tests of regularizers."""

from __future__ import annotations

import pytest

import lora_lens as ll

SOME = "blocks.[05].*"


@pytest.fixture(scope="module")
def tasks(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(200, 40), source.first(200, 120)


@pytest.fixture
def adapt(model, spectra):
    def adapt(method, **choices):
        own = None if isinstance(method, ll.FullFineTuning) else spectra
        return ll.attach(model, method, targets=None if own is None else SOME, spectra=own, **choices)

    return adapt
