"""The course scripts: every one runs in seconds with `fast`, writes its figure, fits its data and says its numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch

COURSE = Path(__file__).resolve().parents[1] / "examples" / "course"
SHARED = ("lesson", "moons", "sections")
SCRIPTS = sorted(p.stem for p in COURSE.glob("*.py") if p.stem not in SHARED)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the folder, which imports its neighbours by name."""
    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(str(COURSE))
    for shared in SHARED:
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(f"course_{name}", COURSE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_and_its_table_agree() -> None:
    table = (COURSE / "README.md").read_text()
    assert all(f"`{name}.py`" in table for name in (*SCRIPTS, *SHARED))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_fits_its_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(name, monkeypatch)
    figure = tmp_path / f"{name}.png"
    found = script.main(fast=True, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert all(math.isfinite(v) for v in found.values())
    # sections: data of the posterior are nearer than those of the prior, though forty steps train no prior worth the name
    fits = [v for k, v in found.items() if k in ("map_misfit", "guided_misfit")]
    if "prior_misfit" in found:
        assert max(fits) < found["prior_misfit"]
    elif fits:
        assert max(fits) < 3.0  # noise 0.2 on facies: a section of one grey has 2.5
    elif "map_rms_misfit" in found:
        assert found["map_rms_misfit"] < 1.0  # one datum, two latents: it can be met
    else:
        w1 = [v for k, v in found.items() if k.endswith("w1")]
        assert w1
        assert max(w1) < 0.75  # the four modes are 1 apart; a Gaussian blob is at about 0.4


def test_grid_posterior_of_the_moons_is_that_of_weighted_exact_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    moons = load("moons", monkeypatch)
    x = torch.from_numpy(moons.LAW.sample(200_000, seed=1))
    weights = torch.softmax(-0.5 * ((x[:, 1].double() - moons.DATUM) / moons.SIGMA) ** 2, 0)
    found = moons.compare(x, weights)
    ess = float(1 / weights.square().sum())
    assert ess > 20_000
    # the mass of a mode is a share p near 1/4 of `ess` draws; four of them, two-sided 1e-3
    assert found["worst_mode"] < 3.7 * math.sqrt(0.25 * 0.75 / ess)
    # E|F_n − F| is at most √(F (1 − F)/n); the integral of √(F (1 − F)) over three units is below 1.5
    assert found["w1"] < 3 * 1.5 / math.sqrt(ess)


def test_a_mode_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    moons = load("moons", monkeypatch)
    axis, density = moons.exact()
    density = np.where(axis < moons.VALLEYS[0], 0.0, density)
    x1 = np.random.default_rng(0).choice(axis, 20_000, p=density / density.sum())
    found = moons.compare(torch.from_numpy(np.stack([x1, x1], 1)))
    assert found["worst_mode"] == pytest.approx(0.25, abs=0.02)
    # a quarter moves one mode up on average twice over: ¼·(1 + ⅔ + ⅓) of a spacing of about 1
    assert found["w1"] == pytest.approx(0.5, abs=0.05)


def test_rays_average_and_their_adjoint_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = load("sections", monkeypatch)
    rays = sections.rays()
    assert rays.data_shape == (144,)
    torch.testing.assert_close(rays(torch.ones(1, *sections.SHAPE)), torch.ones(1, 144), atol=1e-5, rtol=0)
    layered = torch.arange(32.0).reshape(1, 1, 32, 1).expand(1, *sections.SHAPE).contiguous()
    level = rays(layered)[0].reshape(12, 12).diagonal()  # horizontal rays see one layer
    assert float((level - torch.linspace(0.5, 30.5, 12)).abs().max()) <= 0.5 + 1e-4


def test_short_noise_schedules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from invgen.priors import LinearBetas

    script = load("ddpm", monkeypatch)
    for steps in (100, 300):
        with pytest.raises(ValueError, match="not noise"):
            script.prior(parametrisation="epsilon", levels=LinearBetas(steps))
    assert float(LinearBetas(1000).alpha_bar[-1].sqrt()) < 0.01
