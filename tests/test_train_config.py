"""`invgen train CONFIG`: every generator, every prior, files larger than memory, logs and pages; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import invgen.data
import invgen.priors
from invgen.cli import main
from invgen.data._stream import Stream
from invgen.priors import DiffusionPrior
from invgen.priors.loading import load_prior

torch.set_num_threads(1)

UNET = {"class_path": "UNet", "init_args": {"widths": [8, 8], "blocks": 1, "embedding": 16}}
SHORT = {"steps": 2, "batch_size": 4}
SMALL = {"shape": [16, 16]}
GENERATORS = {
    "MeanderingChannels": SMALL,
    "HalfCircleChannels": {**SMALL, "quantity": "all"},
    "VelocityModels": {"family": "CurveVel_A", **SMALL},
    "VelocityMixture": SMALL,
    "PlurigaussianFacies": {**SMALL, "spacing": [20.0, 20.0]},
    "SersicGalaxies": SMALL,
    "ElasticSections": SMALL,
    "RockCrops": {**SMALL, "volume": "rock.npy", "voxel": 2.0},
    "TwoMoons": {},
    "Spirals": {},
    "EightGaussians": {},
    "Checkerboard": {},
    "Pinwheel": {},
    "Banana": {},
}
SMALL_UNET_DATA = {"class_path": "VelocityModels", "init_args": {"family": "FlatVel_A", "shape": [16, 16]}}
FACIES = {"class_path": "HalfCircleChannels", "init_args": {"shape": [16, 16]}}
PRIORS = {
    "DiffusionPrior": ({"latent_steps": 4}, UNET, SMALL_UNET_DATA),
    "FlowMatching": ({"latent_steps": 4}, UNET, SMALL_UNET_DATA),
    "VAE.convolutional": ({"latent": 4, "widths": [8, 8]}, None, SMALL_UNET_DATA),
    "Autoencoder.convolutional": ({"codes": 5, "widths": [8, 8]}, None, SMALL_UNET_DATA),
    "GAN.convolutional": ({"latent": 4, "widths": [8, 8], "critic_widths": [8, 8]}, None, SMALL_UNET_DATA),
    "WGAN.stationary": ({"widths": [8, 8], "critic_widths": [8, 8], "critic_steps": 2}, None, SMALL_UNET_DATA),
    "Flow": ({"transforms": 2, "hidden": [8]}, None, "TwoMoons"),
    "ContinuousFlow": ({"width": 8, "depth": 1, "steps": 4, "training_steps": 2}, None, "TwoMoons"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("rock.npy", (np.random.default_rng(0).random((20, 20, 20)) < 0.3).astype(np.uint8))
    np.save("x.npy", 5 + 2 * np.random.default_rng(1).standard_normal((40, 1, 8, 8)).astype(np.float32))
    return tmp_path


def run(config: dict[str, object], *words: str) -> None:
    Path("t.yaml").write_text(yaml.safe_dump(config))
    main(["train", "t.yaml", "--no-progress", *words])


def refused(capsys: pytest.CaptureFixture[str], config: dict[str, object], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(config, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_generator_is_in_the_table() -> None:
    found = {
        name
        for name in invgen.data.__all__
        if isinstance(cls := getattr(invgen.data, name), type)
        and issubclass(cls, Stream)
        and cls._draw is not Stream._draw
    }
    assert found - {"Toy"} == set(GENERATORS)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_can_be_named(here: Path, name: str) -> None:
    vectors = not GENERATORS[name] or name == "TwoMoons"
    config: dict[str, object] = {
        "data": {"class_path": name, "init_args": GENERATORS[name]},
        "training": SHORT,
        **({} if vectors else {"network": UNET}),
    }
    run(config)
    prior = DiffusionPrior.load("prior.safetensors")
    assert prior.shape == ((2,) if vectors else (3 if name in ("HalfCircleChannels", "ElasticSections") else 1, 16, 16))
    assert vectors or prior.grid is not None
    assert name in prior.seen["data"]


@pytest.mark.parametrize("label", PRIORS)
def test_every_family_of_priors_can_be_named(here: Path, label: str) -> None:
    arguments, network, data = PRIORS[label]
    config = {"prior": {"class_path": label, "init_args": arguments}, "data": data, "training": SHORT, "pool": 32}
    run(config | ({"network": network} if network else {}))
    prior = load_prior("prior.safetensors")
    assert type(prior).__name__ == label.split(".")[0]
    assert prior.seen["steps"] == 2
    if hasattr(prior, "sample"):
        assert torch.isfinite(prior.sample(2)).all()


def test_every_trainable_prior_is_in_the_table() -> None:
    named = {label.split(".")[0] for label in PRIORS} | {"Consistency"}
    found = {
        name
        for name in invgen.priors.__all__
        if isinstance(cls := getattr(invgen.priors, name), type)
        and (hasattr(cls, "training_loss") or hasattr(cls, "parameter_groups"))
    }
    assert found <= named, "say in PRIORS how `invgen train` makes it"


def test_a_student_learns_from_the_file_of_its_teacher(here: Path) -> None:
    run({"data": SMALL_UNET_DATA, "network": UNET, "training": SHORT, "pool": 16}, "--out", "teacher.safetensors")
    student = {"class_path": "Consistency.of", "init_args": {"teacher": "teacher.safetensors", "discretisation": 4}}
    run({"data": SMALL_UNET_DATA, "prior": student, "training": SHORT, "pool": 16})
    teacher, prior = load_prior("teacher.safetensors"), load_prior("prior.safetensors")
    assert prior.grid == teacher.grid
    assert torch.equal(prior.transform.shift, teacher.transform.shift)


def test_values_of_facies_stay_what_they_are(here: Path) -> None:
    prior = {"class_path": "VAE.convolutional", "init_args": {"latent": 4, "widths": [8, 8], "likelihood": "bernoulli"}}
    run({"data": FACIES, "prior": prior, "training": SHORT, "pool": 16})
    assert float(load_prior("prior.safetensors").sample(4).max()) <= 1


def test_transforms_follow_the_data(here: Path) -> None:
    for name, shift, scale in (("standard", 5.0, 2.0), ("range", None, None), ("none", 0.0, 1.0)):
        run({"data": "x.npy", "transform": name, "network": UNET, "training": SHORT})
        prior = DiffusionPrior.load("prior.safetensors")
        x = torch.from_numpy(np.load("x.npy"))
        if name == "range":
            assert prior.transform.inverse(x).abs().max() <= 1.3
        elif name == "none":
            assert torch.equal(prior.transform.inverse(x), x)
        else:
            assert float(prior.transform.shift) == pytest.approx(shift, abs=0.2)
            assert float(prior.transform.scale) == pytest.approx(scale, abs=0.2)
        assert prior.sigma_data == pytest.approx(float(prior.transform.inverse(x).std()), rel=0.1)
    two = np.random.default_rng(0).standard_normal((40, 2, 8, 8)) * np.array([1.0, 100.0])[:, None, None]
    np.save("two.npy", two)
    run({"data": "two.npy", "network": UNET, "training": SHORT})
    scales = DiffusionPrior.load("prior.safetensors").transform.scale
    assert scales.tolist() == pytest.approx([1.0, 100.0], rel=0.1)


@pytest.mark.parametrize("kind", ["MemmapData", "HDF5Data"])
def test_files_larger_than_memory(here: Path, kind: str) -> None:
    if kind == "HDF5Data":
        h5py = pytest.importorskip("h5py")
        with h5py.File("x.h5", "w") as file:
            file["x"] = np.load("x.npy")
    data = {"class_path": kind, "init_args": {"file": "x.h5" if kind == "HDF5Data" else "x.npy"}}
    run({"data": data, "network": UNET, "training": SHORT, "validation": 0.2})
    prior = DiffusionPrior.load("prior.safetensors")
    assert float(prior.transform.shift) == pytest.approx(5, abs=0.3)
    assert "32 examples" in prior.seen["data"]


def test_log_report_and_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {**SHORT, "steps": 6, "log_every": 2, "checkpoint": "run.ckpt", "log": "log.csv", "report": "run.html"}
    config: dict[str, object] = {"data": "x.npy", "network": UNET, "training": training}
    run(config)
    assert [line.split(",")[0] for line in Path("log.csv").read_text().splitlines()] == ["step", "2", "4", "6"]
    assert "base64" in Path("run.html").read_text()
    run(config, "--training.steps", "8")
    assert Path("log.csv").read_text().count("\n") == 5
    capsys.readouterr()
    Path("run.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:1000])
    run(config, "--training.steps", "8")
    assert capsys.readouterr().err.startswith("invgen: The checkpoint run.ckpt is damaged")
    other = {**UNET, "init_args": {**UNET["init_args"], "blocks": 2}}  # type: ignore[dict-item]
    says = refused(capsys, {**config, "network": other}, "--training.steps", "9")
    assert "other settings: network (was" in says
    assert "batch_size (was 4, now 5)" in refused(capsys, config, "--training.batch_size", "5")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"data": "MeanderingChanels"}, "did you mean MeanderingChannels"),
        ({"data": {"class_path": "PostStack"}}, "got PostStack"),
        ({"data": {"class_path": "GaussianNoise"}}, "a generator of invgen.data"),
        ({"data": {"class_path": "VelocityModels", "init_args": {"family": "Hills"}}}, "Hills"),
        ({"data": {"class_path": "VelocityModels", "init_args": {"spam": 1}}}, "no argument 'spam'"),
        ({"data": {"class_path": "MemmapData", "init_args": {"file": "gone.npy"}}}, "no file gone.npy"),
        ({"data": "x.npy", "pool": 5}, "leave it out for a file"),
        ({"data": "TwoMoons", "pool": "many"}, "pool is a number"),
        ({"data": "TwoMoons", "grid": {"shape": [2]}}, "leave grid out"),
        ({"data": "geology", "pool": 5}, "own pool"),
        ({"data": "x.npy", "transform": "magic"}, "standard, range, none"),
        ({"data": "x.npy", "prior": "VAE"}, "build it by VAE.convolutional"),
        ({"data": "x.npy", "prior": "VAE.load"}, "no constructor 'load'"),
        ({"data": "x.npy", "prior": "VAE.conv"}, "known are convolutional"),
        ({"data": "x.npy", "prior": "GaussianPrior"}, "not trained by steps"),
        ({"data": "x.npy", "prior": "torch.nn.Linear"}, "outside invgen"),
        (
            {"data": "x.npy", "prior": {"class_path": "VAE.convolutional", "init_args": {"spam": 1}}},
            "no argument 'spam'",
        ),
        (
            {"data": "x.npy", "prior": {"class_path": "VAE.convolutional", "init_args": {"latent": "four"}}},
            "prior.latent cannot be 'four': a whole number",
        ),
        ({"data": "x.npy", "prior": "VAE.convolutional", "network": "UNet"}, "leave network out"),
        ({"data": "x.npy", "prior": "Flow"}, "learns vectors"),
        ({"data": "x.npy", "prior": "VAE.convolutional"}, "multiples of 16"),
        ({"data": "x.npy", "training": {"patience": 3}}, "validate_every"),
        ({"data": "x.npy", "training": {"log": "log.txt"}}, ".csv"),
        ({"data": "x.npy", "training": {"precision": "8-bit"}}, "bf16-mixed"),
        ({"data": "x.npy", "validation": 1.5}, "share of the examples"),
    ],
)
def test_what_cannot_be_trained(
    here: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object], says: str
) -> None:
    assert says in refused(capsys, config)


POOLED = {
    "data": "TwoMoons",
    "pool": 64,
    "pool_file": "moons.npy",
    "network": {"class_path": "MLPDenoiser", "init_args": {"width": 8, "depth": 1}},
}


def _pooled(steps: int, **more: object) -> dict[str, object]:
    training = {"steps": steps, "batch_size": 8, "checkpoint": "state.ckpt"}
    return {**POOLED, "training": training, "out": "p.safetensors", **more}


def test_a_pool_is_kept_and_the_same_pool_is_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(_pooled(2))
    kept = np.load("moons.npy")
    assert kept.shape == (64, 2)
    made = invgen.data.TwoMoons().pool(64, seed=0).numpy()
    np.testing.assert_array_equal(kept, made)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the pool was made again")

    monkeypatch.setattr(Stream, "pool", refuse)
    run(_pooled(3, out="q.safetensors"))
    assert Path("q.safetensors").exists()


def test_another_pool_under_the_same_name_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(_pooled(2))
    assert "name another pool_file or delete it" in refused(capsys, _pooled(2, seed=1))
    assert "give pool as well" in refused(capsys, {k: v for k, v in _pooled(2).items() if k != "pool"})


def test_a_card_says_what_a_prior_started_from_and_counts_its_cost(here: Path) -> None:
    run(_pooled(2))
    first = load_prior("p.safetensors")
    teacher = {"class_path": "FlowMatching.of", "init_args": {"teacher": "p.safetensors"}}
    config = {k: v for k, v in _pooled(2, prior=teacher, out="q.safetensors").items() if k != "network"}
    run(config | {"training": {"steps": 2, "batch_size": 8}})
    card = load_prior("q.safetensors").seen
    assert card["started_from"] == first.seen
    assert card["total_training_seconds"] == pytest.approx(card["training_seconds"] + first.seen["training_seconds"])
    assert "/" not in card["command"]
