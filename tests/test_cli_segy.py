"""`invgen invert` from a SEG-Y file: data, wavelet, prior and wells from a YAML; NetCDF, SEG-Y and a report out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from invgen.cli import main
from invgen.data.segy import read_segy, write_segy
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, Smooth, WellLog
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.priors.diffusion import DepthChannel, DiffusionPrior
from invgen.priors.networks import UNet
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian
from invgen.transforms import Affine

pytest.importorskip("segyio")

GRID = Grid((40, 12), (0.004, 12.5), (0.1, 500.0), ("t", "x"), ("s", "m"), ("amplitude",))
WAVELET = np.array([-0.1, -0.2, 0.7, 1.0, 0.5, -0.3, -0.1])
WINDOW = {"t": [0.12, 0.22], "x": [25.0, 112.5]}  # samples 5 to 30, traces 2 to 9
ROWS, TRACES = slice(5, 31), slice(2, 10)
CHANNEL = {"log_impedance": "ln(m/s g/cc)"}
CUT = Grid((26, 8), (0.004, 12.5), (0.12, 25.0), ("t", "x"), ("s", "m"), ("log_impedance",), ("ln(m/s g/cc)",))
PRIOR = {"sd": 0.2, "length": [0.02, 60.0], "padding": "auto"}


def background() -> np.ndarray:
    """(40, 12), a trend with time that varies along x."""
    t, x = np.linspace(0, 1, 40)[:, None], np.linspace(0, 1, 12)
    return 8.5 + 0.4 * t + 0.1 * np.sin(3 * x) * t


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A line whose trace 4 is dead, its wavelet, background and a log, and a configuration."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    d = rng.standard_normal(GRID.shape).astype(np.float32) * 0.1
    d[:, 4] = 0
    write_segy("line.sgy", d, grid=GRID)
    np.save("w.npy", WAVELET)
    write_segy("background.sgy", background(), grid=GRID)
    np.save("background.npy", background())
    t = np.arange(0.09, 0.3, 0.001)
    np.save("log.npy", np.stack([t, np.exp(8.9 + 0.2 * np.sin(90 * t))], 1))
    return tmp_path


def configuration(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "data": "line.sgy",
        "window": WINDOW,
        "operator": {"class_path": "PostStack", "init_args": {"wavelet": "w.npy", "dt": 0.004}},
        "noise": 0.05,
        "terms": [
            {
                "name": "background",
                "model": "background.sgy",
                "operator": {"class_path": "Smooth", "init_args": {"lengths": [5, 3]}},
                "noise": 0.1,
            }
        ],
        "prior": {"class_path": "GaussianPrior.stationary", "init_args": {**PRIOR, "mean": "background.sgy"}},
        "channels": CHANNEL,
        "solver": "ExactGaussian",
        "num_samples": 3,
        "dtype": "float64",
        "seed": 5,
        "out": "p.nc",
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def written(**changes: Any) -> str:
    Path("c.yaml").write_text(yaml.safe_dump(configuration(**changes)))
    return "c.yaml"


def run(capsys: pytest.CaptureFixture[str], *flags: str, **changes: Any) -> str:
    main(["invert", "--config", written(**changes), "--no-progress", *flags])
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def by_hand(*wells: Term) -> InverseProblem:
    """The problem of the configuration, made with the library."""
    section = read_quietly("line.sgy")
    mean = torch.from_numpy(background()[ROWS, TRACES]).float().double()[None]
    smooth = Smooth(CUT.field_shape, (5, 3), model_grid=CUT)
    prior = GaussianPrior.stationary(CUT, sd=0.2, length=(0.02, 60.0), padding="auto", mean=mean)
    seismic = PostStack(torch.from_numpy(WAVELET), CUT.field_shape, model_grid=CUT)
    data, mask = section.data[:, ROWS, TRACES], section.mask[:, ROWS, TRACES]
    terms = [
        Term(data, seismic, GaussianNoise(0.05), mask),
        Term(smooth(mean[None]), smooth, GaussianNoise(0.1), name="background"),
        *wells,
    ]
    return InverseProblem(terms=terms, prior=prior)


def read_quietly(path: str) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return read_segy(path)


def test_from_segy_to_netcdf_segy_and_report(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    told = run(capsys, segy="out", report="r.html")
    assert "line.sgy: 26 × 8 samples, t 0.12 to 0.22 s, x 25 to 112.5 m." in told
    assert "line.sgy: 1 of 8 traces are dead and masked." in told
    posterior = Posterior.load("p.nc")
    assert posterior.grid is not None
    np.testing.assert_allclose(posterior.grid.origin, CUT.origin)
    assert replace(posterior.grid, origin=CUT.origin) == CUT
    want = ExactGaussian().solve(by_hand(), 3, seed=5, dtype=torch.float64)
    torch.testing.assert_close(posterior.samples, want.samples.to(posterior.samples), rtol=0, atol=1e-6)

    assert sorted(p.name for p in Path("out").iterdir()) == ["mean.sgy", "sample_000.sgy", "sample_001.sgy", "sample_002.sgy", "sd.sgy"]  # fmt: skip
    mean = read_segy("out/mean.sgy")
    torch.testing.assert_close(mean.data, posterior.mean()[0].float(), rtol=0, atol=1e-6)
    assert mean.grid.origin[0] == pytest.approx(0.12)
    section = read_quietly("line.sgy")
    np.testing.assert_allclose(mean.coordinates, section.coordinates[TRACES])
    np.testing.assert_array_equal(mean.numbers[0], section.numbers[0][TRACES])
    page = Path("r.html").read_text(encoding="utf-8")
    assert "Data fit" in page
    assert "background" in page


def test_a_well_as_data(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    well = {"file": "log.npy", "position": 62.5, "first": 0.13, "last": 0.2, "logarithm": True}
    terms = [*configuration()["terms"], {"name": "A-1", "well": well, "noise": 0.01}]
    told = run(capsys, terms=terms)
    assert "A-1: 18 samples, t from 0.132 to 0.2 s." in told
    posterior = Posterior.load("p.nc")
    t = np.load("log.npy")[:, 0]
    ln = np.log(np.load("log.npy")[:, 1])
    times = CUT.coordinates(0)[3:21]
    # cells of 4 ms over samples of 1 ms: three whole ones and half of two more
    log = np.array([np.average(ln[np.abs(t - c) < 2.5e-3], weights=[0.5, 1, 1, 1, 0.5]) for c in times])
    physics = WellLog.vertical(CUT, [62.5], times[0], times[-1])
    want = ExactGaussian().solve(
        by_hand(Term(torch.from_numpy(log)[None], physics, GaussianNoise(0.01))), 3, seed=5, dtype=torch.float64
    )
    torch.testing.assert_close(posterior.samples, want.samples.to(posterior.samples), rtol=0, atol=1e-6)
    # a log of one value a sample says the same, and a mask holds the other half back
    np.save("values.npy", log)
    np.save("half.npy", np.arange(18) % 2 == 0)
    well = {"file": "values.npy", "position": [62.5], "first": 0.13, "last": 0.2}
    run(capsys, terms=[*terms[:1], {"well": well, "noise": 0.01}], out="q.nc")
    torch.testing.assert_close(Posterior.load("q.nc").samples, posterior.samples, rtol=0, atol=1e-9)
    run(capsys, terms=[*terms[:1], {"well": well, "noise": 0.01, "mask": "half.npy"}], out="h.nc")
    sd = Posterior.load("h.nc").samples[0, 0, :, 0, 3:21, 3].std(0)
    assert sd[::2].max() < sd[1::2].max()


def test_a_log_without_ends_is_used_where_it_meets_the_section(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    np.savetxt("log.txt", np.stack([np.arange(0.15, 0.4, 0.001), np.full(250, 8.9)], 1), header="time ln(AI)")
    told = run(capsys, terms=[{"well": {"file": "log.txt", "position": 62.5}, "noise": 0.01}])
    assert "well: 17 samples, t from 0.156 to 0.22 s." in told or "well: 18 samples, t from 0.152 to 0.22 s." in told


def test_a_deviated_well(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    path = np.stack([np.linspace(0.13, 0.2, 9), np.linspace(30.0, 90.0, 9)], 1)
    np.save("path.npy", path)
    np.save("values.npy", np.full(9, 8.9))
    well = {"file": "values.npy", "path": "path.npy"}
    run(capsys, terms=[{"well": well, "noise": 1e-3}])
    x = Posterior.load("p.nc").samples[0, 0].double()
    assert float((WellLog(CUT, path)(x) - 8.9).abs().max()) < 5e-3


@pytest.mark.parametrize("suffix", ["npy", "h5"])
def test_arrays_with_axes_are_the_same_section(capsys: pytest.CaptureFixture[str], here: Path, suffix: str) -> None:
    run(capsys)
    want = Posterior.load("p.nc")
    x = read_quietly("line.sgy").data[0].numpy().T.copy()
    if suffix == "npy":
        np.save("line.npy", x)
    else:
        import h5py

        with h5py.File("line.h5", "w") as f:
            f["amplitude"] = x
    axes = {"axes": "xt", "spacing": {"t": 0.004, "x": 12.5}, "origin": {"t": 0.1}, "units": {"t": "s", "x": "m"}}
    mask = np.ones((1, 40, 12), bool)
    mask[:, :, 4] = False
    np.save("mask.npy", mask)  # of the whole section: cut with it
    run(capsys, data={"path": f"line.{suffix}", **axes}, mask="mask.npy", out="q.nc")
    got = Posterior.load("q.nc")
    assert got.grid is not None
    np.testing.assert_allclose(got.grid.origin, want.grid.origin)
    torch.testing.assert_close(got.samples, want.samples, rtol=0, atol=1e-6)


def test_masks_add_to_dead_traces_and_arrays_are_whole_or_cut(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    run(capsys)
    want = Posterior.load("p.nc")
    write_segy("ones.sgy", np.ones((40, 12)), grid=GRID)
    background_term = {**configuration()["terms"][0], "model": "cut.npy"}
    np.save("cut.npy", background()[ROWS, TRACES].astype(np.float32))
    run(capsys, mask="ones.sgy", terms=[background_term], out="q.nc")
    torch.testing.assert_close(Posterior.load("q.nc").samples, want.samples, rtol=0, atol=1e-6)


def test_flags_win_over_the_file(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    write_segy("other.sgy", np.ones(GRID.shape), grid=GRID)
    flags = ("--data", "other.sgy", "--window", "{t: [0.14, 0.2]}", "--segy", "elsewhere", "--num_samples", "1")
    told = run(capsys, *flags, segy="out")
    assert "other.sgy: 16 × 12 samples" in told
    assert Path("elsewhere/mean.sgy").is_file()
    assert not Path("out").exists()


def test_a_learned_prior_is_moved_shifted_and_told_depths(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    torch.manual_seed(0)
    metres = Grid((16, 16), (4.0, 4.0), axes=("z", "x"), units=("m", "m"), channels=("ln_ai",))
    network = UNet(1, extra=2, widths=(8, 8), blocks=1)
    for p in network.parameters():  # a new network ignores its input
        torch.nn.init.normal_(p, 0, 0.1)
    prior = DiffusionPrior(network, (1, 16, 16), grid=metres, depth=DepthChannel(), transform=Affine(8.0, 0.5))
    prior.save("tiny.safetensors")
    solver = {"class_path": "PnPDM", "init_args": {"iterations": 3, "inner": 1}}
    given = {"name": "tiny.safetensors", "shift": 0.25, "velocity": 2000}
    told = run(capsys, prior=given, solver=solver, channels=None, dtype="float32", segy="out")
    assert "learned at 4 m × 4 m, is read sample for sample at 0.004 s × 12.5 m" in told
    grid = Grid(CUT.shape, CUT.spacing, CUT.origin, CUT.axes, CUT.units, ("ln_ai",))
    moved = DiffusionPrior.load("tiny.safetensors").at(
        grid.shape, grid=grid, depth=torch.from_numpy(grid.coordinates(0) * 1000.0)
    )
    moved.transform = Affine(8.25, 0.5)
    from invgen.solvers import PnPDM

    hand = by_hand()
    terms = [
        Term(t.data, type(t.operator)(*a, grid.field_shape, *b, model_grid=grid), t.noise, t.mask)
        for t, a, b in zip(hand.terms, [[torch.from_numpy(WAVELET)], []], [[], [(5, 3)]], strict=True)
    ]
    want = PnPDM(iterations=3, inner=1).solve(InverseProblem(terms=terms, prior=moved), 3, seed=5)
    got = Posterior.load("p.nc")
    assert got.grid is not None
    assert replace(got.grid, origin=grid.origin) == grid
    torch.testing.assert_close(got.samples, want.samples, rtol=0, atol=1e-3)
    assert "velocity: (m/s) would tell it" in run(
        capsys, prior="tiny.safetensors", solver=solver, channels=None, dtype="float32"
    )


WELL = {"file": "log.npy", "position": 62.5, "logarithm": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "half.sgy"}, "it is truncated"),
        ({"data": "gone.sgy"}, "no file gone.sgy"),
        ({"data": "notes.sgy"}, "truncated or no SEG-Y file"),
        (
            {"operator": {"class_path": "PostStack", "init_args": {"wavelet": "w.npy", "dt": 0.002}}},
            "sampled at 0.002 s but the grid at 0.004 s",
        ),
        ({"operator": {"class_path": "PostStack", "init_args": {"wavelet": "long.npy"}}}, "longer than the trace"),
        (
            {"operator": {"class_path": "PostStack", "init_args": {"wavelet": "w.npy", "shape": [1, 26, 9]}}},
            "(1, 26, 9)",
        ),
        ({"terms": [{"well": {**WELL, "position": 300.0}, "noise": 0.01}]}, "outside the section"),
        ({"terms": [{"well": {**WELL, "first": 0.1, "last": 0.2}, "noise": 0.01}]}, "cut the log to the section"),
        ({"terms": [{"well": {**WELL, "file": "deep.npy"}, "noise": 0.01}]}, "runs from 1.09 to 1.299"),
        ({"terms": [{"well": {**WELL, "file": "short.npy"}, "noise": 0.01}]}, "has no coordinates"),
        (
            {"terms": [{"well": {"file": "short.npy", "position": 62.5, "first": 0.13, "last": 0.2}, "noise": 0.01}]},
            "holds 7 values of 1 channel(s) but its well 18 samples",
        ),
        ({"terms": [{"well": {**WELL, "depth": 3}, "noise": 0.01}]}, "A well is a mapping with file"),
        ({"terms": [{"well": {"file": "log.npy"}, "noise": 0.01}]}, "needs its position"),
        ({"terms": [{"well": {**WELL, "position": [1, 2]}, "noise": 0.01}]}, "one number for each of the axes x"),
        ({"terms": [{"well": WELL}]}, "needs noise"),
        ({"terms": [{"well": WELL, "noise": 0.1, "operator": "Identity"}]}, "takes no operator"),
        ({"terms": [{"data": "coarse.sgy", "operator": "Identity", "noise": 0.1}]}, "sampled every 0.008 s"),
        ({"terms": [{"data": "later.sgy", "operator": "Identity", "noise": 0.1}]}, "starts at"),
        ({"terms": [{"data": "shifted.sgy", "operator": "Identity", "noise": 0.1}]}, "apart; cut them to one window"),
        ({"terms": [{"data": "w.npy", "operator": "Identity", "noise": 0.1}]}, "shape (7,)"),
        ({"window": {"t": [0.0, 0.2]}}, "reaches out of the section"),
        ({"window": {"z": [0.0, 0.2]}}, "the axis 'z'"),
        ({"window": {"t": 0.2}}, "mapping of axes to [first, last]"),
        ({"window": {"t": ["a", 0.2]}}, "The window"),
        ({"data": "background.npy", "terms": []}, "A window needs data whose axes are known"),
        ({"data": "background.npy", "window": None, "segy": "out", "terms": []}, "there are none; leave it out"),
        ({"data": {"path": "background.npy", "axes": "tx", "spam": 1}}, "no option 'spam'"),
        ({"data": {"path": "line.sgy", "axes": "tx"}}, "knows its axes"),
        ({"data": {"path": "line.sgy", "dt": "fast"}}, "cannot be used"),
        ({"data": 7}, "data cannot be '7'"),
        ({"data": {"file": "line.sgy"}}, "the name of a file"),
        ({"mask": "background.sgy"}, "other values than 0 and 1"),
        ({"channels": {"vp": "m/s", "vs": "m/s"}}, "2"),
        ({"channels": 3}, "mapping of names to units"),
        ({"prior": {"name": "geology", "spam": 1}}, "no option 'spam'"),
        ({"prior": {"name": "geology", "shift": "up"}}, "shift of the prior is a number"),
        ({"prior": {"class_path": "GaussianPrior.sample"}}, "no constructor 'sample'"),
        ({"prior": {"name": "GaussianPrior", "shift": 1.0}}, "belong to a learned prior"),
        ({"prior": {"class_path": "GaussianPrior.stationary", "init_args": {**PRIOR, "mean": "line.sgy"}}}, "no gaps"),
        ({"prior": {"name": "geology", "velocity": 2000}, "prior_shape": [9, 9]}, "velocity needs a section"),
        ({"prior_shape": [9, 9]}, "channels name the model on a section"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    capsys: pytest.CaptureFixture[str], here: Path, changes: dict[str, Any], says: str
) -> None:
    raw = Path("line.sgy").read_bytes()
    Path("half.sgy").write_bytes(raw[: len(raw) // 2])
    Path("notes.sgy").write_text("notes")
    np.save("long.npy", np.ones(60))
    np.save("short.npy", np.full(7, 8.9))
    log = np.load("log.npy")
    np.save("deep.npy", log + np.array([1.0, 0.0]))
    for name, dt, t0, x0 in (
        ("coarse", 0.008, 0.1, 500.0),
        ("later", 0.004, 0.2, 500.0),
        ("shifted", 0.004, 0.1, 900.0),
    ):
        grid = Grid(GRID.shape, (dt, 12.5), (t0, x0), GRID.axes, GRID.units, GRID.channels)
        write_segy(f"{name}.sgy", np.ones(GRID.shape), grid=grid)
    with pytest.raises(SystemExit) as stop:
        main(["invert", "--config", written(**changes), "--no-progress"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("invgen: ")
    assert err.count("\n") == 1
    assert says in err
