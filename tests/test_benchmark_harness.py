"""The comparison with targets: a miss is shown, a missing figure is a miss, nothing raises."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("harness", FOLDER / "harness.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("harness", None)


def status(rows):
    return {r.id: r.status for r in rows}


@pytest.mark.parametrize(
    ("target", "good", "bad"),
    [
        ({"min": 5.0}, (5.0, 6.0), (4.999,)),
        ({"max": 1e-5}, (1e-5, 0.0), (2e-5,)),
        ({"between": [0.98, 1.02]}, (0.98, 1.0, 1.02), (0.97, 1.03)),
        ({"equals": 5}, (5.0,), (4.0, 6.0)),
    ],
)
def test_bounds(harness, target, good, bad):
    for value in good:
        assert status(harness.compare([{"id": "a", "value": value}], {"a": target})) == {"a": "met"}
    for value in (*bad,):
        assert status(harness.compare([{"id": "a", "value": value}], {"a": target})) == {"a": "MISSED"}


def test_what_was_not_measured_is_missed(harness):
    figures = [{"id": "b", "value": 1.0}, {"id": "nan", "value": math.nan}, {"id": "null", "value": None}]
    targets = {"a": {"min": 0}, "nan": {"max": 1}, "null": {"max": 1}}
    rows = status(harness.compare(figures, targets))
    missing = "MISSED (not measured)"
    assert rows == {"a": missing, "nan": missing, "null": missing, "b": "information"}
    with pytest.raises(ValueError, match="exactly one"):
        harness.compare([], {"a": {"min": 1, "max": 2}})


def test_a_run_ends_with_one_line_of_json(harness, capsys, monkeypatch):
    monkeypatch.setattr(harness, "load_targets", lambda name: {"speed": {"min": 2}, "gone": {"max": 1}})
    bench = harness.Benchmark(
        "demo", "A demonstration.", {"--size": {"type": int, "default": 3}}, argv=["--fast", "--size", "4"]
    )
    assert bench.fast
    assert bench.args.size == 4
    bench.add("speed", 1.5, "x", mc_error=0.1)
    bench.add("broken", math.nan)
    bench.finish()  # a miss is no error
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    assert set(record) == {"benchmark", "figures", "threads", "machine", "versions", "seconds", "fast"}
    assert record["figures"] == [
        {"id": "speed", "value": 1.5, "unit": "x", "mc_error": 0.1},
        {"id": "broken", "value": None, "unit": ""},
    ]
    assert any("gone" in line and "not measured" in line for line in lines)


def test_timings_are_interleaved(harness):
    order = []
    timings = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=9)
    assert order == ["a", "b"] * 10
    assert len(timings["a"].samples) == 9
    assert timings["a"].median >= 0
    assert timings["b"].iqr >= 0


def test_the_targets_can_be_read(harness):
    import tomllib

    for name, targets in tomllib.loads((FOLDER / "targets.toml").read_text(encoding="utf-8")).items():
        assert all(r.status.startswith("MISSED") for r in harness.compare([], targets)), name
