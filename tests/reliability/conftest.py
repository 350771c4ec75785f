"""Children, stages and the seed for tests of kills, faults and power cuts."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from children import Children
from inputs import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, bpe_tokenizer_folder) -> Inputs:
    torch.set_num_threads(1)
    return Inputs(tmp_path_factory.mktemp("inputs"), bpe_tokenizer_folder)


@pytest.fixture(scope="session")
def children(tmp_path_factory) -> Iterator[Children]:
    children = Children(tmp_path_factory.mktemp("children"))
    yield children
    children.close()


@pytest.fixture
def draw() -> random.Random:
    """Drawn anew in each run; what a test prints shows when it fails, and with -rP."""
    seed = int(os.environ.get("PHOENIX_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"PHOENIX_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"
