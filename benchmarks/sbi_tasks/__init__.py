"""Four tasks of simulation-based inference with known posteriors, after their published definitions.

    from sbi_tasks import TASKS, references
    task = TASKS["two_moons"]
    problem = task.problem(observation)

Reference: Lueckmann, Boelts, Greenberg, Gonçalves & Macke, Benchmarking simulation-based inference, AISTATS 2021,
arXiv:2101.04653, appendix T.
"""

from sbi_tasks.gaussian_linear import GaussianLinear
from sbi_tasks.gaussian_mixture import GaussianMixture
from sbi_tasks.references import Reference, published_files, references
from sbi_tasks.slcp import SLCP
from sbi_tasks.task import Task
from sbi_tasks.two_moons import TwoMoons

__all__ = ["TASKS", "Reference", "Task", "published_files", "references"]

TASKS: dict[str, Task] = {t.name: t for t in (TwoMoons(), GaussianMixture(), SLCP(), GaussianLinear())}
