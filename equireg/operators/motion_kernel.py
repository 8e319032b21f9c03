"""Random motion-blur kernels: a jittery camera path, drawn as a thin line and blurred a little.

The generator of LeviBorodenko/motionblur, which the kernels of DPS, ReSample, DAPS and SITCOM come from. The order of
the random draws and the rasterisation with Pillow belong to the definition: equal seeds give equal kernels to the bit.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

EPSILON = 0.1


def motion_kernel(size: int, intensity: float, rng: np.random.RandomState) -> np.ndarray:
    """One kernel (size, size), float32, not negative, with sum one.

    Args:
        size: side in pixels.
        intensity: 0 for a straight line to 1 for an erratic path.
        rng: numpy's legacy generator, advanced by one kernel.
    """
    raster = rasterise(motion_path(size, intensity, rng), size).astype(np.float32)
    return raster / raster.sum()


def motion_path(size: int, intensity: float, rng: np.random.RandomState) -> np.ndarray:
    """Points (n, 2) of the camera path as (x, y), on a canvas of 2 size x 2 size pixels."""
    diagonal = _diagonal(size)
    max_length = 0.75 * diagonal * (rng.uniform() + rng.uniform(0, intensity**2))
    steps = []
    while sum(steps) < max_length:
        step = rng.beta(1, 30) * (1 - intensity + EPSILON) * diagonal
        if step < max_length:
            steps.append(step)

    max_angle = rng.uniform(0, intensity * math.pi)
    jitter = rng.beta(2, 20)
    angles = [rng.uniform(-max_angle, max_angle)]
    for _ in steps[1:]:
        angle = rng.triangular(0, intensity * max_angle, max_angle + EPSILON)
        turns_back = rng.uniform() < jitter
        angles.append((-1 if turns_back else 1) * np.sign(angles[-1]) * angle)

    path = np.cumsum(np.array(steps) * np.exp(1j * np.array(angles)))
    path = (path - path.mean()) * np.exp(1j * rng.uniform(0, math.pi)) + (1 + 1j) * size
    return np.stack([path.real, path.imag], axis=1)


def rasterise(path: np.ndarray, size: int) -> np.ndarray:
    """The path as an 8-bit picture (size, size)."""
    diagonal = _diagonal(size)
    width = max(1, int(diagonal / 150))  # below 1 (size < 54) older Pillows draw 1, newer ones nothing
    canvas = Image.new("RGB", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).line([tuple(point) for point in path.tolist()], fill="white", width=width)
    canvas = canvas.filter(ImageFilter.GaussianBlur(radius=int(diagonal * 0.01)))
    return np.asarray(canvas.resize((size, size), resample=Image.Resampling.LANCZOS).convert("L"))


def _diagonal(size: int) -> float:
    """Diagonal of the canvas, which is twice as large as the kernel."""
    return math.sqrt(2) * 2 * size
