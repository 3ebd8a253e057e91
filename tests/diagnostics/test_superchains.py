"""Superchains that forgot their starts pass; those that did not are named."""

import numpy as np
import pytest

from invgen.diagnostics.superchains import check_superchains


def test_equal_and_displaced_superchains(tmp_path):
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((8, 16, 50, 3))
    good = check_superchains(draws, tolerance=0.02)
    assert good.passed
    assert good.nested_rhat.shape == (3,)
    assert good.limit == pytest.approx(np.sqrt(1 + 1 / 16 + 0.02))
    draws[:, :, :, 1] += 0.8 * rng.standard_normal((8, 1, 1))  # one coordinate remembers
    bad = check_superchains(draws)
    assert not bad.passed
    assert bad.nested_rhat.argmax() == 1
    bad.plot().figure.savefig(tmp_path / "a.png")


def test_errors():
    with pytest.raises(ValueError, match="tolerance"):
        check_superchains(np.zeros((2, 2, 2)), tolerance=0)
    with pytest.raises(ValueError, match="superchain"):
        check_superchains(np.zeros((1, 2, 2)))
