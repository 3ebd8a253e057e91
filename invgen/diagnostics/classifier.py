r"""Classifier two-sample test: can a network tell two samples apart?

The accuracy of a classifier on points it has not seen is ½ for samples of one law and 1 for samples that do not overlap
(Friedman 2003; Lopez-Paz & Oquab 2017). For equal numbers of points the best attainable accuracy is (1 + TV)/2 with the
total variation TV between the laws, so that an accuracy bounds TV from below.

`c2st(method="sbibm")` is the definition behind the published numbers of Lueckmann et al. (2021): both samples z-scored by
mean and sd of the first, scikit-learn's `MLPClassifier` (two hidden layers of 10·dim ReLU units, Adam, at most 10,000
epochs, random state 1), five shuffled folds, mean accuracy. `method="fast"` trains the five networks at once, in torch,
with larger batches, a falling step size and a fixed number of epochs: the same architecture and folds, another training.

References: Lopez-Paz & Oquab, Revisiting classifier two-sample tests, ICLR 2017, arXiv:1610.06545; Lueckmann, Boelts,
Greenberg, Gonçalves & Macke, Benchmarking simulation-based inference, AISTATS 2021, arXiv:2101.04653, appendix; Nadeau &
Bengio, Inference for the generalization error, Machine Learning 2003.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from invgen.diagnostics._arrays import Array, random_tensor, two_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassifierTest", "c2st"]


@dataclass(frozen=True, eq=False)
class ClassifierTest:
    """Accuracy of a classifier between two samples; `float(test)` is the accuracy.

    Attributes:
        accuracy: mean over folds; ½ for samples of one law. folds: of each, `(folds,)`.
        n_points: classified, each once. method: "sbibm" or "fast". level: α.
    """

    accuracy: float
    folds: np.ndarray
    n_points: int
    method: str
    level: float

    @property
    def p_value(self) -> float:
        """One-sided, from the normal law of the mean accuracy; approximate.

        Folds share training points, which inflates the variance 1/(4n) of n independent answers. Nadeau & Bengio (2003)
        put 1/k + n_test/n_train in the place of 1/k, a factor 1 + k/(k − 1) for k folds: at five folds the sd grows 1.5
        times (simulated null: 1.1 to 1.5).
        """
        k = len(self.folds)
        sd = math.sqrt((1 + k / (k - 1)) / (4 * self.n_points))
        return float(stats.norm.sf((self.accuracy - 0.5) / sd))

    @property
    def passed(self) -> bool:
        """The classifier cannot tell the samples apart."""
        return self.p_value > self.level

    def __float__(self) -> float:
        return self.accuracy

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy of each fold with the range of guessing."""
        from invgen.diagnostics import figures

        return figures.classifier_figure(self, ax)


def c2st(
    x: Array, y: Array, *, method: str = "fast", folds: int = 5, epochs: int = 60, level: float = 0.01, seed: int = 1
) -> ClassifierTest:
    """Classifier two-sample test between two samples.

    Args:
        x: `(n, *shape)`, the reference; both samples are z-scored by its mean and sd. y: `(m, *shape)`; equal numbers of
            points make ½ the accuracy of guessing.
        method: "sbibm" for published numbers, "fast" otherwise.
        folds: of cross-validation. epochs: of "fast". level: α. seed: of folds, weights and batches (1 in sbibm).

    Returns:
        `ClassifierTest`.

    Raises:
        ValueError: shapes that do not fit, NaN, an unknown method, fewer points than folds.
        ImportError: "sbibm" without scikit-learn.

    Cost: "sbibm" one network a fold, up to 10,000 epochs with batches of 200: minutes for 2 × 10,000 points; "fast" all
    folds in one network of batched matrix products, `epochs` epochs.
    References: module docstring.
    """
    a, b = two_samples(x, y)
    if method not in ("sbibm", "fast"):
        raise ValueError(f"The method of c2st is 'sbibm' or 'fast', got {method!r}.")
    if len(a) + len(b) < 2 * folds or folds < 2:
        raise ValueError(f"{len(a) + len(b)} points do not fill {folds} folds; take more points.")
    centre, sd = a.mean(0), a.std(0)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    points = (torch.cat([a, b]) - centre) / sd
    labels = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    if method == "sbibm":
        scores = _scikit(points.double().cpu().numpy(), labels, folds, seed)
    else:
        scores = _torch(points.float(), labels, folds, epochs, seed)
    return ClassifierTest(float(scores.mean()), scores, len(labels), method, level)


def _scikit(points: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError(
            "c2st(method='sbibm') is defined by scikit-learn's classifier; install scikit-learn, or use method='fast'."
        ) from error
    width = 10 * points.shape[1]
    network = MLPClassifier(
        activation="relu", hidden_layer_sizes=(width, width), max_iter=10_000, solver="adam", random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cross_val_score(
            network, points, labels, cv=KFold(folds, shuffle=True, random_state=seed), scoring="accuracy"
        )


def _torch(points: Tensor, labels: np.ndarray, folds: int, epochs: int, seed: int) -> np.ndarray:
    """Accuracy of each fold, all networks trained together: weights `(folds, in, out)`."""
    rng = np.random.default_rng(seed)
    n, dim = points.shape
    width, device = 10 * dim, points.device
    part = np.array_split(rng.permutation(n), folds)
    train = [np.concatenate([p for j, p in enumerate(part) if j != k]) for k in range(folds)]
    size = min(len(t) for t in train)
    target = torch.from_numpy(labels).float().to(device)
    parameters = []
    for i, (before, after) in enumerate(((dim, width), (width, width), (width, 1))):
        weight = random_tensor([seed, i], (folds, before, after), points) * math.sqrt(2 / before)
        parameters += [weight.requires_grad_(True), torch.zeros(folds, 1, after, device=device, requires_grad=True)]

    def logits(inputs: Tensor) -> Tensor:
        W1, b1, W2, b2, W3, b3 = parameters
        hidden = torch.relu(torch.baddbmm(b1, inputs, W1))
        return torch.baddbmm(b3, torch.relu(torch.baddbmm(b2, hidden, W2)), W3)[..., 0]

    batch = max(min(200, size), size // 40)
    steps = epochs * (size // batch)
    optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99), fused=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.from_numpy(np.stack([rng.permutation(t)[:size] for t in train])).to(device)
            for start in range(0, size - batch + 1, batch):
                index = order[:, start : start + batch]
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(points[index]), target[index])
                optimizer.zero_grad(set_to_none=True)
                (loss * folds).backward()  # the networks share nothing: the sum of their losses
                optimizer.step()
                schedule.step()
    scores = []
    with torch.no_grad():
        longest = max(map(len, part))
        padded = torch.from_numpy(np.stack([np.resize(p, longest) for p in part])).to(device)
        right = (logits(points[padded]) > 0) == (target[padded] > 0.5)
        scores = [float(right[k, : len(p)].double().mean()) for k, p in enumerate(part)]
    return np.array(scores)
