r"""Lens models in the COOLEST standard (Galan et al. 2023, JOSS 8, 5567): one JSON file, conventions of its own.

| here | COOLEST | |
|---|---|---|
| `angle`, radians from +x | `phi` = position angle in degrees from north to east, in (−90, 90] | +y is north without a frame |
| `center_x`, `center_y`, arcsec in the image's axes | `center_x` to the west, `center_y` to the north, arcsec | |
| `einstein_radius`, `axis_ratio` | `theta_E`, `q`: the same, (2 − t)/2 (θ_E / √(q x² + y²/q))^t | |
| `slope` t | `gamma` = t + 1 | PEMD |
| `gamma_1`, `gamma_2` | `gamma_ext` = √(γ₁² + γ₂²), `phi_ext` of the direction ½ atan2(γ₂, γ₁) | origin at (0, 0) |
| `scale_radius`, `kappa_s` | `r_s`, `rho_c` = κ_s Σ_cr / r_s | Σ_cr must be given; the standard names no unit for it |

Posterior statistics are those of the draws *in COOLEST's parameters*: the median of γ_ext is not the root of the squared
medians. Angles know no beginning: draws are unrolled around their mean direction (of 2φ), and the whole set of numbers is
moved by 180° so that the median lies in (−90, 90]; percentiles may reach past it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invgen.checkpoints import atomic

__all__ = ["CoolestProfile", "read_coolest", "write_coolest"]

Array = np.ndarray
_UNROTATED = ((-1.0, 0.0), (0.0, 1.0))  # x to the west, y to the north
_ANGLES = ("phi", "phi_ext")
_KNOWN = ("SIE", "EPL", "SIS", "NFW", "ExternalShear")


@dataclass(frozen=True)
class CoolestProfile:
    """One mass profile read back, in the conventions of this package.

    Attributes:
        type: as COOLEST calls it: SIE, PEMD, NFW, ExternalShear. name, redshift: of the galaxy or field it belongs to.
        parameters: named as the lens models here take them, e.g. `SIE(**profile.parameters)`. An NFW keeps `rho_c` and
            gets no `kappa_s` unless the critical density is given.
        stats: COOLEST's own parameter -> mean, median, percentile_16th, percentile_84th, where the file has them.
    """

    type: str
    name: str
    redshift: float | None
    parameters: dict[str, float]
    stats: dict[str, dict[str, float]] = field(default_factory=dict)


def write_coolest(
    path: str | Path,
    lens: Any,
    theta: Mapping[str, Any] | None = None,
    *,
    weights: Any = None,
    redshifts: tuple[float | None, float | None] = (None, None),
    like: Any = None,
    critical_density: float | None = None,
    cosmology: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write a lens model, with the posterior of its free parameters, as a COOLEST template.

    Args:
        path: a .json file; its folder is created. COOLEST's own reader wants the path without the suffix.
        lens: `SIE`, `EPL`, `SIS`, `NFW`, `ExternalShear` or a sum; or plain dictionaries {"type": "SIE",
            "einstein_radius": 1.2, …}, one or a list.
        theta: name -> draws (any shape, flattened) of the parameters that were free, named as the lens names them:
            `posterior.theta`. Those are written as free, with mean, median and 16 and 84 % quantiles, and their medians
            as the point estimate; all others as fixed.
        weights: of the draws. redshifts: of lens and source, null in the file where None.
        like: an `Observation` or `SkyFrame`, whose north and parity turn angles and positions to the sky, and whose
            pixel grid is written; without one +y is north and +x is west.
        critical_density: Σ_cr, mass per arcsec², for an NFW. cosmology: H0, Om0, astropy_name. meta: any JSON.

    Raises:
        ValueError: a lens the standard has no profile for (a point mass), draws of parameters the lens has not, that are
            not finite or of different numbers; an NFW without `critical_density`.
    """
    parts = _parts(lens)
    names = _shared_names(parts)
    draws = {k: np.asarray(v, dtype=np.float64).reshape(-1) for k, v in (theta or {}).items()}
    every = {shared for taken in names for shared in taken.values()}
    if unknown := sorted(set(draws) - every):
        raise ValueError(f"The lens has no parameter {', '.join(unknown)}; it has {', '.join(sorted(every))}.")
    sizes = {len(v) for v in draws.values()}
    if len(sizes) > 1 or 0 in sizes or any(not np.isfinite(v).all() for v in draws.values()):
        raise ValueError(
            f"Draws of lens parameters must be finite and as many for each, got { {k: len(v) for k, v in draws.items()} }."
        )
    count = sizes.pop() if sizes else 1
    w = np.full(count, 1 / count) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if len(w) != count or (w < 0).any() or not w.sum() > 0:
        raise ValueError(f"{len(w)} weights were given for {count} draws; give one non-negative number each.")
    w = w / w.sum()
    matrix = np.array(_matrix(like))
    galaxies: list[dict[str, Any]] = []
    fields: list[dict[str, Any]] = []
    for (kind, own, label), taken in zip(parts, names, strict=True):
        values = {k: draws.get(taken[k], np.full(count, v)) for k, v in own.items()}
        free = {k for k in own if taken[k] in draws}
        profile = _profile(kind, values, free, w, matrix, critical_density)
        entity = {"name": label, "redshift": redshifts[0], "mass_model": [profile]}
        if kind == "ExternalShear":
            fields.append({"type": "MassField", **entity})
        else:
            galaxies.append({"type": "Galaxy", "light_model": [], **entity})
    source: dict[str, Any] = {
        "type": "Galaxy",
        "name": "source",
        "redshift": redshifts[1],
        "light_model": [],
        "mass_model": [],
    }
    content = {
        "standard": "COOLEST",
        "mode": "MAP",
        "coordinates_origin": _origin(like),
        "cosmology": dict(cosmology) if cosmology else None,
        "lensing_entities": [*fields, *galaxies, source],
        "meta": {"modeling_code": "invgen", **(meta or {})},
        **_pixels(like),
    }
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"A COOLEST template is a .json file, got the name {path.name}.")
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_coolest(path: str | Path, *, like: Any = None, critical_density: float | None = None) -> list[CoolestProfile]:
    """The mass profiles of a COOLEST template at their point estimates, in the conventions of this package.

    Args:
        path: the plain JSON template (files ending in _pyAPI.json hold Python objects and are not read).
        like, critical_density: as in `write_coolest`.

    Raises:
        ValueError: not a COOLEST template, a parameter without a point estimate, a profile that is not known here.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        standard = content.get("standard") if isinstance(content, dict) else None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give the plain COOLEST template.") from error
    if standard != "COOLEST" or not isinstance(content.get("lensing_entities"), list):
        raise ValueError(
            f'{path} is JSON but no plain COOLEST template: it has no "standard": "COOLEST" with entities.'
        )
    matrix = np.array(_matrix(like))
    out = []
    for entity in content["lensing_entities"]:
        for profile in entity.get("mass_model", []):
            given = profile["parameters"]
            values = {k: v.get("point_estimate", {}).get("value") for k, v in given.items()}
            if missing := [k for k, v in values.items() if not isinstance(v, (int, float))]:
                raise ValueError(
                    f"The {profile['type']} of {entity['name']!r} in {path} has no point estimate of {', '.join(missing)}."
                )
            stats = {
                k: v["posterior_stats"]
                for k, v in given.items()
                if (v.get("posterior_stats") or {}).get("mean") is not None
            }
            parameters = _own(profile["type"], {k: float(v) for k, v in values.items()}, matrix, critical_density)
            out.append(CoolestProfile(profile["type"], entity["name"], entity.get("redshift"), parameters, stats))
    return out


def _parts(lens: Any) -> list[tuple[str, dict[str, float], str]]:
    """(type, parameters, name) of every component."""
    given: Sequence[Any] = lens if isinstance(lens, (list, tuple)) else getattr(lens, "parts", (lens,))
    out = []
    for part in given:
        if isinstance(part, Mapping):
            kind = str(part.get("type"))
            own = {k: float(v) for k, v in part.items() if k not in ("type", "name")}
            name = str(part.get("name", kind.lower()))
        else:
            kind, own, name = type(part).__name__, dict(part.parameters), str(part.name)
        if kind not in _KNOWN:
            raise ValueError(
                f"COOLEST has no profile for a {kind} lens; it takes {', '.join(_KNOWN)} and sums of them."
            )
        out.append((kind, own, name))
    return out


def _shared_names(parts: list[tuple[str, dict[str, float], str]]) -> list[dict[str, str]]:
    """For each component: its parameter -> that of the sum, which is NAME_parameter where several have it."""
    every = [k for _, own, _ in parts for k in own]
    return [{k: k if every.count(k) == 1 else f"{name}_{k}" for k in own} for _, own, name in parts]


def _profile(
    kind: str, v: dict[str, Array], free: set[str], w: Array, matrix: Array, critical: float | None
) -> dict[str, Any]:
    zero = np.zeros_like(w)
    if kind == "ExternalShear":
        strength = np.hypot(v["gamma_1"], v["gamma_2"])
        direction = _position_angle(0.5 * np.arctan2(v["gamma_2"], v["gamma_1"]), matrix)
        sources = {"gamma_1", "gamma_2"}
        out = {"gamma_ext": (strength, sources), "phi_ext": (direction, sources)}
        return {
            "type": "ExternalShear",
            "parameters": {k: _parameter(k, a, bool(s & free), w) for k, (a, s) in out.items()},
        }
    x, y = v.get("center_x", zero), v.get("center_y", zero)
    west, north = -(matrix[0, 0] * x + matrix[0, 1] * y), matrix[1, 0] * x + matrix[1, 1] * y
    centre = {"center_x", "center_y"}
    angle = _position_angle(v.get("angle", zero), matrix)
    q = v.get("axis_ratio", zero + 1)
    out = {"center_x": (west, centre), "center_y": (north, centre), "q": (q, {"axis_ratio"}), "phi": (angle, {"angle"})}
    if kind == "NFW":
        if critical is None:
            raise ValueError(
                "COOLEST states an NFW halo by its density ρ_c = κ_s Σ_cr / r_s; give critical_density=, mass per arcsec²."
            )
        out["r_s"] = (v["scale_radius"], {"scale_radius"})
        out["rho_c"] = (v["kappa_s"] * critical / v["scale_radius"], {"kappa_s", "scale_radius"})
    else:
        out["theta_E"] = (v["einstein_radius"], {"einstein_radius"})
    if kind == "EPL":
        out["gamma"] = (v["slope"] + 1, {"slope"})
    name = {"EPL": "PEMD", "SIS": "SIE"}.get(kind, kind)
    return {"type": name, "parameters": {k: _parameter(k, a, bool(s & free), w) for k, (a, s) in out.items()}}


def _position_angle(angle: Array, matrix: Array) -> Array:
    """Degrees from north to east of a direction given in radians from +x, in (−90, 90]."""
    east = matrix[0, 0] * np.cos(angle) + matrix[0, 1] * np.sin(angle)
    north = matrix[1, 0] * np.cos(angle) + matrix[1, 1] * np.sin(angle)
    return _wrapped(np.degrees(np.arctan2(east, north)))


def _wrapped(degrees: Any) -> Any:
    return 90 - np.remainder(90 - np.asarray(degrees), 180)


def _parameter(name: str, values: Array, free: bool, w: Array) -> dict[str, Any]:
    stats: dict[str, float | None] = dict.fromkeys(("mean", "median", "percentile_16th", "percentile_84th"))
    if not free:
        point = float(values[0])
    else:
        if name in _ANGLES:
            mean = 0.5 * np.degrees(np.angle((w * np.exp(2j * np.radians(values))).sum()))
            values = mean + _wrapped(values - mean)
        order = np.argsort(values)
        steps = np.cumsum(w[order]) - 0.5 * w[order]
        low, middle, high = (float(np.interp(p, steps, values[order])) for p in (0.16, 0.5, 0.84))
        shift = float(_wrapped(middle)) - middle if name in _ANGLES else 0.0
        point = middle + shift
        stats = {
            "mean": float((w * values).sum()) + shift,
            "median": point,
            "percentile_16th": low + shift,
            "percentile_84th": high + shift,
        }
    return {"fixed": not free, "point_estimate": {"value": point}, "posterior_stats": stats, "prior": {"type": None}}


def _own(kind: str, v: dict[str, float], matrix: Array, critical: float | None) -> dict[str, float]:
    """COOLEST's parameters as ours."""
    inverse = np.linalg.inv(matrix)

    def angle(phi: float) -> float:
        x, y = inverse @ (math.sin(math.radians(phi)), math.cos(math.radians(phi)))
        return math.atan2(y, x) % math.pi

    if kind == "ExternalShear":
        a = 2 * angle(v["phi_ext"])
        return {"gamma_1": v["gamma_ext"] * math.cos(a), "gamma_2": v["gamma_ext"] * math.sin(a)}
    if kind not in ("SIE", "PEMD", "NFW"):
        raise ValueError(f"The profile {kind} is not known here; SIE, PEMD, NFW and ExternalShear are.")
    x, y = inverse @ (-v["center_x"], v["center_y"])
    out = {"center_x": float(x), "center_y": float(y)}
    if kind == "NFW":
        if abs(v.get("q", 1.0) - 1) > 1e-9:
            raise ValueError(f"The NFW halo has q = {v['q']:g}, only spherical ones are known here.")
        out |= {"scale_radius": v["r_s"]}
        return out | ({"rho_c": v["rho_c"]} if critical is None else {"kappa_s": v["rho_c"] * v["r_s"] / critical})
    out |= {"einstein_radius": v["theta_E"], "axis_ratio": v["q"], "angle": angle(v["phi"])}
    return out | ({"slope": v["gamma"] - 1} if kind == "PEMD" else {})


def _matrix(like: Any) -> Any:
    frame = getattr(like, "frame", like)
    return getattr(frame, "matrix", None) or _UNROTATED


def _origin(like: Any) -> dict[str, Any]:
    frame = getattr(like, "frame", like)
    if getattr(frame, "sky", None) is None:
        return {"ra": None, "dec": None}
    # grid zero: the reference point less its own offset, in the tangent plane
    m, (px, py) = np.array(frame.matrix), frame.point
    xi, eta = m @ (-px, -py) / 3600
    dec = frame.sky[1] + eta
    return {"ra": f"{frame.sky[0] + xi / math.cos(math.radians(frame.sky[1])):.8f}d", "dec": f"{dec:+.8f}d"}


def _pixels(like: Any) -> dict[str, Any]:
    """Observation and instrument as far as they are known."""
    grid = getattr(like, "grid", None)
    ny, nx = grid.shape if grid is not None else (0, 0)
    dy, dx = grid.spacing if grid is not None else (0.0, 0.0)
    oy, ox = grid.origin if grid is not None else (0.0, 0.0)
    view = {
        "field_of_view_x": [ox - 0.5 * dx, ox + (nx - 0.5) * dx] if nx else [0, 0],
        "field_of_view_y": [oy - 0.5 * dy, oy + (ny - 0.5) * dy] if ny else [0, 0],
        "num_pix_x": nx,
        "num_pix_y": ny,
        "fits_file": {"path": None},
    }
    times = dict.fromkeys(("exposure_time", "mag_sky_brightness", "mag_zero_point"))
    return {
        "observation": {**times, "noise": {"type": None}, "pixels": view},
        "instrument": {
            "name": "",
            "band": "",
            "pixel_size": dx,
            "readout_noise": None,
            "psf": {"type": None, "description": None},
        },
    }
