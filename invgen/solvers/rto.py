"""Randomise, then optimise: exact where the problem is linear-Gaussian, and only there under this name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from invgen.contracts import HasGaussian, Solver
from invgen.solvers._perturb import check_linear, perturbed

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["RandomizeThenOptimize"]


@dataclass(frozen=True)
class RandomizeThenOptimize(Solver):
    """Perturb, then optimise: û ~ N(μ, C), d̂ ~ N(d, R), u = argmin ½|d̂ − A u|²_R + ½|u − û|²_C.

    Targets p(x | d) exactly for a linear-Gaussian problem (Gaussian prior, affine transform) in which data *and* prior
    mean are perturbed and the minimum is reached; independent draws. Anything else is refused: there the method needs
    weights or a correction, and without them it is the approximation RandomizedMAP.

    Args:
        method: how the minimum is reached. "cg" takes `operator.solve`, conjugate gradients for all draws at once
            where that is not direct; "auto" replaces an iterative one by one Cholesky factorisation of R + A C Aᴴ for
            the whole run, up to `limit` data.
        limit: data that "auto" factorises for.
        rtol: relative tolerance of the solve; the operator's default when omitted.
        max_iter: iterations at the most; draws that stop earlier are reported in `stats["converged"]`,
            `stats["residual"]` and a warning.

    Cost: one `operator.solve` a draw (a forward and an adjoint an iteration where it is not direct), or n_data forwards
    and adjoints and n_data³/3 operations a run, and then three products a draw.
    Reference: Bardsley, Solonen, Haario & Laine, SIAM J. Sci. Comput. 36(4), A1895-A1910, 2014, the linear case.
    """

    needs: ClassVar[tuple[type, ...]] = (HasGaussian,)
    kind: ClassVar[str] = "exact"

    rtol: float | None = None
    max_iter: int = 2000
    method: str = "auto"
    limit: int = 1024

    def __post_init__(self) -> None:
        if self.method not in ("auto", "cg"):
            raise ValueError(f"The method of RandomizeThenOptimize is 'auto' or 'cg', got {self.method!r}.")

    @classmethod
    def examples(cls) -> list[RandomizeThenOptimize]:
        """Converged far beyond Monte-Carlo error."""
        return [cls(rtol=1e-13), cls(rtol=1e-13, method="cg")]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """The defaults."""
        return {"": cls()}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_linear(
            self,
            problem,
            "elsewhere the method is RandomizedMAP, an approximation; use it or a sampler for non-linear problems",
        )

    def num_steps(self, problem: InverseProblem) -> int:
        return 1

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        mean = problem.prior.mean_u.to(device=rng.device, dtype=problem.dtype)
        return {"x": problem.prior.transform(mean.expand(len(rng), *problem.model_shape))}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        limit = self.limit if self.method == "auto" else 0
        return perturbed(problem, rng, rtol=self.rtol, max_iter=self.max_iter, dense_limit=limit)
