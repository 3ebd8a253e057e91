"""Phase retrieval: the ambiguities that the docstring states, the spectral start, alignment, bad input."""

import pytest
import torch

from invgen.operators import (
    CodedDiffraction,
    Identity,
    MatrixOperator,
    OversampledFourier,
    PhaseRetrieval,
    align_phase,
    phase_masks,
    spectral_start,
)

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_intensities_and_magnitudes():
    linear, x = OversampledFourier((4, 5), kind="complex"), draw(2, 1, 4, 5, dtype=torch.complex128)
    torch.testing.assert_close(PhaseRetrieval(linear)(x), linear(x).abs().square())
    torch.testing.assert_close(PhaseRetrieval(linear, 1)(x), linear(x).abs())
    # the transform of the autocorrelation, which oversampling by two holds without wrapping around
    power = torch.fft.ifft2(PhaseRetrieval(linear)(x))[0]
    image = x[0, 0]
    lag = (image[1:, 2:] * image[:-1, :-2].conj()).sum()  # at (1, 2)
    torch.testing.assert_close(80 * power[1, 2], lag)


def test_what_a_fourier_transform_cannot_tell():
    g = PhaseRetrieval(OversampledFourier((6, 6), kind="complex"))
    x = torch.zeros(1, 1, 6, 6, dtype=torch.complex128)
    x[..., 1:5, 1:5] = draw(4, 4, dtype=torch.complex128)
    d = g(x)
    torch.testing.assert_close(g(x * torch.exp(torch.tensor(0.7j))), d)  # global phase
    torch.testing.assert_close(g(x.roll((1, -1), (-2, -1))), d)  # a shift inside the padding
    torch.testing.assert_close(g(x.flip((-2, -1)).conj()), d)  # the twin


def test_coded_diffraction_tells_shifts_and_twins():
    g = PhaseRetrieval(CodedDiffraction(phase_masks((6, 6), 4), "complex"))
    x = draw(1, 1, 6, 6, dtype=torch.complex128)
    torch.testing.assert_close(g(x * torch.exp(torch.tensor(0.7j))), g(x))
    for other in (x.roll(1, -1), x.flip((-2, -1)).conj()):
        assert float((g(other) - g(x)).norm() / g(x).norm()) > 0.1


@pytest.mark.parametrize("power", [1, 2])
def test_spectral_start_and_gradient_descent_find_the_image(power):
    linear = CodedDiffraction(phase_masks((8, 8), 8), "complex")
    g = PhaseRetrieval(linear, power)
    x = draw(2, 1, 8, 8, seed=3, dtype=torch.complex128)
    d = g(x)
    v = spectral_start(g, d, iterations=200)
    error = (align_phase(v, x) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert float(error.max()) < 0.7  # against 1.4 for a random image of the same energy
    magnitudes = d if power == 1 else d.sqrt()
    for _ in range(400):  # alternating projections (Gerchberg & Saxton): AᴴA = 8
        field = linear(v)
        v = linear.adjoint(magnitudes * torch.sgn(field)) / 8
    error = (align_phase(v, x) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-4


def test_gram_is_diagonal():
    masks = phase_masks((3, 4), 2) * torch.rand(2, 3, 4, dtype=torch.float64)
    x = draw(2, 1, 3, 4)
    coded = CodedDiffraction(masks)
    torch.testing.assert_close(coded.adjoint(coded(x)), x * masks.abs().square().sum(0))
    fourier = OversampledFourier((3, 4), 1.7)
    torch.testing.assert_close(fourier.adjoint(fourier(x)), x)
    update = fourier.solve_model(x, 0.3, 2.0)
    assert update.iterations == 0
    torch.testing.assert_close(update.x, x / (1 / 0.3 + 1 / 2.0))


def test_alignment_takes_the_phase_away():
    x = draw(3, 1, 4, 4, dtype=torch.complex128)
    torch.testing.assert_close(align_phase(x * torch.exp(torch.tensor(2.1j)), x), x)
    torch.testing.assert_close(align_phase(-x.real, x.real), x.real)


def test_bad_input():
    linear = OversampledFourier((4, 4))
    with pytest.raises(TypeError, match="linear operator"):
        PhaseRetrieval(PhaseRetrieval(linear))
    with pytest.raises(TypeError, match="real data"):
        PhaseRetrieval(Identity((1, 4, 4)))
    with pytest.raises(TypeError, match="real data"):
        PhaseRetrieval(MatrixOperator(torch.randn(3, 4)))
    with pytest.raises(ValueError, match="power"):
        PhaseRetrieval(linear, 3)
    with pytest.raises(ValueError, match="oversampling"):
        OversampledFourier((4, 4), 0.5)
    with pytest.raises(ValueError, match="masks"):
        CodedDiffraction(torch.ones(4, 4))
    with pytest.raises(ValueError, match="at least one mask"):
        phase_masks((4, 4), 0)
    with pytest.raises(ValueError, match="not negative"):
        spectral_start(PhaseRetrieval(linear), torch.zeros(1, 8, 8))
