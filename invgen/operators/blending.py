r"""Simultaneous sources: shots fired before the last one is recorded, added up with their firing times.

Shot s of a receiver fires t_s seconds after its group of shots starts recording:

    d_g(t) = Σ_{s in group g} m_s(t − t_s),

delays of whole samples by moving, the rest by a phase e^(−2πi f τ) in the Fourier domain (sinc interpolation with periodic
ends, one zero sample added). All shots in one group and a long record is *continuous* blending; several short groups
are *group* blending (neighbouring shots) and *half* blending (distant ones). Random (dithered) firing times make the
other shots incoherent in a common-receiver gather: that is what a prior on such gathers tells apart.

References: Berkhout 2008, The Leading Edge 27, 924 (blended acquisition); Abma & Yan 2009, SEG Expanded Abstracts (group);
`pylops.waveeqprocessing.BlendingContinuous`, `BlendingGroup`, `BlendingHalf` have the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from invgen.contracts import LinearOperator
from invgen.grid import Grid
from invgen.operators._casts import Casts

__all__ = ["Blend"]


class Blend(LinearOperator):
    r"""Blended records of common-receiver gathers: `(n_receivers, nt, n_shots)` to `(n_receivers, n_total, n_groups)`.

    A common-receiver gather is an image with time downwards and the shots side by side; receivers are its channels. Traces
    that are missing or dead are taken out after the blending, by `Mask(recorded) @ Blend(…)`.

    Args:
        shape: `(n_receivers, nt, n_shots)`.
        times: `(n_shots,)` firing times in s after the start of the record of the shot's group, ≥ 0.
        dt: sampling interval in s.
        groups: `(n_shots,)` whole numbers, the record each shot belongs to; None: all in one, continuous recording.
        n_total: samples of a record; by default enough for the last shot. `BlendingContinuous` takes
            ⌊max(times)/dt⌋ + nt + 1, which is the default here.
        circular: records are nt samples long and what runs out at the end comes in at the start, as in `BlendingGroup`
            and `BlendingHalf`. That energy is in no real record; times may then be negative.
        model_grid: grid of the model.

    Raises:
        ValueError: one time for each shot is missing, negative times or records that end before the last shot does,
            times that look like samples or ms (a record 20 times longer than all shots one after the other).

    Cost: one FFT of nt + 1 samples a trace and one addition; `solve` is conjugate gradients.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        times: Tensor | np.ndarray | list[float],
        dt: float,
        *,
        groups: Tensor | np.ndarray | list[int] | None = None,
        n_total: int | None = None,
        circular: bool = False,
        model_grid: Grid | None = None,
    ) -> None:
        if len(shape) != 3:
            raise ValueError(
                f"Blend needs the shape (n_receivers, nt, n_shots), got {tuple(shape)}; write (1, nt, n_shots)."
            )
        receivers, nt, shots = shape
        fired = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
        if tuple(fired.shape) != (shots,) or not bool(torch.isfinite(fired).all()):
            raise ValueError(
                f"Blend needs one finite firing time a shot, ({shots},), got a tensor of shape {tuple(fired.shape)}."
            )
        if not (math.isfinite(dt) and dt > 0):
            raise ValueError(f"The sampling interval must be positive, got dt = {dt}.")
        member = (
            torch.zeros(shots, dtype=torch.long) if groups is None else torch.as_tensor(groups).detach().cpu().long()
        )
        if tuple(member.shape) != (shots,) or int(member.min()) < 0 or len(member.unique()) != int(member.max()) + 1:
            raise ValueError(
                f"groups numbers the record of each of the {shots} shots, 0, 1, … without gaps, got {member.tolist()}."
            )
        if circular:
            n_total = nt if n_total is None else n_total
            if n_total != nt:
                raise ValueError(f"Circular records have the {nt} samples of a shot, not {n_total}; leave n_total out.")
            whole, part = torch.zeros(shots, dtype=torch.long), fired
        else:
            if float(fired.min()) < 0:
                raise ValueError(
                    f"The first shot fires at {float(fired.min()):g} s, before the record starts; subtract the earliest time of each group."
                )
            whole = torch.floor(fired / dt).long()
            part = (fired / dt - whole) * dt
            needed = int(whole.max()) + nt + 1
            n_total = needed if n_total is None else n_total
            if n_total < needed:
                raise ValueError(f"A record of {n_total} samples ends before the last shot does; it needs {needed}.")
            if needed > 20 * (nt + 1) * shots:
                raise ValueError(
                    f"With dt = {dt:g} s the record has {needed} samples for {shots} shots of {nt}: times look like samples or ms, give s."
                )
        super().__init__((receivers, nt, shots), (receivers, n_total, int(member.max()) + 1), model_grid=model_grid)
        self.circular, self.dt = circular, float(dt)
        length = nt if circular else nt + 1
        frequency = torch.fft.rfftfreq(length, dt, dtype=torch.float64)
        # sample k of shot s goes to sample whole + k of its record
        place = member[:, None] * n_total + whole[:, None] + torch.arange(length)
        self.register_buffer("firing_times", fired)
        self.register_buffer("_phase", torch.polar(torch.ones(()).double(), -2 * math.pi * part[:, None] * frequency))
        self.register_buffer("_place", place.flatten())
        self.moved_only = not bool(part.any())
        self._casts = Casts()

    firing_times: Tensor
    _phase: Tensor
    _place: Tensor

    @classmethod
    def examples(cls) -> list[Any]:
        return [
            cls((2, 6, 3), [0.0, 0.013, 0.022], 0.004),
            cls((1, 5, 4), [0.0, 0.006, 0.0, 0.011], 0.004, groups=[0, 0, 1, 1]),
            cls((1, 6, 2), [-0.003, 0.005], 0.004, circular=True),
        ]

    @classmethod
    def in_groups(
        cls, shape: tuple[int, int, int], times: Tensor | np.ndarray, dt: float, *, half: bool = False, **options: Any
    ) -> Blend:
        """Group or half blending from PyLops' table of times.

        Args:
            shape: as of the class. times: `(group_size, n_groups)`, row j the j-th shot of every group.
            half: False, group i holds the neighbouring shots i·group_size + j (`BlendingGroup`); True, it holds the
                distant shots j·n_groups + i (`BlendingHalf`).
            options: of the class; `circular=True` for PyLops' numbers.
        """
        table = torch.as_tensor(times, dtype=torch.float64)
        if table.ndim != 2 or table.numel() != shape[-1]:
            raise ValueError(
                f"times is (group_size, n_groups) for {shape[-1]} shots together, got {tuple(table.shape)}."
            )
        size, n = table.shape
        index = torch.arange(n).expand(size, n)
        table, index = (table, index) if half else (table.mT, index.mT)
        return cls(shape, table.flatten(), dt, groups=index.flatten(), **options)

    def _shift(self, x: Tensor, conjugate: bool) -> Tensor:
        """The part of a sample, `(…, shots, length)`: a real filter, whose transpose has the conjugate spectrum."""
        phase = self._casts(
            "phase*" if conjugate else "phase",
            x,
            lambda: self._phase.conj().resolve_conj() if conjugate else self._phase,
        )
        return torch.fft.irfft(torch.fft.rfft(x) * phase, n=x.shape[-1])

    def _index(self, like: Tensor) -> Tensor:
        return self._casts.once(f"place {like.device}", lambda: self._place.to(like.device))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self.forward(x.real), self.forward(x.imag))
        receivers, n_total, n_groups = self.data_shape
        shots = x.transpose(-1, -2)
        shots = shots if self.circular else pad(shots, (0, 1))
        shots = shots if self.moved_only else self._shift(shots, False)
        record = x.new_zeros(x.shape[0], receivers, n_groups * n_total).index_add(-1, self._index(x), shots.flatten(-2))
        return record.reshape(x.shape[0], receivers, n_groups, n_total).transpose(-1, -2)

    def adjoint(self, d: Tensor) -> Tensor:
        """Pseudo-deblending: each shot cut out of the record at its firing time, the others still in it."""
        return self._cut(d)

    def _cut(self, d: Tensor) -> Tensor:
        if d.is_complex():
            return torch.complex(self._cut(d.real), self._cut(d.imag))
        receivers, nt, n_shots = self.model_shape
        record = d.transpose(-1, -2).reshape(d.shape[0], receivers, -1)
        shots = record[..., self._index(d)].reshape(d.shape[0], receivers, n_shots, -1)
        shots = shots if self.moved_only else self._shift(shots, True)
        return shots[..., :nt].transpose(-1, -2)
