"""Every result draws itself, says what its axes are, and waits for matplotlib until asked."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import invgen.diagnostics as room

RNG = np.random.default_rng(0)
TRUTH, DRAWS = RNG.normal(size=(80, 3)), RNG.normal(size=(80, 19, 3))
X, Y = RNG.normal(size=(60, 2)), 1.5 * RNG.normal(size=(70, 2))
RESULTS = {
    "sbc": lambda: room.sbc(TRUTH, DRAWS),
    "sbc failing": lambda: room.sbc(TRUTH, 0.3 * DRAWS),
    "sbc of many": lambda: room.sbc(np.tile(TRUTH, 100), 0.4 * np.tile(DRAWS, 100)),
    "coverage": lambda: room.expected_coverage(TRUTH, DRAWS),
    "tarp": lambda: room.tarp(TRUTH, DRAWS),
    "pit": lambda: room.pit_test(room.pit(TRUTH, DRAWS)),
    "crps": lambda: room.crps(TRUTH, DRAWS),
    "energy": lambda: room.energy_score(TRUTH, DRAWS),
    "sliced": lambda: room.sliced_wasserstein(X, Y, 10),
    "max-sliced": lambda: room.max_sliced_wasserstein(X, Y, 10, x_weights=np.arange(60)),
    "mmd": lambda: room.mmd(X, Y, permutations=20),
    "mmd alone": lambda: room.mmd(X, Y, permutations=0),
    "c2st": lambda: room.c2st(X, Y, epochs=2),
    "residual": lambda: room.residual_chi2(RNG.normal(size=(3, 20, 5))),
    "chains": lambda: room.check_chains(RNG.normal(size=(4, 30, 5))),
}


@pytest.fixture(autouse=True)
def _no_window():
    import matplotlib

    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.mark.parametrize("name", RESULTS)
def test_results_draw_themselves(name):
    from matplotlib.figure import Figure

    result = RESULTS[name]()
    given = Figure().subplots()
    assert result.plot(given) is given
    fresh = result.plot()
    for ax in (given, fresh):
        assert all([ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_legend().get_texts()])
        ax.figure.canvas.draw()


@pytest.mark.parametrize("kind", ["difference", "coverage", "histogram"])
@pytest.mark.parametrize("name", ["sbc", "sbc failing", "coverage", "tarp"])
def test_kinds_of_rank_figures(name, kind):
    ax = RESULTS[name]().plot(kind=kind)
    assert ax.get_xlim() == (0, 1)
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="'coverage'"):
        RESULTS[name]().plot(kind="pie")


def test_a_family_has_one_panel_a_test():
    ll = TRUTH.sum(1), DRAWS.sum(2)
    both = room.check_calibration(TRUTH, DRAWS, log_likelihood=ll, data=TRUTH)
    assert len(both.plot()) == 2
    assert "family-wise level" in str(both)
    with pytest.raises(ValueError, match="as many axes"):
        both.plot([])


def test_the_room_is_complete_and_light():
    for name in room.__all__:
        assert getattr(room, name) is not None
        assert not isinstance(getattr(room, name), type(room)), f"{name} is a module and hides what it exports"
    code = "import sys, invgen.diagnostics as d; [getattr(d, n) for n in d.__all__]; print([m for m in ('matplotlib', 'sklearn', 'arviz', 'ot') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_room_imports_no_other_room():
    import ast
    from pathlib import Path

    for path in Path(room.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not [m for m in modules if m.startswith(("invgen.operators", "invgen.priors", "invgen.solvers"))], (
                path
            )
