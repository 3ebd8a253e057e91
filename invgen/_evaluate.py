"""`invgen evaluate`: how close a prior's draws are to held-out examples, as a table and a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["evaluate"]


def evaluate(
    words: list[str],
    make: Callable[..., Any],
    parse: Callable[..., Any],
    load: Callable[..., Any],
    check_device: Callable[[str], str],
) -> str:
    """Draw, compare, write the page, and return the table."""
    parser = make("evaluate", "evaluation.html")
    parser.add_argument("prior", type=str, help="name of a pretrained prior, or a checkpoint")
    parser.add_argument("--data", type=str, required=True, help="held-out examples: .npy (n, ny, nx) or (n, 1, ny, nx)")
    parser.add_argument("--training", type=str | None, default=None, help="training examples, to look for copies: .npy")
    parser.add_argument("--n", type=int | None, default=None, help="draws; half the held-out examples when omitted")
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="of the set whose shapes count; the data's mid-range when omitted",
    )
    options = parse(parser, words)
    from invgen._config import check_output
    from invgen.data.io import read_array
    from invgen.diagnostics.fields import images
    from invgen.diagnostics.generative import compare_fields, memorisation
    from invgen.report.evaluation import facts_about, write_evaluation

    out = check_output(options.out, ".html")
    held = images(read_array(options.data), "The held-out examples").float()
    train = None if options.training is None else images(read_array(options.training), "The training examples").float()
    prior = load(options.prior, None, False)
    if hasattr(prior, "to"):
        prior = prior.to(check_device(options.device))
    wanted = len(held) // 2 if options.n is None else options.n
    if wanted < 2 or wanted > len(held) // 2:
        raise ValueError(
            f"--n draws are compared with as many held-out examples and a floor takes twice that: with {len(held)} examples --n lies between 2 and {len(held) // 2}, got {wanted}."
        )
    if tuple(prior.shape) != (1, *held.shape[1:]):
        raise ValueError(
            f"The prior makes fields of the shape {tuple(prior.shape)} and the examples have {tuple(held.shape[1:])}; one channel and one size are needed."
        )
    held = held[: 2 * wanted]
    with torch.no_grad():
        draws = images(prior.sample(wanted, seed=options.seed).cpu().float(), "The draws")
    threshold = options.threshold
    if threshold is None:
        threshold = 0.5 * float(held.min() + held.max())
    result = compare_fields(draws, held, threshold=threshold, seed=options.seed)
    memory = None if train is None else memorisation(draws, train, held)
    name = str(options.prior)
    path = write_evaluation(
        out,
        f"Evaluation of {name}",
        result,
        draws.numpy(),
        held.numpy(),
        memory=memory,
        training=None if train is None else train.numpy(),
        facts={**facts_about(prior), "threshold": f"{threshold:.4g}", "seed": str(options.seed)},
    )
    text = result.table()
    if memory is not None:
        text += f"\nnearest training example: median ratio {memory.ratio:.3f}, {100 * memory.closer:.1f} % closer than 99 % of held-out examples"
    return f"{text}\nWrote {path}."
