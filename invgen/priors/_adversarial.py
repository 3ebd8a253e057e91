"""What a generator without a density can be judged by: distances between its draws, held-out and training examples."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []


def sample_figures(
    made: Tensor, held_out: Tensor, train: Tensor | None = None, *, largest: int = 1024
) -> dict[str, float]:
    """Ratios of mean Euclidean distances, each 1 for draws from the law of the data.

    Args:
        made, held_out, train: `(n, *shape)` draws, held-out and training examples, in one set of coordinates.
        largest: examples used of each.

    Returns:
        "diversity": mean distance between two draws over that between two held-out examples; 0 for mode collapse.
        "precision_distance": from a draw to the nearest held-out example, over that from a held-out example to the
        nearest other one; above 1 for draws that look like nothing in the data.
        "recall_distance": from a held-out example to the nearest draw, over the same; above 1 for modes that are missing.
        "memorisation": from a draw to the nearest training example, over that from a held-out example to it; below 1
        for draws that are copies.
    """
    m = min(len(made), len(held_out), largest)
    if m < 2:
        return {}
    a, b = made[:m].flatten(1).double(), held_out[:m].flatten(1).double()
    own_a, own_b, across = torch.cdist(a, a), torch.cdist(b, b), torch.cdist(a, b)
    apart = ~torch.eye(m, dtype=torch.bool, device=a.device)
    # both sides look among m − 1 others, so that the nearest is as near for draws from the same law
    nearest = float(own_b.masked_fill(~apart, torch.inf).amin(1).mean())
    crossed = across.masked_fill(~apart, torch.inf)
    figures = {"diversity": float(own_a[apart].mean()) / max(float(own_b[apart].mean()), 1e-300)}
    if nearest > 0:  # facies may repeat themselves
        figures["precision_distance"] = float(crossed.amin(1).mean()) / nearest
        figures["recall_distance"] = float(crossed.amin(0).mean()) / nearest
    if train is not None:
        c = train[:largest].flatten(1).double()
        away = float(torch.cdist(b, c).amin(1).mean())
        if away > 0:
            figures["memorisation"] = float(torch.cdist(a, c).amin(1).mean()) / away
    return figures
