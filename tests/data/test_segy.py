"""SEG-Y: what is written is read back, headers survive, and what is wrong with a file is said in a sentence."""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from invgen.data.segy import export_segy, read_segy, write_segy
from invgen.grid import Grid
from invgen.posterior import Posterior

segyio = pytest.importorskip("segyio")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Single-precision values over twelve decades, both signs."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 6, shape)).astype(np.float32)


def poke(path: Path, at: int, value: int, size: int = 4, endian: str = "big") -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + size] = value.to_bytes(size, endian, signed=value < 0)
    path.write_bytes(bytes(raw))


def trace_at(index: int, samples: int, byte: int) -> int:
    """Position in the file of a byte of a trace header, counted from 1."""
    return 3600 + index * (240 + 4 * samples) + byte - 1


LINE = Grid((20, 7), (0.004, 12.5), (0.1, 1000.0), ("t", "x"), ("s", "m"), ("amplitude",))
CUBE = Grid((11, 4, 3), (0.002, 25.0, 12.5), (0.0, 5000.0, 600.0), ("t", "inline", "crossline"), ("s", "m", "m"))


@pytest.mark.parametrize("grid", [LINE, CUBE], ids=["line", "cube"])
@pytest.mark.parametrize("kind", ["ieee", "ibm"])
def test_round_trip(tmp_path: Path, grid: Grid, kind: str) -> None:
    x = noise(*grid.shape)
    path = write_segy(tmp_path / "new" / "a.sgy", x, grid=grid, format=kind)
    section = read_segy(path)
    got = section.data[0].numpy()
    if kind == "ieee":
        np.testing.assert_array_equal(got.view(np.uint32), x.view(np.uint32))
    else:  # hexadecimal exponents leave at least 21 of 24 bits; the conversion truncates
        np.testing.assert_allclose(got, x, rtol=2.0**-20, atol=0)
    assert section.data.shape == (1, *grid.shape)
    assert section.grid.axes == grid.axes
    assert section.grid.units == grid.units
    np.testing.assert_allclose(section.grid.spacing, grid.spacing, rtol=1e-9)
    assert section.grid.origin[0] == pytest.approx(grid.origin[0])
    assert section.mask.all()
    assert section.counts["missing"] == section.counts["duplicates"] == 0
    # the same again with the file's headers: byte for byte, IBM numbers too
    again = write_segy(tmp_path / "b.sgy", section.data, like=section)
    assert again.read_bytes() == path.read_bytes()
    assert write_segy(tmp_path / "c.sgy", section.data, like=path).read_bytes() == path.read_bytes()


def test_segyio_reads_what_is_written(tmp_path: Path) -> None:
    x = noise(*CUBE.shape)
    path = write_segy(tmp_path / "a.sgy", x, grid=CUBE, text="A cube")
    with segyio.open(str(path)) as f:
        np.testing.assert_array_equal(segyio.tools.cube(f), np.moveaxis(x, 0, -1))
        assert segyio.tools.dt(f) == 2000.0
        assert f.bin[segyio.BinField.Format] == 5
        assert "A cube" in segyio.tools.wrap(f.text[0])
        header = f.header[4]
        scalar = header[segyio.TraceField.SourceGroupScalar]
        assert scalar == -10
        assert header[segyio.TraceField.CDP_X] == (5000 + 25) * 10
        assert header[segyio.TraceField.CDP_Y] == (600 + 12.5) * 10


def foreign(path: Path, x: np.ndarray, *, format: int = 1, endian: str = "big", ext: int = 1) -> Path:
    """A line as segyio makes it, with odd headers and an extended text."""
    spec = segyio.spec()
    spec.format, spec.samples, spec.tracecount, spec.endian, spec.ext_headers = (
        format,
        range(len(x)),
        x.shape[1],
        endian,
        ext,
    )
    with segyio.create(str(path), spec) as f:
        f.text[0] = b"C 1 FOREIGN".ljust(3200)
        for k in range(ext):
            f.text[k + 1] = b"((SEG: ENDTEXT))".ljust(3200)
        f.bin[segyio.BinField.Interval] = 4000
        f.bin[segyio.BinField.JobID] = 1234
        for k in range(x.shape[1]):
            f.header[k] = {
                segyio.TraceField.CDP: 500 + k,
                segyio.TraceField.offset: -7 * k,
                segyio.TraceField.CDP_X: 3 * k + 100,
                segyio.TraceField.CDP_Y: 4 * k + 100,
                segyio.TraceField.SourceGroupScalar: 10,
                segyio.TraceField.TRACE_SAMPLE_INTERVAL: 4000,
                segyio.TraceField.TRACE_SAMPLE_COUNT: len(x),
            }
        f.trace = np.ascontiguousarray(x.T)
    return path


@pytest.mark.parametrize(("endian", "format"), [("big", 1), ("little", 5), ("big", 2), ("big", 3)])
def test_headers_of_other_programs_survive(tmp_path: Path, endian: str, format: int) -> None:
    x = np.round(noise(15, 5)).clip(-1000, 1000) + 1
    x = x.astype({2: np.intc, 3: np.int16}.get(format, np.float32))
    path = foreign(tmp_path / "a.sgy", x, format=format, endian=endian)
    section = read_segy(path)
    np.testing.assert_array_equal(section.data[0].numpy(), x)
    assert section.grid.spacing == pytest.approx((0.004, 50.0))  # 3-4-5 steps, times the scalar 10
    np.testing.assert_array_equal(section.numbers[0], 500 + np.arange(5))
    np.testing.assert_allclose(section.coordinates[2], [1060, 1080])
    assert "FOREIGN" in section.text
    out = write_segy(tmp_path / "b.sgy", section.data * 0.5, like=section)
    new, old = out.read_bytes(), bytearray(path.read_bytes())
    code = format if format in (1, 5) else 5  # halves need floats
    old[3224:3226] = code.to_bytes(2, endian)
    assert new[: 3600 + 3200] == bytes(old[: 3600 + 3200])
    back = read_segy(out)
    np.testing.assert_array_equal(back.headers.traces, section.headers.traces)
    np.testing.assert_allclose(back.data[0].numpy(), 0.5 * x, rtol=2.0**-20)


def test_dead_and_spoiled_traces_are_masked_and_counted(tmp_path: Path) -> None:
    x = noise(*LINE.shape)
    x[:, 2] = 0.0
    x[5, 0] = 0.0  # one zero kills no trace
    x[3, 4], x[5, 4], x[0, 6] = np.nan, np.inf, np.nan
    path = write_segy(tmp_path / "a.sgy", x, grid=LINE)
    with pytest.warns(UserWarning, match="1 of 7 traces are dead and masked; 3 samples in 2 traces are not finite"):
        section = read_segy(path)
    mask = np.isfinite(x)
    mask[:, 2] = False
    np.testing.assert_array_equal(section.mask[0].numpy(), mask)
    assert torch.isfinite(section.data).all()
    assert (section.counts["dead_traces"], section.counts["nan_traces"], section.counts["nan_samples"]) == (1, 2, 3)
    with pytest.raises(ValueError, match="3 values are NaN or infinite, which IBM floats have not"):
        write_segy(tmp_path / "b.sgy", x, grid=LINE, format="ibm")
    assert not (tmp_path / "b.sgy").exists()


def test_a_cube_with_gaps_and_repeats(tmp_path: Path) -> None:
    x = noise(*CUBE.shape)
    path = write_segy(tmp_path / "a.sgy", x, grid=CUBE)
    raw, step = path.read_bytes(), 240 + 4 * 11
    traces = [raw[3600 + k * step : 3600 + (k + 1) * step] for k in range(12)]
    # 5 missing, 0 twice with other samples, the order shuffled
    other = traces[0][:240] + bytes(4 * 11)
    order = [7, 0, 11, 1, 2, 3, 4, 6, 8, 9, 10]
    path.write_bytes(raw[:3600] + b"".join(traces[k] for k in order) + other)
    with pytest.warns(UserWarning, match="1 places of the cube have no trace") as caught:
        section = read_segy(path)
    assert "1 traces lie where another one does already" in str(caught[0].message)
    want = x.copy()
    want[:, 1, 2] = 0
    np.testing.assert_array_equal(section.data[0].numpy(), want)
    assert not section.mask[0, :, 1, 2].any()
    assert int((~section.mask).sum()) == 11
    assert (section.counts["missing"], section.counts["duplicates"]) == (1, 1)
    out = write_segy(tmp_path / "b.sgy", x, like=section)  # 12 traces in the file's order, the repeat as its place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = read_segy(out)
    np.testing.assert_array_equal(back.headers.traces, section.headers.traces)
    np.testing.assert_array_equal(back.data.numpy(), section.data.numpy())


def test_increments_and_header_bytes_of_inlines(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", noise(*CUBE.shape), grid=CUBE)
    for k in range(12):  # inlines 10, 12, … kept in bytes 9 and 21, nonsense in 189 and 193
        poke(path, trace_at(k, 11, 9), 10 + 2 * (k // 3))
        poke(path, trace_at(k, 11, 21), 3 * (k % 3))
        poke(path, trace_at(k, 11, 189), 1000 * k)
        poke(path, trace_at(k, 11, 193), 7 * k)
    with pytest.raises(ValueError, match="pass the header bytes of inline and crossline"):
        read_segy(path, dims=3)
    section = read_segy(path, inline=9, crossline=21)
    assert section.grid.shape == CUBE.shape
    np.testing.assert_array_equal(section.numbers[0], [10, 12, 14, 16])
    np.testing.assert_array_equal(section.numbers[1], [0, 3, 6])
    assert read_segy(path, dims=2).grid.shape == (11, 12)


def test_a_line_with_running_inline_numbers_is_a_line(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE)
    for k in range(7):
        poke(path, trace_at(k, 20, 189), 100 + k)
    assert read_segy(path).grid.axes == ("t", "x")


def test_scaled_coordinates_never_pass_in_silence(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_segy(path).grid.spacing[1] == pytest.approx(12.5)
    whole = path.read_bytes()
    for k in range(7):
        poke(path, trace_at(k, 20, 71), 0, 2)
    with pytest.warns(UserWarning, match="scalar of 7 traces is 0 and taken as 1"):
        assert read_segy(path).grid.spacing[1] == pytest.approx(125.0)
    path.write_bytes(whole)
    poke(path, trace_at(3, 20, 71), -1, 2)
    with pytest.warns(UserWarning, match="2 different coordinate scalars") as caught:
        read_segy(path)
    assert "apart, the grid has the median, 12.5" in str(caught[0].message)
    path.write_bytes(whole)
    for k in range(7):
        poke(path, trace_at(k, 20, 89), 2, 2)
    with pytest.warns(UserWarning, match="angles"):
        section = read_segy(path)
    assert section.grid.units == ("s", "trace")


def test_sampling_intervals(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE)
    whole = path.read_bytes()
    poke(path, 3216, 2000, 2)
    with pytest.raises(ValueError, match=r"several sampling intervals, 0\.002 s, 0\.004 s; pass dt="):
        read_segy(path)
    with pytest.warns(UserWarning, match=r"overruled by dt=0\.002"):
        assert read_segy(path, dt=0.002).grid.spacing[0] == 0.002
    path.write_bytes(whole)
    poke(path, 3216, 4, 2)  # milliseconds where the standard has microseconds
    for k in range(7):
        poke(path, trace_at(k, 20, 117), 4, 2)
    with pytest.warns(UserWarning, match="unusual for seismic data"):
        read_segy(path)
    path.write_bytes(whole)
    poke(path, trace_at(2, 20, 109), 104, 2)
    with pytest.raises(ValueError, match="start at different times, 100 to 104 ms"):
        read_segy(path)
    with pytest.raises(ValueError, match="whole number of µs"):
        write_segy(tmp_path / "b.sgy", noise(4, 4), dt=0.0041234567)
    with pytest.raises(ValueError, match="needs its sampling"):
        write_segy(tmp_path / "b.sgy", noise(4, 4))


def test_depth_sections(tmp_path: Path) -> None:
    grid = Grid((9, 4), (5.0, 20.0), (1500.0, 0.0), ("z", "x"), ("m", "m"))
    section = read_segy(write_segy(tmp_path / "a.sgy", noise(9, 4), grid=grid, domain="depth"), domain="depth")
    assert section.grid.axes == ("z", "x")
    assert section.grid.units == ("m", "m")
    assert section.grid.spacing == pytest.approx((5.0, 20.0))
    assert section.grid.origin[0] == 1500.0


def test_broken_files(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="holds 6 traces of 20 samples and 270 bytes more, of the 320"):
        read_segy(path)
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="3000 bytes, less than the headers"):
        read_segy(path)
    path.write_bytes(whole)
    poke(path, trace_at(4, 20, 115), 18, 2)
    with pytest.raises(
        ValueError, match="different lengths: the binary header says 20 samples, the header of trace 5 18"
    ):
        read_segy(path)
    path.write_bytes(whole)
    poke(path, 3224, 77, 2)
    with pytest.raises(ValueError, match="gives the sample format 77, known are 1"):
        read_segy(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_segy(tmp_path / "gone.sgy")
    for wrong in ({"domain": "offset"}, {"dims": 4}, {"dt": -1.0}):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="must be"):
            read_segy(path, **wrong)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    section = read_segy(write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE))
    with pytest.raises(ValueError, match="crop or transpose"):
        write_segy(tmp_path / "b.sgy", noise(7, 20), like=section)
    with pytest.raises(ValueError, match="channels one by one"):
        write_segy(tmp_path / "b.sgy", noise(2, 3, 20, 7), like=section)
    with pytest.raises(ValueError, match="real numbers"):
        write_segy(tmp_path / "b.sgy", noise(20, 7) * 1j, like=section)
    with pytest.raises(ValueError, match="leave dt and grid out"):
        write_segy(tmp_path / "b.sgy", noise(20, 7), like=section, dt=0.004)
    with pytest.raises(ValueError, match='"ieee" or "ibm"'):
        write_segy(tmp_path / "b.sgy", noise(20, 7), like=section, format="vax")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Cannot write"):
        write_segy(tmp_path / "file" / "b.sgy", noise(20, 7), like=section)


@pytest.mark.parametrize("grid", [LINE, CUBE], ids=["line", "cube"])
def test_a_posterior_goes_out_with_the_inputs_headers(tmp_path: Path, grid: Grid) -> None:
    section = read_segy(write_segy(tmp_path / "in.sgy", noise(*grid.shape), grid=grid))
    draws = torch.randn(1, 1, 4, 1, *grid.shape, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(draws, kind="approximate", grid=section.grid)
    written = export_segy(posterior, tmp_path / "out", like=section, samples=2)
    assert sorted(written) == ["mean", "sample_000", "sample_001", "sd"]
    for name, want in (("mean", posterior.mean()[0]), ("sd", posterior.std()[0]), ("sample_001", draws[0, 0, 1])):
        got = read_segy(written[name])
        torch.testing.assert_close(got.data, want, rtol=0, atol=0)
        np.testing.assert_array_equal(got.headers.traces, section.headers.traces)
        assert got.headers.head == section.headers.head
    point = Posterior(draws[:, :, :1], kind="point", grid=section.grid)
    assert sorted(export_segy(point, tmp_path / "point", like=tmp_path / "in.sgy")) == ["mean"]
    two = Posterior(draws.expand(-1, -1, -1, 2, *grid.shape), kind="approximate")
    assert "mean_1" in export_segy(two, tmp_path / "two", like=section, samples=0)
    with pytest.raises(ValueError, match="grid of the section"):
        export_segy(Posterior(draws[..., 1:], kind="approximate"), tmp_path / "out", like=section)


def test_without_segyio_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "segyio":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"invgen\[seismic\]"):
        read_segy(tmp_path / "a.sgy")


def test_window_of_a_line_is_written_with_its_start_and_read_back(tmp_path: Path) -> None:
    x = noise(*LINE.shape)
    section = read_segy(write_segy(tmp_path / "a.sgy", x, grid=LINE))
    cut = section.window(t=(0.12, 0.14), x=(25.0, 62.5))  # samples 5 to 10, traces 2 to 5, both ends included
    assert cut.grid.shape == (6, 4)
    assert cut.grid.origin == pytest.approx((0.12, 25.0))
    np.testing.assert_array_equal(cut.data[0].numpy(), x[5:11, 2:6])
    again = read_segy(write_segy(tmp_path / "b.sgy", cut.data, like=cut))
    np.testing.assert_array_equal(again.data.numpy(), cut.data.numpy())
    assert again.grid.origin[0] == pytest.approx(0.12)
    np.testing.assert_array_equal(again.numbers[0], [3, 4, 5, 6])
    np.testing.assert_allclose(again.coordinates, section.coordinates[2:6])
    np.testing.assert_array_equal(again.headers.field("samples"), 6)
    assert again.headers.binary("samples") == 6
    # every byte of the headers but those of samples and start is the input's
    changed = np.flatnonzero((again.headers.traces != section.headers.traces[2:6]).any(0)) + 1
    assert set(changed.tolist()) <= {109, 110, 115, 116}
    with segyio.open(str(tmp_path / "b.sgy"), ignore_geometry=True) as f:
        assert f.samples[0] == pytest.approx(120.0)
        assert len(f.samples) == 6
    whole = section.window()
    assert write_segy(tmp_path / "c.sgy", whole.data, like=whole).read_bytes() == (tmp_path / "a.sgy").read_bytes()


def test_window_of_a_cube_with_holes(tmp_path: Path) -> None:
    x = noise(*CUBE.shape)
    section = read_segy(write_segy(tmp_path / "a.sgy", x, grid=CUBE))
    raw = (tmp_path / "a.sgy").read_bytes()
    step = 240 + 4 * 11
    hole = 2 * 3 + 1  # inline 3, crossline 2
    (tmp_path / "b.sgy").write_bytes(raw[: 3600 + hole * step] + raw[3600 + (hole + 1) * step :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        section = read_segy(tmp_path / "b.sgy")
    cut = section.window(t=(0.004, 0.012), inline=(25.0, 75.0), crossline=(12.5, 25.0))
    assert cut.grid.shape == (5, 3, 2)
    assert cut.counts["missing"] == 1
    assert cut.counts["traces"] == 5
    np.testing.assert_array_equal(cut.numbers[0], [2, 3, 4])
    wanted = x[2:7, 1:4, 1:3].copy()
    wanted[:, 1, 0] = 0
    np.testing.assert_array_equal(cut.data[0].numpy(), wanted)
    assert not cut.mask[0, :, 1, 0].any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = read_segy(write_segy(tmp_path / "c.sgy", cut.data, like=cut), dims=3)
    np.testing.assert_array_equal(again.data.numpy(), cut.data.numpy())
    np.testing.assert_array_equal(again.mask.numpy(), cut.mask.numpy())


def test_window_counts_what_is_left_masked(tmp_path: Path) -> None:
    x = np.abs(noise(*LINE.shape)) + 1
    x[:, 1] = 0
    x[3, 4] = np.nan
    x[12, 5] = np.nan
    write_segy(tmp_path / "a.sgy", x, grid=LINE)
    with pytest.warns(UserWarning, match="1 of 7 traces are dead"):
        section = read_segy(tmp_path / "a.sgy")
    cut = section.window(t=(0.1, 0.12))
    assert (cut.counts["dead_traces"], cut.counts["nan_traces"], cut.counts["nan_samples"]) == (1, 1, 1)
    assert "1 of 7 traces are dead" in cut.remarks
    assert section.window(x=(25.0, 75.0)).counts["dead_traces"] == 0
    assert section.window(x=(25.0, 37.5)).remarks == ""


def test_a_start_between_milliseconds_takes_a_finer_scalar_or_is_refused(tmp_path: Path) -> None:
    grid = Grid((20, 3), (0.0005, 10.0), axes=("t", "x"), units=("s", "m"))
    path = write_segy(tmp_path / "a.sgy", noise(20, 3), grid=grid)
    cut = read_segy(path).window(t=(0.0015, 0.004))
    again = read_segy(write_segy(tmp_path / "b.sgy", cut.data, like=cut))
    assert again.grid.origin[0] == pytest.approx(0.0015)
    poke(path, trace_at(1, 20, 101), 7, 2)  # a static correction, which the scalar would change too
    section = read_segy(path)
    assert section.window(t=(0.002, 0.004)).grid.origin[0] == pytest.approx(0.002)
    with pytest.raises(ValueError, match="start the window at a whole number"):
        section.window(t=(0.0015, 0.004))


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ({"z": (0.1, 0.2)}, "names the axis 'z' but the section has t, x"),
        ({"t": (0.05, 0.12)}, "reaches out of the section"),
        ({"x": (0.0, 200.0)}, "reaches out of the section"),
        ({"t": (0.14, 0.12)}, "two numbers, first and last"),
        ({"t": (0.1,)}, "two numbers, first and last"),
        ({"t": (0.121, 0.122)}, "between two samples"),
    ],
)
def test_windows_that_cannot_be_cut(tmp_path: Path, ranges: dict[str, tuple[float, ...]], says: str) -> None:
    section = read_segy(write_segy(tmp_path / "a.sgy", noise(*LINE.shape), grid=LINE))
    with pytest.raises(ValueError, match=says):
        section.window(**ranges)
