"""Several optimisers in one loop, averages by name, and splitting a batch when memory runs out."""

import copy
import warnings

import pytest
import torch
from torch import nn

from invgen.priors import ArrayData, Training
from invgen.transforms import Identity

torch.set_num_threads(1)
DATA = ArrayData(torch.randn(64, 3, generator=torch.Generator().manual_seed(1)))


class Duel(nn.Module):
    """Two linear maps with losses of their own, and a weight that nobody trains."""

    shape, grid, transform = (3,), None, Identity()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.critic, self.generator = nn.Linear(3, 1), nn.Linear(2, 3)
        self.teacher = nn.Linear(3, 1)
        self.seen = []

    def parameter_groups(self):
        return {"critic": list(self.critic.parameters()), "generator": list(self.generator.parameters())}

    def losses(self, name, batch, generator):
        moving = [k for k, p in self.named_parameters() if p.requires_grad]
        self.seen.append((name, batch["x"].clone(), moving))
        fake = self.generator(torch.randn(len(batch["x"]), 2, generator=generator).to(batch["x"]))
        if name == "critic":
            real = self.critic(batch["x"])
            return (self.critic(fake.detach()) - real + 0.1 * real.square()).flatten()
        return -self.critic(fake).flatten()

    def schedule(self, step):
        return ["critic"] * 2 + ["generator"]

    def optimizer_settings(self, name):
        return {"betas": (0.0, 0.9), "schedule": "constant", "weight_decay": 0.0, "clip": None, "lr": 1e-3}

    def averaged(self):
        return ["generator"]


def by_hand(steps, ema):
    """The same run with plain torch, AdamW written out by torch."""
    duel = Duel()
    settings = dict(lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0)
    optimizers = {k: torch.optim.AdamW(v, **settings) for k, v in duel.parameter_groups().items()}
    average = copy.deepcopy(duel.generator.state_dict())
    number = 0
    for step in range(steps):
        for name in duel.schedule(step):
            for group in optimizers[name].param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 2)
            generator = torch.Generator().manual_seed(1_000_003 * (number + 1))
            duel.zero_grad()
            duel.losses(name, DATA.batch(number, 8, 0), generator).mean().backward()
            optimizers[name].step()
            number += 1
        decay = min(ema, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in duel.generator.state_dict().items()}
    return duel, average


def test_each_group_has_its_optimiser_and_a_fresh_batch():
    duel = Duel()
    frozen = duel.teacher.weight.clone()
    report = Training(steps=5, batch_size=8, warmup=2, ema=0.5, log_every=5).fit(duel, DATA, progress=False)
    other, average = by_hand(5, 0.5)
    for k, v in duel.generator.state_dict().items():
        torch.testing.assert_close(v, average[k], rtol=1e-5, atol=1e-7)
    for k, v in duel.critic.state_dict().items():  # not averaged
        torch.testing.assert_close(v, other.critic.state_dict()[k], rtol=1e-5, atol=1e-7)
    assert torch.equal(duel.teacher.weight, frozen)
    steps = duel.seen[-15:]
    assert [name for name, _, _ in steps[:3]] == ["critic", "critic", "generator"]
    assert not torch.equal(steps[0][1], steps[1][1])
    assert all({k.split(".")[0] for k in moving} == {name} for name, _, moving in steps)
    (row,) = report.history
    assert {"loss_critic", "loss_generator", "gradient_norm_critic", "learning_rate_generator"} <= set(row)
    assert row["learning_rate_critic"] == 1e-3
    assert report.losses == [(5, row["loss_generator"])]


def test_groups_resume_to_the_bit(tmp_path):
    class Stopping:
        def batch(self, step, size, seed):
            if step == 21:
                raise KeyboardInterrupt
            return DATA.batch(step, size, seed)

    whole, cut = Duel(), Duel()
    Training(steps=12, batch_size=8, warmup=2).fit(whole, DATA, progress=False)
    path = str(tmp_path / "duel.ckpt")
    training = Training(steps=12, batch_size=8, warmup=2, checkpoint=path, save_every=4)
    assert training.fit(cut, Stopping(), progress=False).interrupted
    resumed = Duel()
    training.fit(resumed, DATA, progress=False)
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


def test_interrupted_in_the_middle_of_a_step_resumes_from_the_step_before(tmp_path):
    class Stopping:
        def batch(self, step, size, seed):
            if step == 3 * 7 + 1:  # between the two updates of the critic
                raise KeyboardInterrupt
            return DATA.batch(step, size, seed)

    whole, resumed = Duel(), Duel()
    Training(steps=12, batch_size=8, warmup=2).fit(whole, DATA, progress=False)
    training = Training(steps=12, batch_size=8, warmup=2, checkpoint=str(tmp_path / "duel.ckpt"), save_every=4)
    training.fit(Duel(), Stopping(), progress=False)
    training.fit(resumed, DATA, progress=False)
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": lambda step: ["jury"]}, "'jury'"),
        ({"optimizer_settings": lambda name: {"momentum": 1}}, "'momentum'"),
        ({"optimizer_settings": lambda name: {"schedule": "zigzag"}}, "'zigzag'"),
        ({"averaged": lambda: ["crowd"]}, "'crowd'"),
        ({"losses": lambda name, batch, generator: torch.zeros(())}, "one number an example"),
    ],
)
def test_a_protocol_half_kept_is_said(change, says):
    duel = Duel()
    for name, value in change.items():
        setattr(duel, name, value)
    with pytest.raises(ValueError, match=says):
        Training(steps=2, batch_size=8).fit(duel, DATA, progress=False)


def test_a_parameter_belongs_to_one_group():
    duel = Duel()
    duel.parameter_groups = lambda: {"a": list(duel.critic.parameters()), "b": [duel.critic.weight]}
    with pytest.raises(ValueError, match="'a' and 'b'"):
        Training(steps=2, batch_size=8).fit(duel, DATA, progress=False)


class Fit(nn.Module):
    """Least squares without randomness, which needs more memory than there is for more than `limit` examples."""

    shape, grid, transform = (3,), None, Identity()

    def __init__(self, limit, message="DefaultCPUAllocator: can't allocate memory"):
        super().__init__()
        torch.manual_seed(0)
        self.map, self.limit, self.message, self.sizes = nn.Linear(3, 3), limit, message, []

    def training_loss(self, batch, generator):
        x = batch["x"]
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise RuntimeError(self.message)
        return (self.map(x) - 1).square().sum(1)


def test_out_of_memory_splits_the_batch_and_keeps_the_update(tmp_path):
    whole, split = Fit(100), Fit(3)
    options = {"steps": 6, "batch_size": 9, "log_every": 1}
    expected = Training(**options).fit(whole, DATA, progress=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = Training(**options, checkpoint=str(tmp_path / "c")).fit(split, DATA, progress=False)
    said = [str(w.message) for w in told if "Memory" in str(w.message)]
    assert len(said) == 2  # 9 -> 4 -> 2
    assert "2 at once, 5 parts a batch of 9" in said[1]
    assert split.sizes[-5:] == [2, 2, 2, 2, 1]
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for one, two in zip(expected.history, report.history, strict=True):
        for name in ("loss", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
    again = Fit(3)  # a resumed run starts with the parts that fit
    Training(**{**options, "steps": 8}, checkpoint=str(tmp_path / "c")).fit(again, DATA, progress=False)
    assert max(again.sizes) == 2


def test_bfloat16_is_for_the_forward_pass_only(capfd):
    seen = []

    class Watched(Fit):
        def training_loss(self, batch, generator):
            loss = super().training_loss(batch, generator)
            if self.training:
                seen.append(self.map(batch["x"]).dtype)
            return loss

    full, mixed = Fit(100), Watched(100)
    options = {"steps": 20, "batch_size": 9, "warmup": 2, "learning_rate": 0.1, "ema": 0.0, "log_every": 20}
    first = Training(**options).fit(full, DATA, progress=False)
    second = Training(**options, precision="bf16-mixed").fit(mixed, DATA, progress=False)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert second.losses[0][1] == pytest.approx(first.losses[0][1], rel=0.02)
    assert first.losses[0][1] != second.losses[0][1]
    assert capfd.readouterr().err == ""


class TrialFits(Fit):
    def training_loss(self, batch, generator):
        return super().training_loss(batch, generator) if self.training else self.map(batch["x"]).sum(1)


@pytest.mark.filterwarnings("ignore:Memory ran out")
def test_one_example_that_does_not_fit_ends_the_run():
    with pytest.raises(MemoryError, match="single example"):
        Training(steps=2, batch_size=4).fit(TrialFits(0), DATA, progress=False)


def test_other_errors_are_not_taken_for_memory():
    prior = Fit(3, "something else")
    with pytest.raises(RuntimeError, match="something else"):
        Training(steps=2, batch_size=4).fit(prior, DATA, progress=False)
