"""Parity of the nonlinear measurement operators with the published code, see operators.md beside the golden files."""

from pathlib import Path

import numpy as np
import torch

from equireg.operators import HighDynamicRange, NonlinearDeblur, PhaseRetrieval
from equireg.operators.nonlinear_deblur import LATENT_STD
from tests.golden import GoldenArrays, parametrize_golden
from tests.test_golden_operators import gradient

TOLERANCE = 1e-5


@parametrize_golden("op_phase_retrieval*.npz")
def test_golden_phase_retrieval(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    x, v = arrays.image("x_u8"), arrays.tensor("v_f16")[None]
    oversampling, resolution = float(arrays["oversample"]), int(arrays["resolution"])
    operator = PhaseRetrieval(oversampling, resolution)
    assert operator.padding(tuple(x.shape[1:])) == arrays["pad"]
    arrays.check("y", operator(x), TOLERANCE)
    # The phase of a spectrum near 0 amplifies the rounding of the FFT, in float32 beyond 1e-5 on some processors.
    arrays.check("vjp", gradient(operator, x.double(), v.double()), TOLERANCE)

    small = arrays.tensor("xs")[None]
    for name, signed in (("y_dps_crop", True), ("y_diffstategrad_crop", False)):
        fixed = PhaseRetrieval(2.0, resolution=4 * int(arrays["pad_fixed"]), signed=signed)
        y = fixed(small)
        assert y.shape == tuple(arrays["y_dps_shape"].tolist())
        arrays.check(name, y[..., 40:-40, 40:-40], TOLERANCE)


@parametrize_golden("op_hdr*.npz")
def test_golden_high_dynamic_range(golden: Path) -> None:
    arrays = GoldenArrays(golden)
    x, v = arrays.image("x_u8"), arrays.tensor("v_f16")[None]
    operator = HighDynamicRange(float(arrays["scale"]))
    arrays.check("y", operator(x))
    arrays.check("vjp", gradient(operator, x, v))
    edge = arrays.tensor("x_edge").view(1, 1, 1, -1)
    arrays.check("y_edge", operator(edge))
    arrays.check("grad_edge", gradient(operator, edge, torch.ones_like(edge)))


@parametrize_golden("op_nonlinear_blur*.npz")
def test_golden_nonlinear_blur(golden: Path, tmp_path: Path) -> None:
    arrays = GoldenArrays(golden)
    state = {name.removeprefix("w."): arrays.tensor(name) for name in arrays.arrays if name.startswith("w.")}
    torch.save(state, tmp_path / "tiny.pth")
    operator = NonlinearDeblur(str(tmp_path / "tiny.pth"))
    assert operator.network.latent_channels == arrays["kernel_dim"]

    x = arrays.image("x_u8")
    z = arrays.tensor("z_kernel")
    operator = operator.with_parameters({"kernel_latent": z}, tuple(x.shape[1:]))
    features = operator.network.feature_extractor((x + 1) / 2)
    arrays.check("features", features, TOLERANCE)
    arrays.check("adapter_out", operator.network.adapter.model(features, z), TOLERANCE)
    y, sub = operator(x), int(arrays["sub"])
    arrays.check("y_sub", y[..., ::sub, ::sub], TOLERANCE)
    np.testing.assert_allclose([y.mean().item(), y.std().item()], [arrays["y_mean"], arrays["y_std"]], atol=TOLERANCE)

    # float64: the gradient jumps where an activation is within rounding of its kink, and float32 convolutions differ
    v = np.random.RandomState(int(arrays["v_numpy_seed"])).randn(*x.shape).astype(np.float16).astype(np.float64)
    vjp = gradient(operator.double(), x.double(), torch.from_numpy(v))
    arrays.check("vjp_sub", vjp[..., :: 2 * sub, :: 2 * sub], TOLERANCE)
    np.testing.assert_allclose(vjp.norm().item(), arrays["vjp_norm"], rtol=TOLERANCE)

    latent = LATENT_STD * np.random.RandomState(0).randn(1, 512, 2, 2)
    np.testing.assert_allclose(latent.sum(), arrays["full_latent_seed0_sum"], rtol=1e-12)
    assert np.array_equal(latent.ravel()[:8].astype(np.float32), arrays["full_latent_seed0_head"])
