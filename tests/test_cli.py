"""The command line: what works, and what a person gets wrong ends in one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from invgen.cli import COMMANDS, main
from invgen.grid import Grid
from invgen.posterior import Posterior
from invgen.priors.diffusion import DiffusionPrior
from invgen.priors.networks import UNet


@pytest.fixture(scope="module")
def prior_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny prior, not trained: good for everything but its samples."""
    torch.manual_seed(0)
    grid = Grid((16, 16), (4.0, 4.0), units=("m", "m"))
    prior = DiffusionPrior(UNet(1, widths=(8, 8), blocks=1), (1, 16, 16), grid=grid)
    return prior.save(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("d.npy", rng.standard_normal((1, 16, 16)).astype(np.float32))
    np.save("w.npy", np.array([-0.2, 1.0, -0.2]))
    np.save("x.npy", rng.standard_normal((6, 1, 8, 8)))
    np.save("xc.npy", rng.standard_normal((6, 1, 8, 8)) + 0j)
    np.save("x5.npy", rng.standard_normal((6, 1, 4, 4, 4)))
    return tmp_path


def ok(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main([str(w) for w in words])
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("invgen: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


INVERT = (
    "invert",
    "--data",
    "d.npy",
    "--operator",
    "PostStack",
    "--operator.wavelet",
    "w.npy",
    "--operator.shape",
    "[1,16,16]",
    "--noise",
    "0.1",
    "--no-progress",
)
SOLVE = ("--solver", "PnPDM", "--solver.iterations", "3", "--solver.inner=1", "--num_samples", "2")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(c in ok(capsys, "--help") for c in COMMANDS)
    assert ok(capsys, "--version").startswith("invgen ")
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code in (0, None)
        assert f"invgen {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["invert", "--solver", "PnPDM", "--help"])
    assert "rho_min" in capsys.readouterr().out


def test_invert_with_flags_then_report(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    out = ok(capsys, *INVERT, *SOLVE, "--prior", prior_file, "--out", "sub/p.nc", "--seed", "3", "--report", "r.html")
    assert "Wrote sub/p.nc" in out
    posterior = Posterior.load("sub/p.nc")
    assert posterior.samples.shape == (1, 1, 2, 1, 16, 16)
    assert posterior.settings["iterations"] == 3
    assert posterior.settings["inner"] == 1
    assert posterior.seed == 3
    assert "Data fit" in Path("r.html").read_text()
    assert "Wrote x.html" in ok(capsys, "report", "sub/p.nc", "--out", "x.html", "--title", "My section")
    assert "My section" in Path("x.html").read_text()


def test_invert_with_a_configuration_flags_win(
    capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path
) -> None:
    Path("c.yaml").write_text(
        f"""
data: d.npy
operator: {{class_path: PostStack, init_args: {{wavelet: [-0.2, 1.0, -0.2], shape: [1, 16, 16]}}}}
noise: 0.1
terms:
  - {{data: d.npy, operator: {{class_path: invgen.operators.Smooth, init_args: {{shape: [1, 16, 16], lengths: [3, 3]}}}}, noise: 0.5, name: background}}
prior: {prior_file}
solver: {{class_path: PnPDM, init_args: {{iterations: 9, inner: 1}}}}
num_samples: 3
out: p.nc
"""
    )
    ok(capsys, "invert", "--config", "c.yaml", "--solver.iterations", "3", "--num_samples", "2", "--no-progress")
    posterior = Posterior.load("p.nc")
    assert (posterior.settings["iterations"], posterior.settings["inner"]) == (3, 1)
    assert posterior.samples.shape[2] == 2


def test_invert_moves_the_prior(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    np.save("wide.npy", np.zeros((1, 16, 24), np.float32))
    words = ["wide.npy" if w == "d.npy" else "[1,16,24]" if w == "[1,16,16]" else w for w in INVERT]
    ok(capsys, *words, *SOLVE, "--prior", prior_file, "--prior_shape", "[16,24]", "--out", "p.nc")
    assert Posterior.load("p.nc").shape == (1, 16, 24)


def test_sample(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    ok(
        capsys,
        "sample",
        "--prior",
        prior_file,
        "--n",
        "3",
        "--steps",
        "4",
        "--shape",
        "[8,24]",
        "--out",
        "f.npy",
        "--no-progress",
    )
    first = np.load("f.npy")
    assert first.shape == (3, 1, 8, 24)
    ok(
        capsys,
        "sample",
        "--prior",
        prior_file,
        "--n",
        "3",
        "--steps",
        "4",
        "--shape",
        "[8,24]",
        "--out",
        "g.npy",
        "--no-progress",
    )
    np.testing.assert_array_equal(first, np.load("g.npy"))


def test_evaluate(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    rng = np.random.default_rng(1)
    np.save("held.npy", rng.standard_normal((12, 1, 16, 16)).astype(np.float32))
    np.save("seen.npy", rng.standard_normal((9, 16, 16)).astype(np.float32))
    told = ok(capsys, "evaluate", prior_file, "--data", "held.npy", "--training", "seen.npy", "--out", "page.html")
    assert "sliced wasserstein" in told
    assert "nearest training example" in told
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert "DiffusionPrior" in page
    assert "--n lies between 2 and 6" in refused(capsys, "evaluate", prior_file, "--data", "held.npy", "--n", "7")
    assert "one size" in refused(capsys, "evaluate", prior_file, "--data", "x.npy")


def test_train_on_an_array_and_resume(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    np.save("x.npy", 5 + 2 * np.random.default_rng(1).standard_normal((24, 1, 8, 8)))
    Path("t.yaml").write_text(
        "data: x.npy\nnetwork: {class_path: UNet, init_args: {widths: [8, 8], blocks: 1}}\ntraining: {batch_size: 4, steps: 4, checkpoint: state.ckpt}\n"
    )
    out = ok(capsys, "train", "--config", "t.yaml", "--out", "p.safetensors", "--no-progress")
    assert "4 steps" in out
    prior = DiffusionPrior.load("p.safetensors")
    assert float(prior.transform.shift) == pytest.approx(5, abs=0.3)
    assert prior.seen["steps"] == 4
    assert "6 steps" in ok(
        capsys, "train", "--config", "t.yaml", "--training.steps", "6", "--out", "p.safetensors", "--no-progress"
    )
    for name in ("state.ckpt", "state.ckpt.previous"):
        Path(name).write_bytes(b"damaged")
    assert "not a complete safetensors" in refused(
        capsys, "train", "--config", "t.yaml", "--out", "p.safetensors", "--no-progress"
    )


def test_train_on_geology(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    Path("t.yaml").write_text(
        """
data:
  class_path: GeologyCrops
  init_args: {sections: 2, crop: [16, 16], generator: {class_path: GeologySections, init_args: {shape: [40, 40]}}}
network: {class_path: UNet, init_args: {widths: [8, 8], blocks: 1}}
training: {batch_size: 2, steps: 2}
"""
    )
    ok(capsys, "train", "--config", "t.yaml", "--out", "g.safetensors", "--no-progress")
    assert DiffusionPrior.load("g.safetensors").at((16, 24)).depth is not None


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "PnPDM" in ok(capsys, "solvers")
    assert "GaussianPrior" in ok(capsys, "priors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("conjure",), "no command 'conjure'"),
        ((*INVERT, "--solver", "PnPDN", "--prior", "P"), "did you mean PnPDM"),
        ((*INVERT, *SOLVE, "--solver.spam", "1", "--prior", "P"), "no argument 'spam'"),
        (
            (*INVERT, *SOLVE, "--solver.hold", "soon", "--prior", "P"),
            "solver.hold cannot be 'soon': a value of type int",
        ),
        ((*INVERT, *SOLVE, "--spam", "1", "--prior", "P"), "spam"),
        ((*INVERT, "--solver", "os.system", "--prior", "P"), "outside invgen"),
        ((*INVERT, "--solver", "subprocess.Popen", "--prior", "P"), "outside invgen"),
        (
            (
                *INVERT,
                "--solver",
                "PostStack",
                "--solver.wavelet",
                "w.npy",
                "--solver.shape",
                "[1,16,16]",
                "--prior",
                "P",
            ),
            "not a solver",
        ),
        ((*INVERT, *SOLVE, "--prior", "nothing.safetensors"), "no checkpoint at nothing.safetensors"),
        ((*INVERT, *SOLVE, "--prior", "atlantis"), "no pretrained prior 'atlantis'"),
        ((*INVERT, *SOLVE, "--prior", "P", "--prior_shape", "[16,20]"), "(1, 16, 20)"),
        ((*INVERT, *SOLVE, "--prior", "P", "--mask", "gone.npy"), "no file gone.npy"),
        ((*INVERT, *SOLVE, "--prior", "P", "--data", "d.txt"), "no file d.txt"),
        ((*INVERT, *SOLVE, "--prior", "P", "--num_samples", "0"), "at least 1"),
        ((*INVERT, *SOLVE, "--prior", "P", "--seed", "-1"), "seed"),
        ((*INVERT, *SOLVE, "--prior", "P", "--out", "d.npy/p.nc"), "Cannot write"),
        ((*INVERT, *SOLVE, "--prior", "P", "--out", "p.txt"), "written as .nc or .html"),
        ((*INVERT, *SOLVE, "--prior", "P", "--device", "abacus"), "abacus"),
        ((*INVERT, *SOLVE, "--prior", "P", "--noise", "-1"), "must be positive"),
        (("invert", "--data", "d.npy", *SOLVE, "--prior", "P"), "needs operator"),
        (("invert", "--config", "gone.yaml"), "no configuration file"),
        (("report", "gone.nc"), "no posterior at gone.nc"),
        (("report", "d.npy"), "not a posterior"),
        (("sample", "--prior", "P", "--n", "0"), "at least 1"),
        (("sample", "--n", "1"), "prior"),
        (("train",), "--data"),
        (("train", "--data", "d.npy", "--training.spam", "1"), "spam"),
        (("demo", "--out", "d.npy"), "Cannot write"),
        (("demo", "--num_samples", "1"), "at least 2"),
        ((*INVERT, *SOLVE, "--prior", "P", "--report", "r.pdf"), "written as .html"),
        ((*INVERT, *SOLVE, "--prior", "P", "--report", "d.npy/r.html"), "a folder in it is a file"),
        ((*INVERT, *SOLVE, "--prior", "P", "--checkpoint", "d.npy/c"), "a folder in it is a file"),
        ((*INVERT, *SOLVE, "--prior", "P", "--device", "meta"), "cannot be used here"),
        ((*INVERT, *SOLVE, "--prior", "P", "--seed", "soon"), "must be a whole number from 0, got 'soon'"),
        ((*INVERT, *SOLVE, "--prior", "P", "--mask", "d.npy"), "other values than 0 and 1"),
        ((*INVERT, *SOLVE, "--prior", "P", "--prior_shape", "16"), "prior_shape cannot be '16'"),
        ((*INVERT, *SOLVE, "--prior", "P", "--solver.iterations", "null"), "solver.iterations needs a value"),
        (("sample", "--prior", "P", "--out", "s.txt"), "written as .npy"),
        (("sample", "--prior", "MAP"), "MAP is not a prior"),
        (("report", "gone.nc", "--out", "r.pdf"), "written as .html"),
        (("train", "--data", "x.npy", "--out", "p.pdf"), "written as .safetensors"),
        (("train", "--data", "x.npy", "--training.learning_rate", "0"), "learning_rate must be positive"),
        (("train", "--data", "x.npy", "--validation", "0.99"), "leave 1 to learn from"),
        (("train", "--data", "xc.npy"), "complex numbers"),
        (("train", "--data", "x5.npy"), "(6, 1, 4, 4, 4)"),
        (
            ("train", "--data", "x.npy", "--training.learning_rate", "1e30", "--training.steps", "2"),
            "training loss is nan",
        ),
    ],
)
def test_bad_words(
    capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path, words: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, *(prior_file if w == "P" else w for w in words))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("solver: !!python/object/apply:os.system [true]", "without tags"),
        ("solver: [", "YAML"),
        ("- 1", "must hold a mapping"),
        ("spam: 1", "unknown key 'spam'"),
        ("solver: {class_path: PnPDM, init_args: {spam: 1}}", "no argument 'spam'"),
        ("solver: {class_path: PnPDM, iterations: 3}", "belong under init_args"),
        ("solver: {class_path: os.system}", "outside invgen"),
        ("solver: {class_path: invgen.os.system}", "no class"),
        (
            "operator: {class_path: PostStack, init_args: {wavelet: w.npy, shape: [1, 16, 16], model_grid: os.system}}",
            "is an object",
        ),
        (
            "operator: {class_path: PostStack, init_args: {wavelet: w.npy, shape: [1, 16, 16], model_grid: {class_path: os.system}}}",
            "outside invgen",
        ),
        ("operator: {class_path: PostStack, init_args: {wavelet: w.npy}}", "needs the argument shape"),
        ("operator: {class_path: PostStack, init_args: {wavelet: w.npy, shape: [1, 16, 20]}}", "(1, 16, 20)"),
        ("noise: {class_path: GaussianNoise, init_args: {sigma: gone.npy}}", "no file gone.npy"),
        ("prior: {class_path: torch.nn.Linear}", "outside invgen"),
        ("num_samples: many", "num_samples"),
        ("operator: []", "list of operators is empty"),
    ],
)
def test_bad_configurations(
    capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path, text: str, says: str
) -> None:
    Path("c.yaml").write_text(text)
    given = text.split(":")[0]
    words: list[object] = ["invert", "--config", "c.yaml", "--no-progress"]
    if given != "operator":
        words += ["--operator", "PostStack", "--operator.wavelet", "w.npy", "--operator.shape", "[1,16,16]"]
    words += ["--data", "d.npy"] + ([] if given == "noise" else ["--noise", "0.1"])
    words += [] if given == "solver" else list(SOLVE[:-2])
    words += [] if given == "prior" else ["--prior", prior_file]
    assert says in refused(capsys, *words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: {steps: !!python/object/apply:os.system [ls]}", "without tags"),
        ("training: 5", "training must be a mapping"),
        ("training: {spam: 1}", "spam"),
        ("prior: geology", "prior must be a mapping"),
        ("prior: {sigma_max: abc}", "settings of the prior are numbers"),
        ("grid: 5", "grid must be a mapping"),
        ("grid: {shape: [9, 9], spacing: [1, 1]}", "(1, 9, 9)"),
        ("data: 7", "name of a .npy file"),
        ("data: {class_path: GeologyCrops, init_args: {sections: 0}}", "sections >= 1"),
        ("network: {class_path: os.system}", "outside invgen"),
        ("network: MLPDenoiser", "cannot denoise examples of the shape (1, 8, 8)"),
        ("network: {class_path: UNet, init_args: {widths: []}}", "at least one width"),
        ("network: {class_path: UNet, init_args: {widths: [0]}}", "at least one width"),
    ],
)
def test_bad_training_configurations(capsys: pytest.CaptureFixture[str], here: Path, text: str, says: str) -> None:
    Path("t.yaml").write_text(text + "\n" + ("" if text.startswith("data") else "data: x.npy\n"))
    assert says in refused(capsys, "train", "--config", "t.yaml", "--no-progress")


def test_big_endian_data_and_noise_in_a_file(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    words = [*INVERT, *SOLVE, "--prior", prior_file, "--out"]
    ok(capsys, *words, "native.nc")
    np.save("d.npy", np.load("d.npy").astype(">f4"))
    np.save("sigma.npy", np.full((1, 16, 16), 0.1))
    ok(capsys, *words, "big.nc", "--noise", "sigma.npy")
    np.testing.assert_allclose(Posterior.load("big.nc").samples, Posterior.load("native.nc").samples, atol=1e-4)


def test_allow_import(
    capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("outside_physics.py").write_text(
        "from invgen.operators import Identity\n\n\nclass Seen(Identity):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(here))
    words = [
        "invert",
        "--data",
        "d.npy",
        "--operator",
        "outside_physics.Seen",
        "--operator.shape",
        "[1,16,16]",
        "--noise",
        "0.1",
        *SOLVE,
        "--prior",
        prior_file,
        "--out",
        "p.nc",
        "--no-progress",
    ]
    assert "outside invgen" in refused(capsys, *words)
    ok(capsys, *words, "--allow-import")


def test_damaged_checkpoints(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    whole = prior_file.read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"a": torch.zeros(1)}, "pickle.safetensors")
    for name in ("half.safetensors", "pickle.safetensors"):
        assert "not a complete safetensors checkpoint" in refused(capsys, "sample", "--prior", name, "--out", "f.npy")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, "foreign.safetensors")
    assert "another program" in refused(capsys, "sample", "--prior", "foreign.safetensors", "--out", "f.npy")


def test_nan_without_a_mask(capsys: pytest.CaptureFixture[str], here: Path, prior_file: Path) -> None:
    d = np.load("d.npy")
    d[0, 3, 4] = np.nan
    np.save("d.npy", d)
    assert "1 NaN or infinite values" in refused(capsys, *INVERT, *SOLVE, "--prior", prior_file, "--out", "p.nc")
    np.save("m.npy", np.isfinite(d))
    ok(capsys, *INVERT, *SOLVE, "--prior", prior_file, "--mask", "m.npy", "--out", "p.nc")


def test_demo_problem_end_to_end(tmp_path: Path) -> None:
    from invgen.demo import run_demo
    from invgen.solvers import PnPDM

    torch.manual_seed(0)
    grid = Grid((64, 64), (4.0, 4.0), (384.0, 0.0), axes=("z", "x"), units=("m", "m"), channels=("log_impedance",))
    prior = DiffusionPrior(UNet(1, widths=(8, 8), blocks=1), (1, 64, 64), grid=grid)
    path = run_demo(tmp_path / "demo", prior=prior, solver=PnPDM(iterations=2, inner=1), num_samples=3)
    assert "background" in path.read_text()
    assert Posterior.load(tmp_path / "demo" / "posterior.nc").samples.shape == (1, 1, 3, 1, 64, 64)
