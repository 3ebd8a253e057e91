import dataclasses
import signal
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import scipy.stats
import torch

from invgen.checkpoints import read_checkpoint
from invgen.contracts import LinearOperator, Solver
from invgen.driver import DivergenceError, Streams, default_chunk, run
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.transforms import Identity


class Same(LinearOperator):
    def __init__(self, n=3, factor=1.0):
        super().__init__((n,), (n,))
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x, **theta):
        return x * self.factor

    def adjoint(self, d):
        return d * self.factor


class Box:
    shape, grid, transform = (3,), None, Identity()

    def __init__(self, width=1.0):
        self.width, self.evaluations = width, 0

    def sample(self, n, *, seed=0):
        return torch.zeros(n, 3)


@dataclass(frozen=True)
class Walk(Solver):
    """A random walk from the data: every draw of noise shows in the result."""

    steps: int = 70
    explode: int = -1
    limit: int = 10**9
    stop_at: int = -1
    kind: ClassVar[str] = "approximate"
    largest: ClassVar[list] = []

    def num_steps(self, problem):
        return self.steps

    def init(self, problem, rng):
        if len(rng) > self.limit:
            raise torch.OutOfMemoryError("too many")
        Walk.largest.append(len(rng))
        return {"x": problem.terms[0].data.expand(len(rng), -1) + rng.normal((3,), dtype=problem.terms[0].data.dtype)}

    def step(self, problem, state, rng):
        x = 0.9 * state["x"] + rng.normal((3,), dtype=state["x"].dtype) + rng.uniform((3,), dtype=state["x"].dtype)
        if self.explode >= 0:
            wrong = torch.tensor([s == self.explode or self.explode == 99 for _, s in rng.items])
            x = torch.where(wrong[:, None], float("nan"), x)
        return {"x": x}

    def finish(self, problem, state):
        return {"x": state["x"], "stat_last": state["x"][:, 0], "latent": 2 * state["x"]}


def problem(n_obs=1, **changes):
    data = torch.arange(3.0 * n_obs).reshape(n_obs, 3)
    return InverseProblem(
        changes.get("data", data),
        changes.get("operator", Same()),
        changes.get("noise", GaussianNoise(0.1)),
        changes.get("prior", Box()),
    )


# --- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_streams_do_not_depend_on_the_grouping(dtype):
    def draws(items):
        rng = Streams(5, items)
        return torch.stack([rng.normal((4,), dtype=dtype) for _ in range(130)], 1)

    whole = draws(range(7))
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([draws([0, 1, 2]), draws([3]), draws([4, 5, 6])]))
    assert torch.equal(whole[[6, 2]], draws([6, 2]))
    assert len(torch.unique(torch.view_as_real(whole).reshape(-1, 2)[:, 0] if dtype.is_complex else whole.double())) > (
        3000 if dtype != torch.bfloat16 else 300
    )


def test_streams_do_not_depend_on_the_block(monkeypatch):
    def draws():
        rng = Streams(5, range(3))
        return [
            torch.stack([f(rng) for _ in range(100)])
            for f in (
                lambda r: r.normal((5,)),
                lambda r: r.gamma(0.7, (5,), dtype=torch.float64),
                lambda r: r.uniform((5,)),
                lambda r: r.normal((5,), dtype=torch.complex128),
            )
        ]

    first = draws()
    monkeypatch.setattr("invgen.streams._BLOCK_BYTES", 150)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(), strict=True))


@pytest.mark.parametrize("taken", [0, 1, 5, 63, 64, 65, 130])
def test_restore_continues_exactly(taken):
    def some(rng, n):
        return [
            (rng.normal((2,)), rng.gamma(2.5, (2,)), rng.integers(10), rng.poisson(torch.full((3, 2), 4.0)))
            for _ in range(n)
        ]

    rng = Streams(9, range(3))
    some(rng, taken)
    counters = dict(rng.counters)
    want = some(rng, 70)
    again = Streams(9, range(3))
    again.restore(counters)
    for a, b in zip(want, some(again, 70), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_streams_are_independent_and_follow_their_laws():
    items, steps = 400, 100
    rng = Streams(0, range(items))
    z = torch.stack([rng.normal((3,), dtype=torch.float64) for _ in range(steps)], 1)  # (items, steps, 3)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-5
    flat = z.flatten(1)
    n = flat.shape[1]
    between_items = (flat @ flat.mT / n - torch.eye(items, dtype=torch.float64)).triu(1).flatten()
    assert between_items.abs().max() * n**0.5 < 6.3  # 79800 pairs: 5.5 sigma at 0.1 %, with some room for t tails
    assert abs(float(between_items.square().sum() * n - items * (items - 1) / 2) / (items * (items - 1)) ** 0.5) < 5
    for lag in (1, 7, 36, 63, 64):  # within and across epochs
        pairs = (z[:, lag:] * z[:, :-lag]).flatten()
        assert abs(float(pairs.mean()) * len(pairs) ** 0.5) < 5
    u = torch.stack([rng.uniform((3,)) for _ in range(steps)], 1).flatten().numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-5
    g = torch.stack([rng.gamma(0.5, (3,), dtype=torch.float64) for _ in range(steps)], 1).flatten().numpy()
    assert scipy.stats.kstest(g, scipy.stats.gamma(0.5).cdf).pvalue > 1e-5
    c = torch.stack([rng.normal((3,), dtype=torch.complex128) for _ in range(steps)], 1).flatten()
    assert abs(float(c.abs().square().mean()) - 1) * len(c) ** 0.5 < 5
    assert abs(complex(c.square().mean())) * len(c) ** 0.5 < 5
    k = rng.integers(7, (50,)).flatten()
    assert scipy.stats.chisquare(np.bincount(k.numpy(), minlength=7)).pvalue > 1e-5


def test_streams_differ_by_seed_item_salt_tag_shape_and_kind():
    base = Streams(0, [0]).normal((4,))
    others = [
        Streams(1, [0]).normal((4,)),
        Streams(0, [1]).normal((4,)),
        Streams(0, [(1, 0)]).normal((4,)),
        Streams(0, [0]).spawn("a").normal((4,)),
        Streams(0, [0]).normal((4,), tag="t"),
        Streams(0, [0]).normal((2, 2)).flatten(),
        Streams(0, [0]).normal((4,), dtype=torch.float64).float(),
    ]
    assert all(not torch.allclose(base, o) for o in others)
    assert torch.equal(base, Streams(0, [(0, 0)]).normal((4,)))
    with pytest.raises(ValueError, match="non-negative"):
        Streams(-1, [0])


def test_no_two_of_many_streams_begin_alike():
    first = Streams(0, range(60000)).normal((1,), dtype=torch.float64)
    assert len(first.unique()) == 60000  # 32-bit seeds collide here with probability 0.34


# --- the loop -----------------------------------------------------------------------------------------------------------


def test_chunks_do_not_matter_and_observations_stay_apart():
    whole = run(Walk(), problem(2), 5, seed=3)
    assert whole.samples.shape == (2, 1, 5, 3)
    assert whole.latent.shape == (2, 1, 5, 3)
    for chunk in (1, 3, 4, 100):
        assert torch.equal(run(Walk(), problem(2), 5, seed=3, chunk=chunk).samples, whole.samples)
    assert torch.equal(run(Walk(), problem(2), 3, seed=3).samples, whole.samples[:, :, :3])
    assert not torch.equal(run(Walk(), problem(2), 5, seed=4).samples, whole.samples)
    assert run(Walk(), problem(), 2, dtype=torch.float64).samples.dtype == torch.float64
    assert whole.stats["last"].shape == (2, 1, 5)
    assert whole.settings["steps"] == 70
    assert whole.seed == 3


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (1, 1), (3, 5, 7), (2, 513, 700), (10**7,)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_chunk_takes_any_shape(shape, device):
    assert 1 <= default_chunk(shape, torch.device(device)) <= 8192


class Interrupt:
    def __init__(self, after):
        self.left = after

    def __call__(self, step, state):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [10, 69, 75, 100, 200])
def test_pause_and_resume_is_exact(tmp_path, after):
    whole = run(Walk(), problem(2), 4, seed=3)
    file = tmp_path / "run.safetensors"
    try:
        part = run(
            Walk(), problem(2), 4, seed=3, chunk=3, checkpoint=file, save_seconds=0.0, callbacks=[Interrupt(after)]
        )
        assert part.settings["interrupted"]
    except KeyboardInterrupt:
        assert after <= 70
    assert file.is_file()
    seen = []
    done = run(
        Walk(), problem(2), 4, seed=3, chunk=3, checkpoint=file, callbacks=[lambda step, state: seen.append(step)]
    )
    assert torch.equal(done.samples, whole.samples)
    assert len(seen) <= 3 * 70 - after + 1  # it continued in the middle
    assert not file.exists()


def test_resume_with_another_chunk(tmp_path):
    file = tmp_path / "run"
    run(Walk(), problem(2), 4, seed=3, chunk=3, checkpoint=file, save_seconds=0.0, callbacks=[Interrupt(100)])
    assert torch.equal(
        run(Walk(), problem(2), 4, seed=3, chunk=2, checkpoint=file).samples, run(Walk(), problem(2), 4, seed=3).samples
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda f: run(Walk(steps=80), problem(2), 4, seed=3, checkpoint=f),
        lambda f: run(Walk(), problem(2), 4, seed=4, checkpoint=f),
        lambda f: run(Walk(), problem(2), 5, seed=3, checkpoint=f),
        lambda f: run(Walk(), problem(2, data=torch.ones(2, 3)), 4, seed=3, checkpoint=f),
        lambda f: run(Walk(), problem(2, noise=GaussianNoise(0.2)), 4, seed=3, checkpoint=f),
        lambda f: run(Walk(), problem(2, operator=Same(factor=2.0)), 4, seed=3, checkpoint=f),
        lambda f: run(Walk(), problem(2, prior=Box(2.0)), 4, seed=3, checkpoint=f),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, other):
    file = tmp_path / "run"
    run(Walk(), problem(2), 4, seed=3, chunk=3, checkpoint=file, callbacks=[Interrupt(100)])
    with pytest.raises(ValueError, match="other settings"):
        other(file)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_checkpoints_take_any_data(tmp_path, dtype):
    file = tmp_path / "run"
    given = problem(1, data=torch.ones(1, 3).to(dtype))
    try:
        run(Walk(), given, 4, chunk=1, checkpoint=file, callbacks=[Interrupt(100)])
    except KeyboardInterrupt:
        pytest.fail("a chunk was finished")
    run(Walk(), given, 4, chunk=1, checkpoint=file)


def test_ctrl_c_keeps_what_is_finished():
    whole = run(Walk(), problem(3), 4, seed=3)
    part = run(Walk(), problem(3), 4, seed=3, chunk=4, callbacks=[Interrupt(150)])
    assert part.settings["interrupted"]
    assert torch.equal(part.samples, whole.samples[:2])
    few = run(Walk(), problem(3), 4, seed=3, chunk=3, callbacks=[Interrupt(80)])
    assert torch.equal(few.samples, whole.samples[:1, :, :3])
    with pytest.raises(KeyboardInterrupt):
        run(Walk(), problem(), 4, callbacks=[Interrupt(3)])


def test_ctrl_c_in_the_first_chunk_keeps_its_state_in_the_checkpoint(tmp_path):
    file = tmp_path / "run"
    whole = run(Walk(), problem(), 4, seed=3)
    with pytest.raises(KeyboardInterrupt):
        run(
            Walk(),
            problem(),
            4,
            seed=3,
            checkpoint=file,
            callbacks=[lambda i, s: i == 3 and signal.raise_signal(signal.SIGINT)],
        )
    meta = read_checkpoint(file, "run")[1]
    assert (meta["finished"], meta["step"]) == (0, 4)
    seen = []
    again = run(Walk(), problem(), 4, seed=3, checkpoint=file, callbacks=[lambda i, s: seen.append(i)])
    assert seen[0] == 4
    assert torch.equal(again.samples, whole.samples)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_out_of_memory_halves_the_chunk():
    Walk.largest.clear()
    out = run(Walk(limit=3), problem(2), 5, seed=3, chunk=10)
    assert torch.equal(out.samples, run(Walk(), problem(2), 5, seed=3).samples)
    assert max(Walk.largest[:-1]) <= 3
    with pytest.raises(torch.OutOfMemoryError):
        run(Walk(limit=0), problem(), 3)


def test_other_errors_are_not_swallowed():
    @dataclass(frozen=True)
    class Broken(Walk):
        def step(self, problem, state, rng):
            raise RuntimeError("a real bug")

    with pytest.raises(RuntimeError, match="a real bug"):
        run(Broken(), problem(), 4)


def test_divergence_is_reported_and_the_rest_finish():
    whole = run(Walk(), problem(), 5)
    with pytest.warns(UserWarning, match="1 of 5 samples"):
        part = run(Walk(explode=2), problem(), 5)
    good = [0, 1, 3, 4]
    assert torch.equal(part.samples[:, :, good], whole.samples[:, :, good])
    assert torch.isnan(part.samples[:, :, 2]).all()
    assert part.stats["first_bad_step"].flatten().tolist() == [-1, -1, 0, -1, -1]
    torch.testing.assert_close(part.mean(), whole.samples[0, 0, good].mean(0)[None])
    torch.testing.assert_close(part.std(), whole.samples[0, 0, good].std(0)[None])
    seen = []
    with pytest.raises(DivergenceError, match="All 5 samples"):
        run(Walk(explode=99, steps=1000), problem(), 5, callbacks=[lambda s, _: seen.append(s)])
    assert len(seen) < 100  # stopped early


def test_a_solver_may_return_chains_only():
    @dataclass(frozen=True)
    class Chains(Walk):
        def finish(self, problem, state):
            return {"chain": state["x"][:, None].expand(-1, 6, -1), "stat_accept": state["x"][:, 0]}

    out = run(Chains(), problem(2), 4)
    assert out.samples.shape == (2, 4, 6, 3)
    assert out.stats["accept"].shape == (2, 4, 6)


def test_callbacks_and_counts():
    seen = []
    out = run(Walk(), problem(), 4, chunk=2, callbacks=[lambda step, state: seen.append((step, state["x"].shape))])
    assert seen == [(s, (2, 3)) for s in range(70)] * 2
    assert out.counts == {"network": 0, "forward": 0, "adjoint": 0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"num_samples": 2, "seed": -1}, "seed"),
        ({"num_samples": 2, "seed": 0.5}, "seed"),
        ({"num_samples": 2, "chunk": 0}, "chunk"),
        ({"num_samples": 2, "dtype": torch.complex64}, "real floating"),
    ],
)
def test_bad_runs(options, says):
    with pytest.raises(ValueError, match=says):
        run(Walk(), problem(), options.pop("num_samples"), **options)


def test_solver_is_a_frozen_dataclass():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Walk().steps = 3
