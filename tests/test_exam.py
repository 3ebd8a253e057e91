"""A small exam: every sampler sits, exact ones pass, planted errors are seen, nobody looks at a hidden prior."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from invgen.solvers import ExactGaussian, ExactMixture

FOLDER = Path(__file__).parent.parent / "benchmarks"
N = 400


@pytest.fixture(scope="module")
def exam() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("exam")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("exam", "exam_problems", "exam_page", "harness"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def paper(exam: Any) -> Any:
    return exam.exam_problems.gauss16(0.3, N)


def test_every_sampler_sits(exam: Any, paper: Any) -> None:
    labels = []
    for label, _, solver in exam.rows(fast=True):
        cell = exam.sit(solver, exam.exam_problems.gauss16(0.3, 100))
        assert {"mean_error", "refused", "failed"} & set(cell), label
        labels.append(label)
        assert "hidden" not in str(cell.get("failed", "")), f"{label} draws from a prior it may not see"
        assert exam.summary(cell)
    assert {label.split()[0] for label in labels} >= {"ExactGaussian", "GuidedDiffusion", "PnPDM"}


def test_closed_forms_agree_with_the_answers(exam: Any) -> None:
    """The answers use matrices alone, so that either side would show a mistake of the other."""
    problems = exam.exam_problems
    cases = [(ExactGaussian(), problems.gauss16(0.05, N)), (ExactMixture(), problems.mixture25(8, 2, 0, N))]
    cases += [(ExactGaussian(), p) for p in problems.fields(16, N)]
    for solver, case in cases:
        cell = exam.sit(solver, case)
        # coordinates are correlated: of the squared error's expectation 1/N, five times is beyond 0.1 % for 2 free ones
        assert cell["mean_error"] < 2.7 / math.sqrt(N), case.name
        assert abs(cell["sd_ratio"] - 1) < 4 / math.sqrt(2 * N), case.name
        assert abs(cell["coverage"] - 0.9) < 4 * math.sqrt(0.9 * 0.1 / N), case.name


def test_quadrature_agrees_with_its_own_draws(exam: Any) -> None:
    for case in exam.exam_problems.curved(N):
        scores = exam.score(case.answer.draw(4000, 5), case)
        assert scores["mean_error"] < 4 / math.sqrt(4000)
        assert abs(scores["sd_ratio"] - 1) < 0.05
        assert abs(scores["coverage"] - 0.9) < 0.02


@pytest.mark.parametrize(
    ("scale", "shift", "what"),
    [(0.7, 0.0, "sd_ratio"), (1.0, 0.5, "mean_error"), (0.7, 0.0, "coverage"), (1.5, 0.0, "eigen")],
)
def test_planted_errors_are_seen(exam: Any, paper: Any, scale: float, shift: float, what: str) -> None:
    answer = paper.answer
    samples = answer.mean + scale * (answer.draw(N, 3) - answer.mean) + shift * answer.sd
    scores = exam.score(samples, paper)
    if what == "sd_ratio":
        assert abs(scores["sd_ratio"] - scale) < 0.15
    elif what == "mean_error":
        assert abs(scores["mean_error"] - shift) < 0.2
    elif what == "coverage":
        assert scores["coverage"] < 0.82
    else:
        assert scores["eigen"][1] > scores["eigen_range"][1]


def test_exact_draws_have_eigenvalues_in_the_range(exam: Any, paper: Any) -> None:
    outside = 0
    for seed in range(200):
        white = paper.answer.whiten(paper.answer.draw(N, 1000 + seed))
        values = torch.linalg.eigvalsh(torch.cov(white.T))
        low, high = exam.eigenvalue_range(N, 16)
        outside += int(values[0] < low or values[-1] > high)
    assert outside <= 3  # nominal 0.2 %: more than 3 of 200 has a probability below 1e-3


def test_a_hidden_prior_refuses_draws(exam: Any, paper: Any) -> None:
    with pytest.raises(RuntimeError, match="denoiser alone"):
        exam.DenoiserOnly(paper.problem.prior).sample(1)


def test_the_page_renders_every_kind_of_cell(exam: Any, paper: Any) -> None:
    page = importlib.import_module("exam_page").page
    good = exam.sit(ExactGaussian(), paper)
    table = {
        "good": {"denoiser_only": False, "settings": "s", "family": "f", "cells": {"gauss16/noise 0.3": good}},
        "bad": {
            "denoiser_only": True,
            "settings": "s",
            "family": "f",
            "cells": {"gauss16/noise 0.3": {"failed": "a | b"}},
        },
    }
    text = page(table, [("gauss16", "noise 0.3")])
    assert "| good | no |" in text
    assert "failed: a \\| b" in text
