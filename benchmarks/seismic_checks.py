"""Seismic pieces that have an exact answer: gradients of travel times, lengths of rays, SEG-Y files.

- eikonal_gradient: `TravelTime` across 16 × 16 cells, velocities smooth over three cells with a spread of 30 %, sources
  and receivers anywhere; largest difference between its gradient and central differences over the largest entry, for
  three media, float64. A step across a kink (two ways equally long) would show as an outlier; none is left out.
- ray_error: `StraightRays` against a dense matrix made in another way: every ray is clipped to every cell (Liang & Barsky
  1984), 24 × 24 cross-hole rays through 64 × 64 cells and 300 rays with ends anywhere; largest difference of an entry over
  the largest. Rays along a border of cells belong to the cells of either side, so the holes' ends are moved by 0.123 of a cell.
- segy_roundtrip: 1 where a line and a cube return from IEEE files bit for bit, from IBM files within 2⁻²⁰, and with
  their headers byte for byte; 0 otherwise.

For information: the error of the times where v = 1.5 + 0.04 z (exact time known) on 64 × 64 cells, their CPU seconds, and
how far straight rays are off. `--figure FILE` draws rays and times. `--fast` takes one medium instead of three.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark

from invgen.data.segy import read_segy, write_segy
from invgen.grid import Grid
from invgen.operators import StraightRays, TravelTime

F64 = torch.float64


def smooth_medium(shape: tuple[int, int], seed: int, spread: float = 0.3, length: float = 3.0) -> torch.Tensor:
    """Velocities exp(spread · field) around 2, `(1, 1, nz, nx)`: white noise under a Gaussian filter."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 1, *shape, generator=g, dtype=F64)
    k = [torch.fft.fftfreq(n, dtype=F64) for n in shape]
    low = torch.exp(-2 * (torch.pi * length) ** 2 * (k[0][:, None] ** 2 + k[1][None] ** 2))
    field = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    return 2.0 * torch.exp(spread * field / field.std())


def ends(grid: Grid, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    low = np.asarray(grid.origin) - 0.5 * np.asarray(grid.spacing)
    size = np.asarray(grid.shape) * np.asarray(grid.spacing)
    return low + rng.random((n, 2)) * size, low + rng.random((n, 2)) * size


def gradient_error(seed: int) -> float:
    """Largest difference from central differences over the largest entry."""
    grid = Grid((16, 16), (10.0, 10.0))
    op = TravelTime(grid, *ends(grid, 40, seed))
    v = smooth_medium(grid.shape, seed)
    weights = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = v.clone().requires_grad_()
    (g,) = torch.autograd.grad((op(x) * weights).sum(), x)
    step = 1e-5
    moves = step * torch.eye(256, dtype=F64).reshape(256, 1, 16, 16)
    with torch.no_grad():
        numeric = ((op(v + moves) - op(v - moves)) * weights).sum(1) / (2 * step)
    return float((g.flatten() - numeric).abs().max() / numeric.abs().max())


def clipped(grid: Grid, sources: np.ndarray, receivers: np.ndarray) -> np.ndarray:
    """Length of every ray in every cell, `(rays, cells)`: the segment clipped to the cell, one axis after the other."""
    enter = np.zeros((len(sources), *grid.shape))
    leave = np.ones_like(enter)
    for axis in range(2):
        edges = grid.origin[axis] + (np.arange(grid.shape[axis] + 1) - 0.5) * grid.spacing[axis]
        along = (receivers - sources)[:, axis][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            at = (edges[None] - sources[:, axis][:, None]) / along
        low, high = np.minimum(at[:, 1:], at[:, :-1]), np.maximum(at[:, 1:], at[:, :-1])
        inside = (edges[:-1] <= sources[:, axis][:, None]) & (sources[:, axis][:, None] < edges[1:])
        low = np.where(along == 0, np.where(inside, 0.0, 2.0), low)  # parallel: in the cell all the way, or never
        high = np.where(along == 0, np.where(inside, 1.0, -1.0), high)
        wide = (slice(None), slice(None), None) if axis == 0 else (slice(None), None, slice(None))
        enter, leave = np.maximum(enter, low[wide]), np.minimum(leave, high[wide])
    lengths = np.linalg.norm(receivers - sources, axis=1)
    return np.maximum(leave - enter, 0.0).reshape(len(sources), -1) * lengths[:, None]


def ray_error() -> float:
    grid = Grid((64, 64), (1.5, 2.0), (3.0, -4.0))
    height, width = 64 * 1.5, 64 * 2.0
    depth = 3.0 - 0.75 + (np.arange(24) + 0.5) / 24 * (height - 1.0) + 0.123 * 1.5
    a = np.stack([np.repeat(depth, 24), np.full(576, -5.0)], 1)
    b = np.stack([np.tile(depth[::-1], 24), np.full(576, -5.0 + width)], 1)
    worst = 0.0
    for s, r in ((a, b), ends(grid, 300, 0)):
        got, want = StraightRays(grid, s, r).to_dense().numpy(), clipped(grid, s, r)
        worst = max(worst, float(np.abs(got - want).max() / want.max()))
    return worst


def roundtrip(folder: Path) -> bool:
    """IEEE bit-exact, IBM to 2⁻²⁰, headers byte for byte, for a line and a cube."""
    line = Grid((200, 60), (0.004, 12.5), (0.1, 1000.0), ("t", "x"), ("s", "m"))
    cube = Grid((80, 9, 7), (0.002, 25.0, 12.5), (0.0, 0.0, 600.0), ("t", "inline", "crossline"), ("s", "m", "m"))
    good = True
    for grid in (line, cube):
        rng = np.random.default_rng(len(grid.shape))
        x = (rng.standard_normal(grid.shape) * 10.0 ** rng.uniform(-6, 6, grid.shape)).astype(np.float32)
        for kind in ("ieee", "ibm"):
            path = write_segy(folder / "a.sgy", x, grid=grid, format=kind)
            section = read_segy(path)
            got = section.data[0].numpy()
            same = np.array_equal(got.view(np.uint32), x.view(np.uint32))
            good &= same if kind == "ieee" else bool((np.abs(got - x) <= 2.0**-20 * np.abs(x)).all())
            good &= write_segy(folder / "b.sgy", section.data, like=section).read_bytes() == path.read_bytes()
            good &= section.grid.shape == grid.shape and bool(np.allclose(section.grid.spacing, grid.spacing))
    return good


def known_medium(bench: Benchmark) -> None:
    """Times where v = 1.5 + 0.04 z against arccosh(1 + k² |b − a|² / (2 v_a v_b)) / k."""
    grid = Grid((64, 64), (1.0, 1.0), (0.5, 0.5))
    v = (1.5 + 0.04 * torch.from_numpy(grid.coordinates(0)))[None, None, :, None].expand(1, 1, 64, 64).clone()
    op = TravelTime.crosshole(grid)
    a = op.source_points[op.source_of]
    b = np.stack([np.tile(a[::24, 0], 24), np.full(576, 64.0)], 1)
    va, vb = 1.5 + 0.04 * a[:, 0], 1.5 + 0.04 * b[:, 0]
    exact = np.arccosh(1 + 0.04**2 * ((b - a) ** 2).sum(1) / (2 * va * vb)) / 0.04
    straight = StraightRays(grid, a, b)(1 / v)[0].numpy()
    bench.add("eikonal_error", float(np.abs(op(v)[0].numpy() - exact).max() / exact.max()), "", note="linear gradient")
    bench.add("straight_error", float(np.abs(straight - exact).max() / exact.max()), "", note="straight rays, the same")
    for dtype in (torch.float64, torch.float32):
        x = v.to(dtype).requires_grad_()
        start = time.process_time()
        t = op(x)
        middle = time.process_time()
        torch.autograd.grad(t.sum(), x)
        name = str(dtype).removeprefix("torch.")
        bench.add(f"seconds_{name}", middle - start, "CPU-s", note="24 sources, 64 × 64")
        bench.add(f"gradient_seconds_{name}", time.process_time() - middle, "CPU-s", note="on top")


def draw(path: Path) -> None:
    """A smooth medium with the first arrivals of one source, and the lengths of three straight rays in its cells."""
    from matplotlib.figure import Figure

    grid = Grid((48, 48), (10.0, 10.0), (5.0, 5.0), units=("m", "m"))
    v = 1000 * smooth_medium(grid.shape, 3, 0.25, 5.0)
    z, x = np.meshgrid(grid.coordinates(0), grid.coordinates(1), indexing="ij")
    points = np.stack([z.ravel(), x.ravel()], 1)
    source = [[60.0, 1.0]]
    times = TravelTime.all_pairs(grid, source, points)(v)[0].numpy().reshape(48, 48)
    rays = StraightRays(grid, source * 3, [[20.0, 479.0], [200.0, 479.0], [430.0, 479.0]])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    image = left.imshow(v[0, 0].numpy(), extent=grid.extent, cmap="viridis")
    lines = left.contour(x, z, 1000 * times, levels=12, colors="white", linewidths=0.8)
    left.clabel(lines, fmt="%.0f", fontsize=7)
    figure.colorbar(image, ax=left, label="velocity (m/s)")
    left.set(title="first arrivals (ms)", xlabel="x (m)", ylabel="depth (m)")
    image = right.imshow(rays.to_dense().sum(0).reshape(48, 48).numpy(), extent=grid.extent, cmap="magma")
    figure.colorbar(image, ax=right, label="length in the cell (m)")
    right.set(title="three straight rays", xlabel="x (m)")
    figure.savefig(path, dpi=120)


def main() -> None:
    assert __doc__ is not None
    bench = Benchmark(
        "seismic_checks", __doc__, {"--figure": {"type": Path, "default": None, "help": "draw rays and times"}}
    )
    seeds = range(1 if bench.fast else 3)
    bench.add("eikonal_gradient", max(gradient_error(s) for s in seeds), "", note="against central differences")
    bench.add("ray_error", ray_error(), "", note="against clipping every ray to every cell")
    with tempfile.TemporaryDirectory() as folder:
        bench.add("segy_roundtrip", float(roundtrip(Path(folder))), "", note="2-D and 3-D, IEEE and IBM")
    known_medium(bench)
    if bench.args.figure is not None:
        draw(bench.args.figure)
    bench.finish()


if __name__ == "__main__":
    main()
