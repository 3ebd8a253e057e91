"""The exam of chains in small: exact samplers pass, planted errors are seen, warnings count where they may."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from invgen.solvers import GPCN, PCN, EllipticalSlice, ParallelTempering

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("exam_chains", "exam_chains_targets", "exam_chains_page", "exam_problems", "harness")
F64 = torch.float64


@pytest.fixture(scope="module")
def exam() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("exam_chains")
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def columns(exam: Any) -> dict[str, Any]:
    return {t.name: t for t in exam.targets()}


def test_rows_are_found_with_default_settings(exam: Any) -> None:
    found = dict(exam.rows(fast=False))
    assert set(found) >= {"EllipticalSlice", "GPCN", "InfMALA", "PCN", "ParallelTempering"}
    assert all(solver == type(solver)() for solver in found.values())
    assert not {"ExactGaussian", "MAP"} & set(found)
    assert exam.tempers(ParallelTempering())
    assert not exam.tempers(PCN())


@pytest.mark.parametrize("name", ["gauss16", "gauss128", "banana", "modes", "truncated", "funnel"])
def test_exact_draws_are_right_and_errors_are_seen(exam: Any, columns: dict[str, Any], name: str) -> None:
    """The answers' own draws pass; a shifted mean, a smaller spread and a lost correlation do not."""
    target = columns[name]
    answer = target.answer
    exact = answer.draw(64 * 100, 5).reshape(64, 100, -1)
    cell = exam.judge(exact, target)
    assert cell["p"] > 1e-3 / 6
    assert abs(cell["sd_ratio"] - 1) < 0.1
    planted = {"shift": exact + 0.2 * answer.sd, "spread": answer.mean + 0.8 * (exact - answer.mean)}
    if name in ("gauss16", "banana"):  # right margins, no correlation
        planted["independent"] = torch.stack([exact[..., j].roll(j, 1) for j in range(exact.shape[2])], -1)
    for what, draws in planted.items():
        assert exam.judge(draws, target)["p"] < 1e-5, what


def test_verdicts(exam: Any, columns: dict[str, Any]) -> None:
    fine = {"p": 0.5, "ess": 900.0, "rhat": 1.0, "bad": 0}
    assert exam.verdict(fine, False, 10) == "right"
    assert exam.verdict(fine | {"p": 1e-6}, False, 10) == "wrong"
    assert exam.verdict(fine | {"p": 1e-6, "rhat": 1.3}, False, 10) == "flagged"
    assert exam.verdict(fine | {"p": 1e-6, "divergent": 3}, False, 10) == "flagged"
    assert exam.verdict(fine | {"p": 1e-6, "ebfmi": 0.1}, False, 10) == "flagged"
    assert exam.verdict(fine | {"p": 1e-6, "rhat": math.nan}, True, 10) == "wrong"  # particles have no such excuse
    assert exam.verdict(fine | {"ess": 20.0}, False, 10) == "short"
    flagged = {"verdict": "flagged"}
    assert exam.credited(PCN(), columns["funnel"], flagged)
    assert exam.credited(PCN(), columns["modes"], flagged)
    assert not exam.credited(ParallelTempering(), columns["modes"], flagged)
    assert not exam.credited(PCN(), columns["gauss16"], flagged)


SMALL = [
    (PCN(draws=100, warmup=200), "truncated"),
    (EllipticalSlice(draws=200, warmup=100), "truncated"),
    (GPCN(draws=100, warmup=150, thin=2), "gauss16"),
]


@pytest.mark.parametrize(("solver", "name"), SMALL, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_a_small_exam(exam: Any, columns: dict[str, Any], solver: Any, name: str) -> None:
    cell = exam.sit(solver, columns[name], cells=len(SMALL))
    assert cell["verdict"] == "right", exam.summary(cell)


def test_a_walk_stays_exact(exam: Any, columns: dict[str, Any]) -> None:
    cell = exam.invariance(dataclasses.replace(PCN(), beta=0.5), columns["banana"], cells=10)
    assert cell["verdict"] == "right", exam.summary(cell)


def test_positions_decode_to_the_draws(exam: Any, columns: dict[str, Any]) -> None:
    target = columns["gauss16"]
    torch.testing.assert_close(target.problem.prior.decode(exam.positions(target, 5)), target.answer.draw(5, 31))


def test_the_page_renders_every_kind_of_cell(exam: Any, columns: dict[str, Any]) -> None:
    page = importlib.import_module("exam_chains_page").page
    target = columns["gauss16"]
    good = exam.judge(target.answer.draw(6400, 1).reshape(64, 100, -1), target)
    good |= {"verdict": "right", "bad": 0, "cpu_seconds": 1.0, "ebfmi": 0.9, "divergent": 2}
    row = {"settings": "s", "tempers": False, "cells": {"gauss16": good}, "invariance": {"gauss16": good}}
    refused = row | {"cells": {"gauss16": {"verdict": "refused", "why": "a | b"}}, "invariance": {}}
    text = page({"good": row, "no": refused}, [target])
    assert "| good | 🟩 right | " in text
    assert "2 divergent, E-BFMI 0.90" in text
    assert "refused: a \\| b" in text
