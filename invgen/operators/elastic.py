r"""Elastic models in the units they are in: logarithms of velocities, impedances and density, and mixed units by name.

Linearised amplitudes do not see units (D removes the constant that a unit adds to a logarithm), but a prior, a background
and a well log do, and a model that is *not* a logarithm is wrong by a factor of thousands. What a channel holds is told by
its range; rocks and sea water have

    vp 1.4–8.5 km/s,    vs 0.1–5 km/s,    ρ 0.95–4 g/cm³,    Ip 1.4–30 and Is 0.1–18 km/s · g/cm³
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["check_elastic_model", "elastic_logarithms"]

# kind -> (low, high) in km/s, g/cm³ and their product
RANGES = {"vp": (1.4, 8.5), "vs": (0.1, 5.0), "rho": (0.95, 4.0), "ip": (1.4, 30.0), "is": (0.1, 18.0)}
UNITS = {
    "vp": {"km/s": 1.0, "m/s": 1e3, "ft/s": 3280.84},
    "rho": {"g/cm³": 1.0, "kg/m³": 1e3},
    "ip": {"km/s·g/cm³": 1.0, "m/s·g/cm³": 1e3, "m/s·kg/m³": 1e6, "ft/s·g/cm³": 3280.84},
}
UNITS["vs"], UNITS["is"] = UNITS["vp"], UNITS["ip"]
SI = {"m/s": "SI", "kg/m³": "SI", "m/s·kg/m³": "SI"}
PARAMETERS = {"velocities": ("vp", "vs", "rho"), "impedances": ("ip", "is", "rho")}


def _readings(kind: str, values: Tensor, log: bool) -> list[str]:
    """Units in which the bulk of the values is a rock."""
    low, high = RANGES[kind]
    q = torch.quantile(
        values.detach().to(torch.float64).flatten()[: 1 << 20], torch.tensor([0.02, 0.98], dtype=torch.float64)
    )
    bottom, top = (math.exp(min(float(v), 700.0)) if log else float(v) for v in q)
    return [unit for unit, factor in UNITS[kind].items() if low * factor <= bottom and top <= high * factor]


def check_elastic_model(model: Tensor, parameters: str = "velocities") -> tuple[str, str, str]:
    """The units of a model of logarithms, channel by channel; refuses what is no logarithm and what mixes units.

    Args:
        model: `(…, 3, nz, nx)`, (ln vp, ln vs, ln ρ) or (ln Ip, ln Is, ln ρ), physical (no background taken off).
        parameters: "velocities" or "impedances".

    Returns:
        the units, e.g. ("m/s", "m/s", "kg/m³").

    Raises:
        ValueError: values that are no logarithms of rocks but are rocks themselves (with what they look like); channels
            whose units differ or mix SI with km/s and g/cm³, by name; values that are neither.
    """
    kinds = PARAMETERS.get(parameters)
    if kinds is None:
        raise ValueError(f'parameters is "velocities" or "impedances", got {parameters!r}.')
    if model.ndim < 3 or model.shape[-3] != 3:
        raise ValueError(f"An elastic model is (…, 3, nz, nx), got {tuple(model.shape)}.")
    channels = [model.select(-3, k) for k in range(3)]
    if not bool(torch.isfinite(model).all()):
        raise ValueError("The elastic model holds NaN or infinite values; logarithms of zero, or gaps in a log?")
    logs = [_readings(k, c, True) for k, c in zip(kinds, channels, strict=True)]
    good = _consistent(logs)
    if good is not None:
        return good
    plain = [_readings(k, c, False) for k, c in zip(kinds, channels, strict=True)]
    if all(plain) and not all(logs):
        units = _consistent(plain) or tuple(p[0] for p in plain)
        said = ", ".join(f"{k} in {u}" for k, u in zip(kinds, units, strict=True))
        raise ValueError(
            f"The model is not in logarithms: it looks like {said}; take its logarithm, or compose the operator with Log()."
        )
    if all(logs):
        first = next((u for u in logs[0] if u in logs[1]), None)  # one unit for both velocities, where there is one
        named = (first or logs[0][0], first or logs[1][0], logs[2][0])
        said = ", ".join(f"{k} in {u}" for k, u in zip(kinds, named, strict=True))
        raise ValueError(f"The model mixes units: {said}; use m/s with kg/m³ or km/s with g/cm³ throughout.")
    odd = next(i for i in range(3) if not logs[i])
    q = torch.quantile(channels[odd].detach().to(torch.float64).flatten()[: 1 << 20], 0.5)
    raise ValueError(
        f"Channel {odd} should hold ln {kinds[odd]} but its median {float(q):.3g} is no rock in any of {', '.join(UNITS[kinds[odd]])}; "
        "check the order of the channels, or add the background if it was taken off."
    )


def _consistent(readings: list[list[str]]) -> tuple[str, str, str] | None:
    """The first choice of one unit a channel that mixes nothing: equal units of the first two, all SI or none."""
    for choice in itertools.product(readings[0], readings[1], readings[2]):
        if choice[0] == choice[1] and len({SI.get(u, "") for u in choice}) == 1:
            return choice
    return None


def elastic_logarithms(vp: Tensor, vs: Tensor, rho: Tensor, *, parameters: str = "velocities") -> Tensor:
    """(ln vp, ln vs, ln ρ), or (ln Ip, ln Is, ln ρ) with Ip = ρ vp and Is = ρ vs, after a look at the units.

    Args:
        vp, vs, rho: one shape `(…, nz, nx)`, physical values. parameters: "velocities" or "impedances".

    Returns:
        `(…, 3, nz, nx)` in the units given.

    Raises:
        ValueError: shapes that differ, values that are not positive (logarithms?), vs of vp and more, mixed units.
    """
    if not vp.shape == vs.shape == rho.shape:
        raise ValueError(
            f"vp, vs and rho need one shape, got {tuple(vp.shape)}, {tuple(vs.shape)} and {tuple(rho.shape)}."
        )
    for name, value in (("vp", vp), ("vs", vs), ("rho", rho)):
        if not bool((value > 0).all()):
            raise ValueError(
                f"{name} must be positive and finite, its smallest value is {float(value.min()):g}; fill gaps and fluids (vs) first."
            )
    if bool((vs >= vp).any()):
        share = float((vs >= vp).double().mean())
        raise ValueError(
            f"vs is not below vp in {share:.0%} of the samples: the two are in different units or exchanged."
        )
    velocities = torch.stack([vp.log(), vs.log(), rho.log()], dim=-3)
    check_elastic_model(velocities)
    if parameters == "velocities":
        return velocities
    if parameters != "impedances":
        raise ValueError(f'parameters is "velocities" or "impedances", got {parameters!r}.')
    density = velocities.select(-3, 2)
    return torch.stack([velocities.select(-3, 0) + density, velocities.select(-3, 1) + density, density], dim=-3)
