"""Random fields and solvers reproduce those of the published generators."""

from pathlib import Path

import torch
from torch import Tensor

from equireg.pde.helmholtz import Helmholtz
from equireg.pde.navier_stokes import NavierStokes
from equireg.pde.random_fields import ExponentialNoise, NeumannField, PeriodicField, exponential_covariance
from tests.golden import GoldenArrays, parametrize_golden


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def double(golden: GoldenArrays, name: str) -> Tensor:
    return torch.from_numpy(golden[name]).double()


@parametrize_golden("rbf_noise*.npz")
def test_noise_of_the_diffusion(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    scale, eps = float(arrays["scale"]), float(arrays["eps"])
    z = arrays.tensor("z")
    noise = ExponentialNoise(scale, eps, method="cholesky")
    arrays.check("sample", noise.from_normals(z), tolerance=1e-5)
    size = arrays["sample"].shape[-1]
    assert noise.normals_shape(arrays["sample"].shape[1:]) == z.shape[1:]
    if "cov_row0" in arrays:
        arrays.check("cov_row0", exponential_covariance(size, scale, eps)[0], tolerance=1e-6)


@parametrize_golden("ns_solver*.npz")
def test_periodic_field(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    field = PeriodicField(float(arrays["alpha"]), float(arrays["tau"]))
    actual = field.from_normals(double(arrays, "grf_normals"))
    assert relative_error(actual, double(arrays, "w0")) < 1e-5  # recorded in float32


@parametrize_golden("helmholtz_solver*.npz")
def test_neumann_field(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    law = float(arrays["alpha"]), float(arrays["tau"])
    for size in arrays["sizes"]:
        xi = double(arrays, f"xi_{size}").view(-1, size, size)
        for name, zero_edges in (("grf", False), ("a", True)):
            actual = NeumannField(*law, zero_edges=zero_edges).from_normals(xi)
            expected = double(arrays, f"{name}_{size}").view_as(actual)
            assert relative_error(actual, expected) < 1e-10, (size, name)


@parametrize_golden("ns_solver*.npz")
def test_navier_stokes(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    w_0 = double(arrays, "w0")
    settings = {name: float(arrays[key]) for name, key in (("viscosity", "visc"), ("dt", "dt"))}
    solver = NavierStokes(w_0.shape[-1], **settings, forcing=double(arrays, "forcing"))
    horizon = float(arrays["T"])
    records = solver.records(w_0, horizon, len(arrays["record_times"]))
    assert relative_error(records[..., 0], double(arrays, "w_mid_float64")) < 1e-10
    assert relative_error(records[..., -1], double(arrays, "w_T_float64")) < 1e-10
    # rounding drifts by 1e-4 in the published single-precision code
    assert relative_error(solver(w_0.float(), horizon), double(arrays, "w_T_float32")) < 5e-4


@parametrize_golden("helmholtz_solver*.npz")
def test_helmholtz(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    for size in arrays["sizes"]:
        actual = Helmholtz(int(size), float(arrays["k"]))(double(arrays, f"a_{size}"))
        assert relative_error(actual, double(arrays, f"u_{size}")) < 1e-10, size
