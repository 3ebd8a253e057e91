"""The training loop: resume, interruption, averages, bad losses."""

import os
import signal

import pytest
import torch

from invgen.priors import ArrayData, DiffusionPrior, GaussianPrior, Training
from invgen.priors.networks import MLPDenoiser

torch.set_num_threads(1)


def prior(width=16):
    torch.manual_seed(0)
    return DiffusionPrior(MLPDenoiser(2, width=width, depth=2), (2,), sigma_data=1.0)


DATA = ArrayData(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))


class Interrupting:
    """Data that press Ctrl-C when a step is asked for, as an exception or as a signal."""

    def __init__(self, at, by="exception"):
        self.at, self.by = at, by

    def batch(self, step, size, seed):
        if step == self.at and self.by == "exception":
            raise KeyboardInterrupt
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return DATA.batch(step, size, seed)


def training(steps=25, **options):
    return Training(steps=steps, batch_size=8, warmup=5, log_every=10, save_every=10, **options)


def assert_equal_weights(a, b):
    for (name, first), second in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_batches_are_a_function_of_the_step_and_cover_each_epoch():
    assert torch.equal(DATA.batch(3, 8, 0)["x"], DATA.batch(3, 8, 0)["x"])
    epoch = torch.cat([DATA.batch(i, 16, 5)["x"] for i in range(4)])
    assert torch.equal(epoch.sort(0).values, DATA.x.sort(0).values)
    assert not torch.equal(DATA.batch(0, 16, 0)["x"], DATA.batch(0, 16, 1)["x"])
    assert DATA.batch(2, 24, 0)["x"].shape == (24, 2)  # straddles two epochs


@pytest.mark.parametrize(("stop", "by"), [(13, "exception"), (10, "exception"), (13, "signal")])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop, by):
    whole = prior()
    reference = training().fit(whole, DATA, progress=False)
    path = tmp_path / "run.safetensors"
    cut = training(checkpoint=str(path)).fit(prior(), Interrupting(stop, by), progress=False)
    # an exception stops before the step it came in, a signal lets that step finish
    assert cut.interrupted
    assert cut.steps == stop + (by == "signal")
    assert path.is_file()
    resumed = prior()
    rest = training(checkpoint=str(path)).fit(resumed, DATA, progress=False)
    assert not rest.interrupted
    assert rest.steps == 25
    assert_equal_weights(whole, resumed)
    assert [s for s, _ in rest.losses] == [s for s, _ in reference.losses] == [10, 20, 25]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_not_run_again(tmp_path):
    path = str(tmp_path / "run.safetensors")
    first, second = prior(), prior()
    training(checkpoint=path).fit(first, DATA, progress=False)
    report = training(checkpoint=path).fit(second, Interrupting(0), progress=False)
    assert report.steps == 25
    assert not report.interrupted
    assert_equal_weights(first, second)


def test_seed_decides():
    a, b, c = prior(), prior(), prior()
    for p, seed in ((a, 0), (b, 0), (c, 1)):
        training(5, seed=seed).fit(p, DATA, progress=False)
    assert_equal_weights(a, b)
    assert not torch.equal(a.network.leave.weight, c.network.leave.weight)


def test_weights_end_as_the_average():
    p, seen = prior(), []
    training(3, ema=0.5).fit(p, DATA, progress=False, callback=lambda *_: None)
    q = prior()
    average = {k: v.clone() for k, v in q.state_dict().items()}

    class Watching:
        def batch(self, step, size, seed):
            seen.append({k: v.clone() for k, v in q.state_dict().items()})
            return DATA.batch(step, size, seed)

    training(3, ema=0.0).fit(q, Watching(), progress=False)  # ema 0: ends as the last weights
    for step, state in enumerate([*seen[1:], q.state_dict()]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in state.items()}
    for k, v in p.state_dict().items():
        torch.testing.assert_close(v, average[k].to(v.dtype), rtol=1e-5, atol=1e-7)


def test_bad_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poisoned:
        def batch(self, step, size, seed):
            x = DATA.batch(step, size, seed)["x"]
            return {"x": x * float("nan") if step >= 12 else x}

    path = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError, match="learning_rate"):
        Training(steps=60, batch_size=8, log_every=50, save_every=10, checkpoint=str(path)).fit(
            prior(), Poisoned(), progress=False
        )
    resumed = prior()
    report = Training(steps=10, batch_size=8, checkpoint=str(path)).fit(resumed, DATA, progress=False)
    assert report.steps == 10
    assert all(bool(torch.isfinite(v).all()) for v in resumed.state_dict().values())


def test_checkpoint_of_another_network_is_refused(tmp_path):
    path = str(tmp_path / "run.safetensors")
    training(2, checkpoint=path).fit(prior(), DATA, progress=False)
    with pytest.raises(ValueError, match="another network"):
        training(4, checkpoint=path).fit(prior(width=8), DATA, progress=False)
    with pytest.raises(ValueError, match="'training'"):
        DiffusionPrior.load(path)


def test_a_small_prior_learns_the_denoiser_of_a_gaussian():
    truth = GaussianPrior.dense(torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    data = ArrayData(truth.sample(20000, seed=0))
    torch.manual_seed(0)
    learned = DiffusionPrior(MLPDenoiser(2, width=64, depth=3), (2,), sigma_data=0.9)
    validation = {"x": truth.sample(256, seed=1)}
    report = Training(steps=2500, batch_size=512, learning_rate=3e-3, warmup=50, ema=0.99).fit(
        learned, data, validation=validation, progress=False
    )
    assert set(report.validation) >= {"rmse_at_0.1", "rmse_at_1"}
    u0 = truth.sample(2000, seed=2)
    for sigma in (0.1, 0.3, 1.0, 3.0):
        u = u0 + sigma * torch.randn(u0.shape, generator=torch.Generator().manual_seed(3))
        exact = truth.denoise(u, sigma)
        error = (learned.denoise(u, sigma) - exact).square().mean().sqrt()
        assert float(error) < 0.1 * float((exact - u0).square().mean().sqrt()), sigma
