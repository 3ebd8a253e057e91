"""Compose docs/images/demo.png from the files that `make demo` leaves: `python docs/make_picture.py [demo]`."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import numpy as np

from invgen.demo import demo_problem
from invgen.posterior import Posterior
from invgen.report.figures import Panel, panels


def main(folder: str = "demo") -> None:
    """Truth, data, posterior mean, standard deviation and two samples."""
    posterior = Posterior.load(Path(folder) / "posterior.nc")
    truth = np.load(Path(folder) / "truth.npy")[0]
    problem, _ = demo_problem()
    data = problem.terms[0].data[0, 0].numpy()
    mean, std = posterior.mean()[0, 0].numpy(), posterior.std()[0, 0].numpy()
    first, second = posterior.samples[0, 0, :2, 0].numpy()
    low, high = (float(v) for v in np.percentile(np.stack([truth, mean, first, second]), (0.2, 99.8)))
    reach = float(np.percentile(np.abs(data), 99.7))
    grid = posterior.grid

    def model(title: str, values: np.ndarray) -> Panel:
        return Panel(title, values, "viridis", low, high, "log impedance", grid)

    png = panels(
        [
            model("unknown truth", truth),
            Panel("seismic data d", data, "gray", -reach, reach, "amplitude", grid),
            model("posterior mean", mean),
            model("posterior sample 1", first),
            model("posterior sample 2", second),
            Panel("posterior standard deviation", std, "magma", 0.0, float(std.max()), "log impedance", grid),
        ],
        columns=3,
    )
    out = Path(__file__).parent / "images" / "demo.png"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(base64.b64decode(png))


if __name__ == "__main__":
    main(*sys.argv[1:])
