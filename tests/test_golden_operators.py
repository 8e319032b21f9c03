"""Parity of the linear measurement operators with the published code, see operators.md beside the golden files."""

import re

import numpy as np
import torch
from torch import Tensor

from equireg.operators import BoxInpainting, GaussianDeblur, MotionDeblur, Operator, RandomInpainting, SuperResolution
from equireg.operators.blur import gaussian_taps
from equireg.operators.motion_kernel import motion_kernel, motion_path, rasterise
from equireg.operators.super_resolution import bicubic_matrix
from tests.golden import GoldenArrays, parametrize_golden

BLUR_TOLERANCE = 5e-6
"""The published blur sums thousands of products in float32; it is itself 1e-6 away from the exact result."""


@parametrize_golden("op_inpainting*.npz")
def test_golden_inpainting(golden):
    arrays = GoldenArrays(golden)
    x, data = arrays.image("x_u8"), arrays.image("data_u8")
    shape = tuple(x.shape[1:])

    random = RandomInpainting(fraction=tuple(arrays["mask_rand_prob"].tolist()), sigma_y=float(arrays["sigma"]))
    random = random.realize(shape, [int(arrays["mask_rand_seed"])])
    assert np.array_equal(random.mask[0, 0].numpy(), unpack(arrays["mask_rand"], *shape[1:]))
    arrays.check("y_rand", random(x))
    arrays.check("y_rand_noisy", random.measure(x, Replay(arrays.tensor("noise_f32")[None])))
    arrays.check("ortho_project", data - random.adjoint(random(data)))
    y = random(x)
    arrays.check("project", (y - random(y)) - random(data))  # the published formula, which mixes up its arguments

    smallest, past_largest = arrays["mask_box_len"].tolist()
    box = BoxInpainting(smallest, past_largest - 1, margin=tuple(arrays["mask_box_margin"].tolist()))
    box = box.realize(shape, [int(arrays["mask_box_seed"])])
    assert np.array_equal(box.mask[0, 0].numpy(), unpack(arrays["mask_box"], *shape[1:]))
    arrays.check("y_box", box(x))

    for name, fraction in {"70": (0.70, 0.71), "92": (0.92, 0.93), "dps": (0.3, 0.7)}.items():
        mask = RandomInpainting(fraction).realize((3, 256, 256), [int(arrays["mask256_seed"])]).mask[0, 0].numpy()
        assert np.array_equal(mask, unpack(arrays[f"mask256_rand_{name}"], 256, 256))
        assert (mask == 0).sum() == arrays[f"mask256_rand_{name}_zeros"]

    for name in (name for name in arrays.arrays if re.fullmatch(r"box256_margin\d+", name)):
        corners = arrays[name]
        box = BoxInpainting(int(corners[0, 2] - corners[0, 0]), margin=int(name.removeprefix("box256_margin")))
        masks = box.realize((3, 256, 256), arrays["box256_seeds"].tolist()).mask
        for mask, (top, left, bottom, right) in zip(masks[:, 0], corners, strict=True):
            assert (mask[top:bottom, left:right] == 0).all()
            assert (mask == 0).sum() == (bottom - top) * (right - left)


@parametrize_golden("op_gaussian_blur*.npz")
def test_golden_gaussian_blur(golden):
    arrays = GoldenArrays(golden)
    x, v = arrays.image("x_u8"), arrays.tensor("v_f16")[None]
    size, sigma = int(arrays["kernel_size"]), float(arrays["sigma_kernel"])
    taps = torch.from_numpy(gaussian_taps(size, sigma))
    arrays.check("kernel", torch.outer(taps, taps), tolerance=1e-12)

    blur = GaussianDeblur(size, sigma).realize(tuple(x.shape[1:]), [0])
    arrays.check("y", blur(x), BLUR_TOLERANCE)
    arrays.check("vjp", blur.adjoint(v), BLUR_TOLERANCE)
    arrays.check("vjp", gradient(blur, x, v), BLUR_TOLERANCE)
    arrays.check("ortho_project", x - blur.back_projection(blur(x)), BLUR_TOLERANCE)


@parametrize_golden("op_motion_blur*.npz")
def test_golden_motion_blur(golden):
    arrays = GoldenArrays(golden)
    size, intensity = int(arrays["kernel_size"]), float(arrays["intensity"])
    for seed, raster in zip(arrays["kernel_seeds"].tolist(), arrays["kernels_u8"], strict=True):
        path = motion_path(size, intensity, np.random.RandomState(seed))
        assert np.array_equal(rasterise(path, size), raster)
    path = motion_path(size, float(arrays["intensity2"]), np.random.RandomState(int(arrays["kernel2_seed"])))
    assert np.array_equal(rasterise(path, size), arrays["kernel2_u8"])

    rng = Recorder(int(arrays["kernel_seeds"][0]))
    path = motion_path(size, intensity, rng)
    assert rng.names == arrays["seed0_draw_names"].tolist()
    np.testing.assert_allclose(rng.values, arrays["seed0_draw_values"], rtol=1e-9, atol=0)
    np.testing.assert_allclose(path, arrays["seed0_path"], rtol=1e-9, atol=0)
    lengths = np.hypot(*np.diff(path, axis=0).T)
    np.testing.assert_allclose(lengths, arrays["seed0_steps"][1:], rtol=1e-9, atol=1e-12)

    rng = np.random.RandomState(int(arrays["operator_seed"]))
    motion_kernel(size, intensity, rng)  # the published operator draws two kernels and uses the second
    kernel = torch.from_numpy(motion_kernel(size, intensity, rng))
    arrays.check("kernel", kernel, tolerance=0)

    x, v = arrays.image("x_u8"), arrays.tensor("v_f16")[None]
    blur = MotionDeblur(size, intensity).with_parameters({"kernel": kernel[None]}, tuple(x.shape[1:]))
    arrays.check("y", blur(x), BLUR_TOLERANCE)
    arrays.check("vjp", blur.adjoint(v), BLUR_TOLERANCE)
    arrays.check("vjp", gradient(blur, x, v), BLUR_TOLERANCE)


@parametrize_golden("op_super_resolution*.npz")
def test_golden_super_resolution(golden):
    arrays = GoldenArrays(golden)
    x, v, data = arrays.image("x_u8"), arrays.tensor("v_f16")[None], arrays.image("data_u8")
    factor = int(arrays["factor"])
    reduce = SuperResolution(factor)
    for axis, n in zip("HW", x.shape[-2:], strict=True):
        weights, columns = arrays[f"weights_{axis}"], arrays[f"fov_{axis}"]
        matrix = np.zeros((weights.shape[1], n))
        np.add.at(matrix, (np.arange(weights.shape[1]), columns), weights)
        np.testing.assert_allclose(bicubic_matrix(n, factor).numpy(), matrix, rtol=0, atol=1e-6)

    whole = reduce.realize(tuple(x.shape[1:]), [0])
    arrays.check("y", whole(x))
    arrays.check("vjp", whole.adjoint(v))
    arrays.check("vjp", gradient(whole, x, v))
    arrays.check("transpose_of_y", reduce.back_projection(arrays.tensor("y")[None]))
    arrays.check("project", data - whole.back_projection(whole(data) - arrays.tensor("y")[None]))

    x, v = arrays.tensor("x_odd_f16")[None], arrays.tensor("v_odd_f16")[None]
    odd = reduce.realize(tuple(x.shape[1:]), [0])
    arrays.check("y_odd", odd(x))
    arrays.check("vjp_odd", odd.adjoint(v))
    arrays.check("vjp_odd", gradient(odd, x, v))
    arrays.check("y_f", SuperResolution(int(arrays["factor_f"]))(arrays.tensor("x_f")[None]))


class Replay:
    """Noise that was recorded."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        assert self.noise.shape == (len(like), *shape)
        return self.noise


class Recorder:
    """A generator that writes down its draws."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)
        self.names: list[str] = []
        self.values: list[float] = []

    def __getattr__(self, name: str):
        def draw(*args: float) -> float:
            self.names.append(name)
            self.values.append(getattr(self.rng, name)(*args))
            return self.values[-1]

        return draw


def unpack(bits: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.unpackbits(bits)[: height * width].reshape(height, width)


def gradient(operator: Operator, x: Tensor, v: Tensor) -> Tensor:
    """Gradient of <A(x), v> with respect to x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad((operator(x) * v).sum(), x)[0]
