"""Random fields have their law, solvers solve their equation, and the linear estimate is the best one."""

import math

import pytest
import torch
from torch import Tensor

from equireg.groups import get_group
from equireg.noise import SampleNoise, Stream
from equireg.pde import helmholtz
from equireg.pde.equations import EQUATIONS, Normalizer
from equireg.pde.generate import LAWS
from equireg.pde.helmholtz import Helmholtz
from equireg.pde.linear_mmse import EmpiricalFields, HelmholtzFields
from equireg.pde.navier_stokes import NavierStokes, default_forcing
from equireg.pde.random_fields import ExponentialNoise, NeumannField, PeriodicField, WhiteNoise, exponential_covariance


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("method", ["cholesky", "circulant"])
def test_both_forms_of_the_exponential_noise_have_its_covariance(method: str) -> None:
    noise = ExponentialNoise(scale=0.2, eps=0.1, method=method)
    shape = noise.normals_shape((1, 6, 6))
    count = math.prod(shape)
    fields = noise.from_normals(torch.eye(count, dtype=torch.float64).view(count, *shape)).flatten(1)  # L^T
    torch.testing.assert_close(fields.T @ fields, exponential_covariance(6, scale=0.2, eps=0.1))


def test_the_distance_in_the_exponential_noise_is_not_squared() -> None:
    covariance = exponential_covariance(64)
    assert covariance[0, 1] == pytest.approx(0.044, abs=5e-4)
    assert covariance[0, 0] == pytest.approx(1.0001)


def test_the_exponential_noise_is_factorised_on_small_grids_only() -> None:
    assert ExponentialNoise().normals_shape((2, 64, 64)) == (4096, 2)
    assert ExponentialNoise().normals_shape((2, 128, 128)) == (2, 256, 256)


def test_the_periodic_field_has_the_published_standard_deviation() -> None:
    field = PeriodicField()
    variance = (field.amplitudes(128, doubles(1)) ** 2).sum() / 128**4
    assert math.sqrt(variance) == pytest.approx(EQUATIONS["navier_stokes"].std[0], rel=2e-3)
    fields = field.from_normals(doubles(4, 16, 16, 2))
    assert fields.mean((1, 2)).abs().max() < 1e-14


def test_the_neumann_field_is_zero_on_the_edge() -> None:
    a = NeumannField().from_normals(doubles(2, 9, 9))
    edges = torch.cat([a[:, 0], a[:, -1], a[:, :, 0], a[:, :, -1]])
    assert edges.abs().max() == 0
    assert a.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("field", [PeriodicField(), NeumannField(), ExponentialNoise(), WhiteNoise()])
def test_a_field_depends_on_its_seed_and_index_alone(field) -> None:
    shape = (2, 8, 8) if isinstance(field, ExponentialNoise | WhiteNoise) else (8, 8)
    like = torch.zeros(1, dtype=torch.float64)
    together = field.draw(SampleNoise([3, 7], 0, Stream.DATA), shape, like)
    alone = field.draw(SampleNoise([7], 0, Stream.DATA), shape, like)
    assert together.dtype == torch.float64
    assert tuple(together.shape[1:]) == shape
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-14)
    assert not torch.equal(together[0], together[1])


def test_random_fields_refuse_what_has_no_law() -> None:
    with pytest.raises(ValueError, match=r"alpha=1.0 must be above 1"):
        PeriodicField(alpha=1.0)
    with pytest.raises(ValueError, match=r"scale=0 must be positive"):
        ExponentialNoise(scale=0)
    with pytest.raises(ValueError, match=r"must be square, \(N, N\) with N >= 2, not \(8, 9\)"):
        NeumannField().normals_shape((8, 9))
    with pytest.raises(ValueError, match=r"too large for method='circulant'"):
        ExponentialNoise(scale=2.0, eps=0.0, method="circulant").draw(
            SampleNoise([0], 0, Stream.DATA), (1, 8, 8), doubles(1)
        )


def test_a_single_wave_decays_at_its_rate_without_forcing() -> None:
    n, dt, viscosity = 16, 0.01, 0.05
    x = torch.arange(n, dtype=torch.float64) / n
    w_0 = torch.cos(2 * math.pi * (x[:, None] + 2 * x))  # v . grad w = 0
    w = NavierStokes(n, viscosity, dt, forcing=torch.zeros(n, n))(w_0, horizon=0.5)
    z = dt * viscosity * 4 * math.pi**2 * (1 + 4) / 2
    torch.testing.assert_close(w, ((1 - z) / (1 + z)) ** 50 * w_0)


def test_the_flow_converges_with_the_time_step_at_first_order() -> None:
    w_0 = PeriodicField().from_normals(doubles(1, 16, 16, 2))
    coarse, middle, fine = (NavierStokes(16, dt=dt)(w_0, horizon=0.2) for dt in (4e-3, 2e-3, 1e-3))
    assert relative(coarse, middle) / relative(middle, fine) == pytest.approx(2, rel=0.05)


def test_convection_conserves_energy_and_enstrophy() -> None:
    """To first order in dt, for a field that the cut-off does not touch."""
    n = 32
    modes = torch.zeros(n, n, dtype=torch.complex128)
    modes[:4, :4] = torch.complex(doubles(4, 4), doubles(2, 4, 4)[1])
    modes[0, 0] = 0
    w_0 = torch.fft.ifft2(modes).real * n**2 * 0.1
    w = NavierStokes(n, viscosity=0.0, dt=1e-5, forcing=torch.zeros(n, n))(w_0, horizon=1e-2)
    assert relative(w, w_0) > 1e-3  # it has moved
    assert w.square().mean().item() == pytest.approx(w_0.square().mean().item(), rel=1e-6)


def test_flows_are_independent_of_their_batch_and_recorded_in_time() -> None:
    w_0 = PeriodicField().from_normals(doubles(3, 16, 16, 2))
    solver = NavierStokes(16, dt=1e-2)
    records = solver.records(w_0, horizon=0.1, count=2)
    assert records.shape == (3, 16, 16, 2)
    torch.testing.assert_close(records[1, :, :, 1], solver(w_0[1], horizon=0.1), rtol=0, atol=1e-14)
    torch.testing.assert_close(records[..., 0], solver(w_0, horizon=0.05), rtol=0, atol=1e-14)
    single = solver(w_0.float(), horizon=0.1)
    assert single.dtype == torch.float32
    assert relative(single.double(), records[..., 1]) < 1e-5


@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2]], ids=str)
def test_a_field_that_is_not_finite_leaves_the_others_as_they_are(bad: list[int]) -> None:
    w_0 = PeriodicField().from_normals(doubles(3, 16, 16, 2))
    solver = NavierStokes(16, dt=1e-2)
    expected = solver(w_0, horizon=0.1)
    w_0[bad, 3, 5] = torch.nan
    expected[bad] = torch.nan
    torch.testing.assert_close(solver(w_0, horizon=0.1), expected, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize(("horizon", "steps"), [(1.0, 1000), (0.07, 70), (0.3, 300), (0.0005, 1), (0.0011, 2)])
def test_rounding_does_not_add_a_step(horizon: float, steps: int) -> None:
    assert NavierStokes(8, dt=1e-3).steps(horizon) == steps


def test_the_flow_refuses_what_it_cannot_solve() -> None:
    with pytest.raises(ValueError, match=r"size=15 must be even"):
        NavierStokes(15)
    with pytest.raises(ValueError, match=r"dt=0 must be positive"):
        NavierStokes(16, dt=0)
    with pytest.raises(ValueError, match=r"must end in \(16, 16\)"):
        NavierStokes(16)(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch.float16"):
        NavierStokes(16)(torch.zeros(1, 16, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"count=9 must be from 1 to 5"):
        NavierStokes(16, dt=0.2).records(torch.zeros(1, 16, 16), count=9)
    with pytest.raises(ValueError, match=r"dt=1.0 is too large"):
        NavierStokes(16, dt=1.0)(100 * doubles(1, 16, 16), horizon=50.0)


@pytest.mark.parametrize("number", range(1, 8))
def test_every_exact_element_is_a_symmetry_of_the_flow(number: int) -> None:
    element = get_group("navier_stokes_exact").elements[number]
    w_0 = PeriodicField().from_normals(doubles(2, 16, 16, 2))
    solver = NavierStokes(16, dt=5e-3)
    assert relative(solver(element(w_0), horizon=1.0), element(solver(w_0, horizon=1.0))) < 1e-12


def test_a_shifted_element_is_a_symmetry_of_the_flow_too() -> None:
    elements = get_group("navier_stokes_torus").elements
    w_0 = PeriodicField().from_normals(doubles(1, 16, 16, 2))
    solver = NavierStokes(16, dt=5e-3)
    moved = solver(torch.cat([element(w_0) for element in elements]), horizon=1.0)
    expected = solver(w_0, horizon=1.0)
    assert len({tuple(field.flatten().tolist()) for field in moved}) == 32  # all different
    for element, field in zip(elements, moved, strict=True):
        assert relative(field[None], element(expected)) < 1e-12


def test_a_plain_flip_is_no_symmetry_of_the_forced_flow() -> None:
    flip = get_group("flip").elements[1]
    w_0 = PeriodicField().from_normals(doubles(16, 32, 32, 2))
    solver = NavierStokes(32, dt=1e-2)
    assert 0.45 < relative(solver(flip(w_0)), flip(solver(w_0))) < 0.65
    assert relative(default_forcing(32).flip(-1), default_forcing(32)) > 1


@pytest.mark.parametrize("number", range(1, 8))
def test_every_symmetry_of_the_square_is_one_of_the_helmholtz_equation(number: int) -> None:
    element = get_group("helmholtz_d4").elements[number]
    a = NeumannField().from_normals(doubles(2, 17, 17))
    solver = Helmholtz(17)
    assert relative(solver(element(a)), element(solver(a))) < 1e-12
    assert relative(solver(-a), -solver(a)) < 1e-15


@pytest.mark.parametrize("largest_matrix", [0, 256])
def test_the_solution_satisfies_the_discrete_equation(largest_matrix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helmholtz, "LARGEST_MATRIX", largest_matrix)
    a, k, h = doubles(3, 12, 12), 2.5, 1 / 11
    u = Helmholtz(12, k)(a)
    laplacian = (u[:, 2:, 1:-1] + u[:, :-2, 1:-1] + u[:, 1:-1, 2:] + u[:, 1:-1, :-2] - 4 * u[:, 1:-1, 1:-1]) / h**2
    torch.testing.assert_close(laplacian + k**2 * u[:, 1:-1, 1:-1], a[:, 1:-1, 1:-1])
    edges = torch.cat([u[:, 0], u[:, -1], u[:, :, 0], u[:, :, -1]])
    assert edges.abs().max() == 0


def test_the_helmholtz_solver_refuses_resonances_and_other_sizes() -> None:
    eigenvalue = -2 * 4 * 9 * math.sin(math.pi / 6) ** 2  # of the first sine on four points
    with pytest.raises(ValueError, match=r"is an eigenvalue on 4 points"):
        Helmholtz(4, wavenumber=math.sqrt(-eigenvalue))
    with pytest.raises(ValueError, match=r"must end in \(8, 8\)"):
        Helmholtz(8)(torch.zeros(9, 9))


def test_the_exact_covariance_is_that_of_the_pairs() -> None:
    size, k = 6, 1.0
    xi = torch.eye(size**2, dtype=torch.float64).view(-1, size, size)
    a = NeumannField().from_normals(xi)
    x = torch.stack([a, Helmholtz(size, k)(a)], dim=1).flatten(1)  # one row per coefficient
    fields = HelmholtzFields(size, k)
    basis = torch.eye(2 * size**2, dtype=torch.float64).view(-1, 2, size, size)
    torch.testing.assert_close(fields.covariance(basis).flatten(1), x.T @ x)
    places = torch.tensor([8, 50, 63])
    torch.testing.assert_close(fields.between(places), (x.T @ x)[places][:, places])


def test_empirical_fields_have_the_sample_covariance() -> None:
    x = doubles(20, 2, 4, 4) + 1
    fields = EmpiricalFields(x)
    covariance = torch.cov(x.flatten(1).T)
    basis = torch.eye(32, dtype=torch.float64).view(-1, 2, 4, 4)
    torch.testing.assert_close(fields.covariance(basis).flatten(1), covariance)
    places, weights = torch.tensor([1, 30]), torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(fields.between(places), covariance[places][:, places])
    torch.testing.assert_close(fields.spread(places, weights).flatten(), covariance[:, places] @ weights)
    torch.testing.assert_close(fields.mean, x.mean(0))


def test_the_linear_estimate_keeps_the_sensors_and_has_the_least_error() -> None:
    law = LAWS["helmholtz"](12)
    x = law.sample(range(64), 0, "test").double()
    fields = HelmholtzFields(12)
    positions = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(i))[:20] for i in range(64)])
    positions = 144 + (positions // 10 + 1) * 12 + positions % 10 + 1  # interior points of u
    y = x.flatten(1).gather(1, positions)
    estimate = fields.estimate(y, positions)
    torch.testing.assert_close(estimate.flatten(1).gather(1, positions), y, rtol=1e-5, atol=1e-8)
    error = (estimate - x).flatten(1)
    # the best estimate's error does not correlate with the sensors, in any direction of the field
    correlation = (error[:, :, None] * y[:, None, :]).mean(0)
    scale = error.std() * y.std()
    assert correlation.abs().mean() < 2 * scale / math.sqrt(64)
    wrong = HelmholtzFields(12, tau=30.0).estimate(y, positions)
    assert error.norm() < 0.95 * (wrong - x).norm()


def test_normalised_fields_return_to_physical_units() -> None:
    normalizer = Normalizer.of("helmholtz")
    x = doubles(2, 2, 4, 4)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(x)), x)
    torch.testing.assert_close(normalizer.normalize(x[:, 1:], 1), normalizer.normalize(x)[:, 1:])
    unit = torch.tensor(EQUATIONS["helmholtz"].std).view(2, 1, 1).expand(1, 2, 3, 3)
    torch.testing.assert_close(normalizer.normalize(unit + normalizer.mean), torch.full((1, 2, 3, 3), 0.5))
    with pytest.raises(ValueError, match=r"std=\[1, 0\] must be positive"):
        Normalizer([0, 0], [1, 0])
