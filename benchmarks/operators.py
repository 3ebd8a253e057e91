"""Post-stack modelling and the PyLops bridge, beside `pylops.TorchOperator` in the same run.

The problem: forward and backward of ½|A m − d|² for 64 sections of 64×64 samples in float32, on one thread, CPU time.
A is `PostStack` on one side; on the other `TorchOperator(batch=True)` around `PoststackLinearModelling` with the
arguments it has by default (`explicit=False`, convolution and derivative). The same with `explicit=True`, one dense
matrix, is shown as information. `--fast` changes the repeats only (9 instead of 31).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pylops
import torch
from harness import Benchmark, interleaved
from pylops.avo.poststack import PoststackLinearModelling
from torch import Tensor

from invgen.operators import PostStack, from_pylops, ricker

warnings.filterwarnings("ignore", category=FutureWarning)

BATCH, NZ, NX = 64, 64, 64
CALLS = 5  # per timing


def wavelet(dtype: torch.dtype) -> np.ndarray:
    """A 20 Hz Ricker of 61 samples at 4 ms, halved: the ½ of the reflectivity."""
    return (ricker(torch.arange(-30, 31, dtype=torch.float64) * 0.004, 20.0) / 2).to(dtype).numpy()


def theirs(dtype: torch.dtype, explicit: bool) -> pylops.LinearOperator:
    return PoststackLinearModelling(wavelet(dtype), nt0=NZ, spatdims=NX, explicit=explicit)


def gradient(operator: Callable[[Tensor], Tensor], m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """½|A m − d|² and its gradient."""
    m = m.detach().requires_grad_()
    misfit = 0.5 * (operator(m) - d).square().sum()
    misfit.backward()
    assert m.grad is not None
    return misfit.detach(), m.grad


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def speed(bench: Benchmark) -> None:
    dtype = torch.float32
    g = torch.Generator().manual_seed(0)
    m, d = torch.randn(BATCH, NZ, NX, generator=g), torch.randn(BATCH, NZ, NX, generator=g)
    m, d = m.to(bench.device), d.to(bench.device)
    # on a graphics card the array goes through the CPU: that is what the class does without CuPy
    torch_operators = {
        name: pylops.TorchOperator(theirs(dtype, explicit), batch=True, flatten=False, devicetorch=bench.device)
        for name, explicit in (("default", False), ("explicit", True))
    }
    ours = PostStack(wavelet(dtype), (1, NZ, NX)).to(bench.device)

    def in_a_row(operator: Callable[[Tensor], Tensor], m: Tensor, d: Tensor) -> Callable[[], None]:
        """Several calls in a row, as in any loop: a call does not start on the caches another library left."""

        def run() -> None:
            for _ in range(CALLS):
                gradient(operator, m, d)

        return run

    times = interleaved(
        {
            "PostStack": in_a_row(ours, m[:, None], d[:, None]),
            "default": in_a_row(torch_operators["default"].apply, m, d),
            "explicit": in_a_row(torch_operators["explicit"].apply, m, d),
        },
        repeats=9 if bench.fast else 31,
        warmup=3,
    )
    for name, t in times.items():
        print(f"{name}: {1e3 * t.median / CALLS:.2f} ms a call (IQR {1e3 * t.iqr / CALLS:.2f})")
    # a ratio of each round: neighbours in time see the same machine
    for figure, name, note in (
        ("poststack_speedup", "default", "PyLops with its default explicit=False"),
        ("poststack_speedup_explicit", "explicit", "PyLops with explicit=True (dense matrix)"),
    ):
        ratios = np.array(times[name].samples) / np.array(times["PostStack"].samples)
        q1, median, q3 = np.quantile(ratios, [0.25, 0.5, 0.75])
        bench.add(figure, float(median), "x", note=f"{note}; IQR {q1:.2f} to {q3:.2f}")


def errors(bench: Benchmark) -> None:
    """Largest relative difference of data, adjoint and gradient to PyLops in float64, over both forms and both kinds."""
    g = torch.Generator().manual_seed(1)
    m = torch.randn(4, NZ, NX, generator=g, dtype=torch.float64)
    d = torch.randn(4, NZ, NX, generator=g, dtype=torch.float64)
    for figure, dtype in (("poststack_error", torch.float32), ("poststack_error_float64", torch.float64)):
        worst = 0.0
        for kind in ("centered", "forward"):
            ours = PostStack(wavelet(torch.float64), (1, NZ, NX), kind=kind).to(bench.device)
            x, y = m.to(bench.device, dtype)[:, None], d.to(bench.device, dtype)[:, None]
            for explicit in (False, True):
                reference = PoststackLinearModelling(
                    wavelet(torch.float64), nt0=NZ, spatdims=NX, explicit=explicit, kind=kind
                )
                data = torch.from_numpy(np.stack([reference @ v for v in m.numpy()]))
                back = torch.from_numpy(np.stack([reference.H @ v for v in d.numpy()]))
                slope = torch.from_numpy(
                    np.stack([reference.H @ (reference @ v - w) for v, w in zip(m.numpy(), d.numpy(), strict=True)])
                )
                worst = max(worst, relative(ours(x)[:, 0].cpu(), data), relative(ours.adjoint(y)[:, 0].cpu(), back))
                worst = max(worst, relative(gradient(ours, x, y)[1][:, 0].cpu(), slope))
        bench.add(figure, worst, note="relative to PyLops in float64")


def bridge_checks(
    op: pylops.LinearOperator, make: Callable[[pylops.LinearOperator], Callable[[Tensor], Tensor]]
) -> dict[str, bool]:
    """What a differentiable PyLops operator should pass; each check is executed, an exception is a failure."""
    g = torch.Generator().manual_seed(2)
    dims = tuple(op.dims)
    x = torch.randn(2, 3, *dims, generator=g, dtype=torch.float64)
    want = torch.from_numpy(np.stack([np.stack([op @ v for v in row]) for row in x.numpy()]))

    def second_derivatives() -> bool:
        apply, v = make(op), x[0].clone().requires_grad_()
        quadratic = torch.autograd.gradgradcheck(lambda u: apply(u.square()).square(), (v,))
        # and the Hessian of the misfit is Aᵀ A
        point = x[0, :1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(0.5 * apply(point).square().sum(), point, create_graph=True)
        (hv,) = torch.autograd.grad((slope * x[0, 1:2]).sum(), point)
        exact = torch.from_numpy(op.H @ (op @ x[0, 1].numpy()))
        return quadratic and relative(hv[0], exact) < 1e-10

    def vmap() -> bool:
        return relative(torch.func.vmap(make(op))(x), want) < 1e-12

    def dtype_kept() -> bool:
        apply = make(op)
        return all(apply(x[0].to(t)).dtype == t for t in (torch.float32, torch.float64, torch.bfloat16))

    def leading_batch() -> bool:
        apply = make(op)
        return all(relative(apply(v), w) < 1e-12 for v, w in ((x, want), (x[0], want[0]), (x[0, 0], want[0, 0])))

    def pickling() -> bool:
        again = pickle.loads(pickle.dumps(make(op)))
        return relative(again(x[0]), want[0]) < 1e-12

    passed = {}
    for check in (second_derivatives, vmap, dtype_kept, leading_batch, pickling):
        try:
            passed[check.__name__] = bool(check())
        except Exception as error:
            print(f"  {check.__name__}: {type(error).__name__}: {str(error).strip().splitlines()[0][:110]}")
            passed[check.__name__] = False
    return passed


def bridge(bench: Benchmark) -> None:
    op = PoststackLinearModelling(wavelet(torch.float64)[26:35], nt0=12, spatdims=4)
    ours = bridge_checks(op, from_pylops)
    print("pylops.TorchOperator(batch=True):")
    others = bridge_checks(op, lambda o: pylops.TorchOperator(o, batch=True, flatten=False))
    for name, passed in ours.items():
        print(
            f"  {name:20s} from_pylops {'passes' if passed else 'FAILS'}   TorchOperator {'passes' if others[name] else 'fails'}"
        )
    bench.add("bridge_checks_passed", sum(ours.values()), "of 5")
    bench.add("torchoperator_checks_passed", sum(others.values()), "of 5")


def main() -> None:
    bench = Benchmark("operators", "Post-stack modelling and the PyLops bridge beside pylops.TorchOperator.")
    speed(bench)
    errors(bench)
    bridge(bench)
    bench.finish()


if __name__ == "__main__":
    main()
