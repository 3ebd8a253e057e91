"""GSTools' and gstlearn's fields, as `random_field.py` compares with them; run by it with the interpreter of `make peers`.

python peers_fields.py OUT.json SIZE LENGTH

Matérn, ν = 1, correlation √2 r K₁(√2 r) with r = lag / LENGTH, on SIZE × SIZE nodes. OUT.json: CPU seconds a field (one
thread), of the faster of two runs, and the lag-LENGTH correlation of what was drawn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import k1


def correlation(fields: np.ndarray, lag: int) -> float:
    """Of pairs along the last axis, the mean being zero."""
    return float((fields[..., lag:] * fields[..., :-lag]).mean() / np.square(fields).mean())


def best(function: Callable[[], np.ndarray], fields: int) -> tuple[float, np.ndarray]:
    """CPU seconds a field, the faster of two runs, and the fields."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        out = function()
        seconds.append((time.process_time() - start) / fields)
    return min(seconds), out


def gstools(size: int, length: float) -> dict[str, Any]:
    """SRF by 1000 random modes on the structured grid."""
    import gstools as gs

    target = float(np.sqrt(2) * k1(np.sqrt(2)))
    scale = 1.0
    for _ in range(60):  # its Matérn has another scale: the one with the same correlation at one length
        off = float(gs.Matern(dim=2, var=1, len_scale=scale, nu=1).correlation(length)) - target
        scale *= 1 - 0.5 * off / target
    model = gs.Matern(dim=2, var=1, len_scale=scale, nu=1)
    axis = np.arange(size, dtype=float)
    field = gs.SRF(model, mode_no=1000, seed=1)
    seconds, out = best(lambda: np.asarray(field.structured([axis, axis])), 1)
    return {"gstools_srf": seconds, "gstools_correlation": correlation(out, int(length))}


def gstlearn(size: int, length: float) -> dict[str, Any]:
    """SPDE by Chebyshev polynomials, FFT and turning bands, alone and over 8 fields."""
    import gstlearn as gl

    gl.defineDefaultSpace(gl.ESpaceType.RN, 2)
    reach = length / np.sqrt(2) * np.sqrt(12.0)  # its practical range of the scale
    model = gl.Model.createFromParam(gl.ECov.MATERN, reach, 1.0, 1.0)

    def run(call: Callable[[Any, int], Any], n: int) -> Callable[[], np.ndarray]:
        def draw() -> np.ndarray:
            grid = gl.DbGrid.create([size, size], [1.0, 1.0])
            before = set(grid.getAllNames())
            call(grid, n)
            names = [k for k in grid.getAllNames() if k not in before]
            return np.array([grid.getColumn(k) for k in names]).reshape(n, size, size)

        return draw

    calls: dict[str, Callable[[Any, int], Any]] = {
        "gstlearn_spde": lambda g, n: gl.simulateSPDE(None, g, model, n, 0),
        "gstlearn_fft": lambda g, n: gl.simuFFT(None, g, model, gl.SimuFFTParam(), n),
        "gstlearn_bands": lambda g, n: gl.simtub(None, g, model, None, n, 43431, 100),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        for n in (1, 8):
            try:
                seconds, out = best(run(call, n), n)
            except Exception as error:  # the signatures change between wheels
                found[f"{name}_error"] = str(error).strip().splitlines()[-1][:200]
                break
            found[f"{name}_{n}"] = seconds
            found[f"{name}_correlation"] = correlation(out, int(length))
    return found


def main() -> None:
    out, size, length = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    found: dict[str, Any] = {}
    for part in (gstools, gstlearn):
        try:
            found |= part(size, length)
        except ImportError as error:
            found[f"{part.__name__}_error"] = str(error)
    found["versions"] = {p: metadata.version(p) for p in ("gstools", "gstlearn") if f"{p}_error" not in found}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
