"""What a person gets wrong, and the one sentence that answers: what was given, what was expected, what to do."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from invgen.contracts import HasDenoiser, HasDensity, HasLatent, Operator, Solver, check_batch, require
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import Identity, MatrixOperator, from_pylops
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian

A = MatrixOperator(torch.arange(12.0).reshape(3, 4))
PRIOR = GaussianPrior(torch.zeros(4), 1.0)
NOISE = GaussianNoise(1.0)
NAN = torch.tensor([1.0, float("nan"), 2.0])
MASK = torch.tensor([True, False, True])


@dataclass(frozen=True)
class NeedsDenoiser(Solver):
    needs: ClassVar = (HasDenoiser,)


class Bare:
    """A prior with draws and nothing else."""

    shape, grid, transform = (4,), None, None

    def sample(self, n, *, seed=0):
        return torch.zeros(n, 4)


def exact(**settings):
    return ExactGaussian().solve(
        InverseProblem(torch.zeros(3), A, NOISE, PRIOR), settings.pop("num_samples", 1), **settings
    )


CASES = {
    "data-masked-array": (
        TypeError,
        "masked array",
        lambda: InverseProblem(np.ma.masked_invalid(NAN.numpy()), A, NOISE, PRIOR),
    ),
    "channel-axis": (
        ValueError,
        r"from_pylops\(op, \(1, 2, 2\)\)",
        lambda: InverseProblem(torch.zeros(2, 2), Identity((2, 2)), NOISE, GaussianPrior(torch.zeros(1, 2, 2), 1.0)),
    ),
    "not-pylops": (TypeError, "MatrixOperator", lambda: from_pylops(np.eye(3))),
    "examples-equal": (ValueError, "all equal", lambda: GaussianPrior.fit(np.ones((5, 3)))),
    "examples-masked": (ValueError, "MaskedArray", lambda: GaussianPrior.fit(np.ma.ones((5, 3)))),
    "num-samples-text": (ValueError, "positive integer", lambda: exact(num_samples="3")),
    "num-samples-none": (ValueError, "positive integer", lambda: exact(num_samples=None)),
    "num-samples-truth": (ValueError, "positive integer", lambda: exact(num_samples=True)),
    "chunk-text": (ValueError, "positive integer or None", lambda: exact(chunk="a")),
    "dtype-text": (ValueError, "torch.float32", lambda: exact(dtype="float64")),
    "device-unknown": (ValueError, "'abacus' cannot be used", lambda: exact(device="abacus")),
    "device-meta": (ValueError, "'meta' cannot be used", lambda: exact(device="meta")),
    "report-suffix": (ValueError, "end it in .html", lambda: exact().report("r.pdf")),
    "data-shape": (
        ValueError,
        r"shape \(4,\) but MatrixOperator predicts \(3,\)",
        lambda: InverseProblem(torch.zeros(4), A, NOISE, PRIOR),
    ),
    "data-rank": (ValueError, "predicts", lambda: InverseProblem(torch.zeros(2, 2, 3), A, NOISE, PRIOR)),
    "data-scalar": (ValueError, "predicts", lambda: InverseProblem(torch.tensor(1.0), A, NOISE, PRIOR)),
    "data-empty": (ValueError, "predicts", lambda: InverseProblem(torch.zeros(0, 3), A, NOISE, PRIOR)),
    "data-text": (TypeError, "does not convert", lambda: InverseProblem("file.npy", A, NOISE, PRIOR)),
    "data-objects": (TypeError, "does not convert", lambda: InverseProblem(np.array([None, 1, 2]), A, NOISE, PRIOR)),
    "nan": (ValueError, "1 NaN or infinite values; pass mask=", lambda: InverseProblem(NAN, A, NOISE, PRIOR)),
    "inf": (ValueError, "pass mask=", lambda: InverseProblem(torch.tensor([1.0, float("inf"), 0.0]), A, NOISE, PRIOR)),
    "nan-outside-the-mask": (ValueError, "pass mask=", lambda: InverseProblem(NAN, A, NOISE, PRIOR, mask=~MASK)),
    "mask-dtype": (ValueError, "boolean", lambda: InverseProblem(NAN, A, NOISE, PRIOR, mask=MASK.float())),
    "mask-shape": (ValueError, "boolean with the shape", lambda: InverseProblem(NAN, A, NOISE, PRIOR, mask=MASK[:2])),
    "mask-empty": (
        ValueError,
        "hides every datum",
        lambda: InverseProblem(NAN, A, NOISE, PRIOR, mask=torch.zeros(3, dtype=torch.bool)),
    ),
    "model-shape": (
        ValueError,
        r"prior has \(5,\)",
        lambda: InverseProblem(torch.zeros(3), A, NOISE, GaussianPrior(torch.zeros(5), 1.0)),
    ),
    "no-batch-axis": (ValueError, r"add one with x\[None\]", lambda: A(torch.zeros(4))),
    "model-given": (ValueError, r"\(batch, 4\), got \(2, 5\)", lambda: A(torch.zeros(2, 5))),
    "adjoint-given": (ValueError, r"\(batch, 3\), got \(2, 4\)", lambda: A.adjoint(torch.zeros(2, 4))),
    "not-a-tensor": (TypeError, "torch.as_tensor", lambda: check_batch(np.zeros((1, 4)), (4,), "The model")),
    "batch-of-models": (
        ValueError,
        "3 models were given for 2 observations",
        lambda: InverseProblem(torch.zeros(2, 3), A, NOISE, PRIOR).log_likelihood(torch.zeros(3, 4)),
    ),
    "observations": (
        ValueError,
        "different numbers of observations",
        lambda: InverseProblem(
            terms=[Term(torch.zeros(2, 3), A, NOISE), Term(torch.zeros(5, 3), A, NOISE)], prior=PRIOR
        ),
    ),
    "negative-noise": (
        ValueError,
        "must be positive and finite, the smallest given is -1",
        lambda: GaussianNoise(-1.0),
    ),
    "negative-noise-entry": (ValueError, "smallest given is -2", lambda: GaussianNoise(torch.tensor([1.0, -2.0, 1.0]))),
    "noise-number": (TypeError, "GaussianNoise", lambda: InverseProblem(torch.zeros(3), A, 0.1, PRIOR)),
    "noise-shape": (
        ValueError,
        "one variance a datum",
        lambda: InverseProblem(torch.zeros(3), A, GaussianNoise(torch.ones(5)), PRIOR).log_likelihood(
            torch.zeros(1, 4)
        ),
    ),
    "operator-matrix": (
        TypeError,
        "invgen Operator",
        lambda: InverseProblem(torch.zeros(3), torch.zeros(3, 4), NOISE, PRIOR),
    ),
    "prior-missing": (ValueError, "needs a prior", lambda: InverseProblem(torch.zeros(3), A, NOISE)),
    "prior-number": (TypeError, "without a shape", lambda: InverseProblem(torch.zeros(3), A, NOISE, 1.0)),
    "both-forms": (
        ValueError,
        "exactly one of the two forms",
        lambda: InverseProblem(torch.zeros(3), A, NOISE, PRIOR, terms=[]),
    ),
    "neither-form": (ValueError, "exactly one of the two forms", lambda: InverseProblem(prior=PRIOR)),
    "operator-missing": (ValueError, "one of them is missing", lambda: InverseProblem(torch.zeros(3), prior=PRIOR)),
    "no-terms": (ValueError, "at least one data term", lambda: InverseProblem(terms=[], prior=PRIOR)),
    "operator-grid": (ValueError, "its grid", lambda: Operator((1, 3, 3), (3,), model_grid=Grid((4, 3), (1.0, 1.0)))),
    "capability": (
        TypeError,
        "HasDenoiser, which Bare does not have; solvers that fit this prior",
        lambda: NeedsDenoiser().solve(InverseProblem(torch.zeros(3), A, NOISE, Bare())),
    ),
    "capability-latent": (
        TypeError,
        "HasLatent",
        lambda: InverseProblem(torch.zeros(3), A, NOISE, Bare()).latent_log_posterior(torch.zeros(1, 4)),
    ),
    "capability-density": (
        TypeError,
        "HasDensity",
        lambda: InverseProblem(torch.zeros(3), A, NOISE, Bare()).log_posterior(torch.zeros(1, 4)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_one_sentence(name):
    kind, says, call = CASES[name]
    with pytest.raises(kind, match=says) as caught:
        call()
    message = str(caught.value)
    assert message.endswith((".", ")"))
    assert "\n" not in message


def test_arrays_of_other_byte_orders_and_layouts_are_read():
    d = np.arange(3.0)
    for other in (d.astype(">f8"), d[::-1].copy()[::-1], d.astype(">i2")):
        problem = InverseProblem(other, A, NOISE, PRIOR, mask=MASK.numpy()[::-1])
        assert problem.terms[0].data.tolist() == [[0.0, 1.0 * MASK[1], 2.0]]
    examples = np.random.default_rng(0).standard_normal((20, 3))
    assert torch.equal(
        GaussianPrior.fit(examples.astype(">f8")).mean_u, GaussianPrior.fit(torch.tensor(examples)).mean_u
    )


def test_problems_print_shapes_not_numbers():
    text = repr(InverseProblem(torch.zeros(3), A, NOISE, PRIOR, mask=MASK))
    assert "data (1, 3), 2 of 3 measured" in text
    assert "tensor(" not in text


def test_a_capability_that_is_there_is_accepted():
    require(PRIOR, HasDensity, "a test")
    require(PRIOR, HasLatent, "a test")
