"""A thousand mutated files of every format: each loads or is refused by an error of ours, and the model stays whole."""

from __future__ import annotations

import pytest

from fuzz_formats import fuzz, make_samples
from lora_inject.formats import FORMATS


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("name", [known.name for known in FORMATS])
@pytest.mark.filterwarnings("ignore::lora_inject.RoundingWarning")
def test_mutated_files_load_or_are_refused(name, samples):
    counts, broken = fuzz(name, samples[name], iter(range(1000)))
    assert not broken
    assert counts["refused"] > 300 and counts["loaded"] > 5, "the mutations are too weak, or the sample is broken"
