"""A chain that is killed and continued is the chain that was not killed."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def chain_resume():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("chain_resume")
    finally:
        sys.path.remove(str(FOLDER))


def test_killed_and_resumed_to_the_bit(chain_resume, tmp_path):
    assert chain_resume.resumed_identical(tmp_path, kills=1, steps=400, seed=0) == 1
