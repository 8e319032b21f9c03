"""The linear measurement operators: laws of their mathematics and of the contract."""

import copy
import io

import jsonargparse
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

from equireg.noise import SampleNoise, Stream
from equireg.operators import (
    BoxInpainting,
    CircularBlur,
    GaussianDeblur,
    LinearOperator,
    MotionDeblur,
    RandomInpainting,
    SuperResolution,
    conjugate_gradients,
)
from equireg.operators.blur import gaussian_taps

OPERATORS = {
    "box": BoxInpainting(box_size=6, box_size_max=8, margin=(2, 3), sigma_y=0.1),
    "outpainting": BoxInpainting(box_size=9, margin=2, outpainting=True),
    "random": RandomInpainting(fraction=(0.3, 0.7)),
    "gaussian": GaussianDeblur(kernel_size=9, sigma_kernel=0.8),
    "wide_gaussian": GaussianDeblur(kernel_size=9, sigma_kernel=3.0),
    "motion": MotionDeblur(kernel_size=13, intensity=0.6),
    "circular": CircularBlur(kernel_size=7, sigma_kernel=1.2),
    "sr4": SuperResolution(factor=4),
    "sr3": SuperResolution(factor=3),
}
WITH_SVD = [name for name in OPERATORS if name not in ("motion", "circular")]
DRAWN = [name for name, operator in OPERATORS.items() if operator.parameter_names and name != "circular"]
SHAPES = [(3, 16, 16), (1, 18, 23), (2, 24, 17)]
SEEDS = [5, 6, 7]

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


@every_operator
@every_shape
def test_adjoint_satisfies_its_definition(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    x, y = randn(3, *shape), randn(3, *operator.y_shape(shape), seed=1)
    assert operator(x).shape == y.shape
    torch.testing.assert_close(inner(operator(x), y), inner(x, operator.adjoint(y)), rtol=1e-12, atol=1e-12)


@every_operator
@every_shape
def test_adjoint_is_the_gradient_of_the_forward_map(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    x, y = randn(3, *shape).requires_grad_(), randn(3, *operator.y_shape(shape), seed=1)
    (gradient,) = torch.autograd.grad(inner(operator(x), y).sum(), x)
    torch.testing.assert_close(operator.adjoint(y), gradient, rtol=1e-12, atol=1e-12)


@every_operator
def test_an_image_is_measured_with_its_own_parameters_whatever_the_batch(name):
    shape = SHAPES[1]
    x = randn(3, *shape)
    together = OPERATORS[name].realize(shape, SEEDS)
    alone = [OPERATORS[name].realize(shape, [seed]) for seed in SEEDS]
    y = together(x)
    for apply in (
        lambda operator, x, y: operator(x),
        lambda operator, x, y: operator.adjoint(y),
        lambda operator, x, y: operator.pinv(y, ridge=0.1),
        lambda operator, x, y: operator.back_projection(y),
        lambda operator, x, y: operator.baseline(y, shape),
    ):
        rows = [apply(operator, x[i : i + 1], y[i : i + 1]) for i, operator in enumerate(alone)]
        # conjugate gradients magnify the last bits
        torch.testing.assert_close(apply(together, x, y), torch.cat(rows), rtol=1e-9, atol=1e-9)
    assert [together.fingerprint(i) for i in range(3)] == [operator.fingerprint(0) for operator in alone]


@every_operator
def test_float32_is_kept_and_agrees_with_float64(name):
    shape = SHAPES[2]
    operator = OPERATORS[name].realize(shape, SEEDS)
    x = randn(3, *shape, dtype=torch.float32)
    y = operator(x)
    assert y.dtype == operator.adjoint(y).dtype == operator.pinv(y, ridge=0.1).dtype == torch.float32
    torch.testing.assert_close(y.double(), operator(x.double()), rtol=0, atol=3e-6)


@every_operator
def test_autocast_does_not_lower_the_precision(name):
    shape = SHAPES[0]
    operator = OPERATORS[name].realize(shape, SEEDS)
    x = randn(3, *shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, back = operator(x), operator.adjoint(operator(x))
    assert torch.equal(y, operator(x))
    assert torch.equal(back, operator.adjoint(operator(x)))


@every_operator
def test_gradients_work_after_a_first_use_in_inference_mode(name):
    shape = (1, 19, 26)  # a size that no other test has put into the memory of matrices
    operator = copy.deepcopy(OPERATORS[name]).realize(shape, SEEDS)
    x = randn(3, *shape, dtype=torch.float32)
    with torch.inference_mode():
        operator.pinv(operator(x), ridge=0.1)
    x.requires_grad_()
    loss = operator.pinv(operator(x), ridge=0.1).square().sum()
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@every_operator
def test_copies_and_pickles_measure_alike(name):
    shape = SHAPES[0]
    operator = OPERATORS[name].realize(shape, SEEDS)
    x = randn(3, *shape)
    y = operator(x)
    file = io.BytesIO()
    torch.save(operator, file)
    file.seek(0)
    for twin in (copy.copy(operator), copy.deepcopy(operator), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert twin.fingerprint(1) == operator.fingerprint(1)


@every_operator
@every_shape
def test_pinv_minimises_the_regularised_problem(name, shape):
    operator, ridge = OPERATORS[name].realize(shape, SEEDS), 0.03
    y = randn(3, *operator.y_shape(shape))
    x = operator.pinv(y, ridge)
    residual = operator.adjoint(operator(x) - y) + ridge * x  # the normal equations
    assert residual.norm() <= 2e-5 * operator.adjoint(y).norm()  # conjugate gradients stop at 1e-5


@pytest.mark.parametrize("name", ["box", "outpainting", "random", "sr4", "sr3"])
@every_shape
def test_pinv_reproduces_measurable_data(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    y = operator(randn(3, *shape))
    torch.testing.assert_close(operator(operator.pinv(y)), y, rtol=1e-10, atol=1e-10)


def test_super_resolution_can_meet_any_measurement():
    operator = OPERATORS["sr4"].realize((3, 30, 46), SEEDS)
    y = randn(3, *operator.y_shape((3, 30, 46)))
    torch.testing.assert_close(operator(operator.pinv(y)), y, rtol=1e-10, atol=1e-10)
    single = y.float()
    torch.testing.assert_close(operator(operator.pinv(single)), single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wide_gaussian", "motion"])
def test_blurs_that_cannot_be_inverted_ask_for_a_ridge(name):
    operator = OPERATORS[name].realize(SHAPES[0], SEEDS)
    with pytest.raises(ValueError, match="must be positive"):
        operator.pinv(randn(3, *SHAPES[0]))


@every_operator
def test_a_negative_ridge_is_refused(name):
    operator = OPERATORS[name].realize(SHAPES[0], SEEDS)
    with pytest.raises(ValueError, match=r"ridge=-0\.1 must"):
        operator.pinv(operator(randn(3, *SHAPES[0])), ridge=-0.1)


def test_motion_deblur_says_when_the_ridge_is_too_small():
    operator = OPERATORS["motion"].realize(SHAPES[0], SEEDS)
    with pytest.raises(ValueError, match="larger ridge"):
        operator.pinv(randn(3, *SHAPES[0]), ridge=1e-12)


@pytest.mark.parametrize("name", WITH_SVD)
@every_shape
def test_svd_is_a_decomposition_of_the_operator(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    svd = operator.svd(shape)
    x, y = randn(3, *shape), randn(3, *operator.y_shape(shape), seed=1)
    v = randn(3, x[0].numel(), seed=2)
    s, present = svd.singular_values, svd.present
    assert s.shape == present.shape
    assert s.shape[1] == x[0].numel()
    assert (s >= 0).all()
    assert not s[~present].any()

    torch.testing.assert_close(svd.U(s * svd.Vt(x)), operator(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.V(s * svd.Ut(y)), operator.adjoint(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.V(svd.Vt(x)), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.Vt(svd.V(v)), v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.Ut(svd.U(v)), present * v, rtol=1e-12, atol=1e-12)
    measurable = operator.pinv(y, ridge=1.0)  # U reaches all of y where A does
    torch.testing.assert_close(svd.U(svd.Ut(operator(measurable))), operator(measurable), rtol=1e-12, atol=1e-12)


def test_a_threshold_drops_small_singular_values():
    operator, shape = OPERATORS["wide_gaussian"], (1, 18, 23)
    whole, cut = operator.svd(shape), operator.svd(shape, threshold=0.03)
    assert 0 < cut.present.sum() < whole.present.sum()
    assert not cut.singular_values[~cut.present].any()
    assert torch.equal(cut.singular_values[cut.present], whole.singular_values[cut.present])
    assert cut.singular_values[cut.present].min() >= 0.03**2


def test_motion_deblur_has_no_svd():
    with pytest.raises(ValueError, match="no closed-form"):
        OPERATORS["motion"].svd((3, 16, 16))


@pytest.mark.parametrize("name", DRAWN)
def test_draws_depend_on_the_seed_alone(name):
    shape, operator = SHAPES[1], OPERATORS[name]
    (parameter,) = operator.parameter_names
    np.random.seed(0)
    first = getattr(operator.realize(shape, [1, 2, 1]), parameter)
    np.random.rand(3)
    second = getattr(operator.realize(shape, [2, 1]), parameter)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], second[0])
    assert torch.equal(first[0], second[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("operator_class", [BoxInpainting, RandomInpainting, MotionDeblur])
def test_a_shared_draw_ignores_the_seeds_of_the_images(operator_class):
    shape = (1, 200, 180)
    (name,) = operator_class.parameter_names
    shared = getattr(operator_class(shared=True, shared_seed=3).realize(shape, [1, 2]), name)
    alone = getattr(operator_class().realize(shape, [3]), name)
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], alone[0])


def test_realize_leaves_the_description_untouched():
    operator = RandomInpainting()
    operator.realize((3, 8, 8), [0])
    assert "mask" not in dict(operator.named_buffers())
    assert operator.image_shape is None


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.92, 1.0])
def test_random_inpainting_hides_an_exact_number_of_pixels_in_all_channels(fraction):
    operator = RandomInpainting((fraction, fraction)).realize((3, 9, 14), SEEDS)
    hidden = (operator(torch.ones(3, 3, 9, 14)) == 0).flatten(2).sum(-1)
    assert (hidden == int(9 * 14 * fraction)).all()


def test_a_box_keeps_its_margins():
    operator = BoxInpainting(box_size=3, box_size_max=5, margin=(2, 4)).realize((3, 12, 16), range(200))
    hidden = 1 - operator.mask[:, 0]
    rows, columns = hidden.amax(2), hidden.amax(1)
    assert set(rows.sum(1).tolist()) == set(columns.sum(1).tolist()) == {3, 4, 5}
    assert torch.equal(hidden, rows[:, :, None] * columns[:, None, :])
    assert not rows[:, :2].any()
    assert not rows[:, -2:].any()
    assert not columns[:, :4].any()
    assert not columns[:, -4:].any()


def test_outpainting_shows_what_inpainting_hides():
    shape = (3, 16, 20)
    box, rest = (BoxInpainting(5, margin=2, outpainting=flag).realize(shape, SEEDS) for flag in (False, True))
    assert torch.equal(box.mask + rest.mask, torch.ones_like(box.mask))


@pytest.mark.parametrize("poisson_rate", [None, 1.0])
def test_noise_lands_on_masked_pixels_unless_told_otherwise(poisson_rate):
    shape = (3, 16, 16)
    measured = {}
    for flag in (True, False):
        operator = RandomInpainting(noise_on_masked=flag, poisson_rate=poisson_rate).realize(shape, SEEDS)
        noise = SampleNoise([0, 1, 2], seed=0, stream=Stream.MEASUREMENT)
        measured[flag] = operator.measure(torch.zeros(3, *shape), noise)
    hidden = (operator.mask == 0).expand(-1, 3, -1, -1)
    assert measured[True][hidden].std() > 0.01
    assert not measured[False][hidden].any()
    assert torch.equal(measured[True][~hidden], measured[False][~hidden])


@pytest.mark.parametrize("name", ["gaussian", "wide_gaussian", "motion", "sr4", "sr3"])
@every_shape
def test_blurs_and_reductions_keep_constant_images(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    constant = torch.full((3, *operator.y_shape(shape)), 0.3, dtype=torch.float64)
    y = operator(torch.full((3, *shape), 0.3, dtype=torch.float64))
    torch.testing.assert_close(y, constant, rtol=1e-6, atol=0)  # motion kernels are float32


@pytest.mark.parametrize(("kernel_size", "sigma"), [(61, 3.0), (25, 1.5), (9, 0.8), (9, 3.0), (3, 2.0)])
def test_gaussian_taps_are_scipys(kernel_size, sigma):
    impulse = np.zeros((kernel_size, kernel_size))
    impulse[kernel_size // 2, kernel_size // 2] = 1
    taps = gaussian_taps(kernel_size, sigma)
    np.testing.assert_allclose(np.outer(taps, taps), scipy.ndimage.gaussian_filter(impulse, sigma), rtol=0, atol=1e-16)


@pytest.mark.parametrize("name", ["gaussian", "wide_gaussian", "motion"])
@every_shape
def test_blurs_are_correlations_of_the_reflected_image(name, shape):
    operator = OPERATORS[name].realize(shape, SEEDS)
    if name == "motion":
        kernels = operator.kernel.double()
    else:
        taps = torch.from_numpy(gaussian_taps(operator.kernel_size, operator.sigma_kernel))
        kernels = torch.outer(taps, taps).expand(3, -1, -1)
    x = randn(3, *shape)
    r = operator.kernel_size // 2
    padded = F.pad(x, (r, r, r, r), mode="reflect").flatten(0, 1)[None]
    weight = kernels.repeat_interleave(shape[0], dim=0)[:, None]
    expected = F.conv2d(padded, weight, groups=len(weight)).view_as(x)
    torch.testing.assert_close(operator(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 9, 31, 61])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_motion_kernels_of_any_size_are_distributions(kernel_size, intensity):
    kernel = MotionDeblur(kernel_size, intensity).realize((1, 64, 64), SEEDS).kernel
    assert kernel.shape == (3, kernel_size, kernel_size)
    assert (kernel >= 0).all()
    torch.testing.assert_close(kernel.sum((1, 2)), torch.ones(3))


def test_given_kernels_may_have_another_size_than_drawn_ones():
    kernel = torch.full((2, 5, 5), 1 / 25)
    operator = MotionDeblur().with_parameters({"kernel": kernel}, (1, 8, 9))
    x = randn(2, 1, 8, 9)
    torch.testing.assert_close(operator(x)[:, :, 4, 4], x[:, :, 2:7, 2:7].mean((2, 3)))


def test_super_resolution_is_torchs_antialiased_bicubic_away_from_the_border():
    x = randn(1, 3, 48, 64)
    y = SuperResolution(4)(x)
    expected = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=0, atol=1e-6)
    assert (y - expected).abs().max() > 1e-3


def test_back_projection_of_super_resolution_repeats_pixels():
    y = randn(1, 3, 4, 5)
    repeated = y.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.equal(SuperResolution(4).back_projection(y), repeated)
    odd = SuperResolution(4).realize((3, 15, 18), [0])
    assert odd.back_projection(y).shape == (1, 3, 15, 18)


@every_operator
def test_the_baseline_has_the_shape_of_the_image_and_beats_a_grey_one(name):
    shape = (2, 24, 30)
    ramp = torch.linspace(-0.8, 0.8, 24).view(24, 1) * torch.linspace(-1, 1, 30)
    x = ramp.expand(3, *shape) + 0.1
    operator = OPERATORS[name].realize(shape, SEEDS)
    y = operator.measure(x, SampleNoise(SEEDS, seed=0, stream=Stream.MEASUREMENT))
    baseline = operator.baseline(y, shape)
    assert baseline.shape == x.shape
    assert (baseline - x).norm() < (x - x.mean()).norm()


def test_inpainting_baseline_continues_linear_images():
    x = torch.linspace(-1, 1, 20).expand(3, 2, 16, 20)  # harmonic, also at the free upper and lower border
    operator = OPERATORS["box"].realize((2, 16, 20), SEEDS)
    baseline = operator.baseline(operator(x), (2, 16, 20))
    torch.testing.assert_close(baseline, x, rtol=0, atol=1e-3)
    everything_hidden = RandomInpainting((1.0, 1.0)).realize((2, 16, 20), SEEDS)
    assert not everything_hidden.baseline(everything_hidden(x), (2, 16, 20)).any()


def test_conjugate_gradients_report_what_did_not_converge():
    scale = torch.linspace(1, 100, 36, dtype=torch.float64).view(1, 6, 6)
    b = randn(2, 1, 6, 6)
    b[0, :, :, 1:] = 0
    b[0, :, 1:] = 0
    x, converged = conjugate_gradients(lambda x: scale * x, b, tolerance=1e-10, max_iterations=3)
    assert converged.tolist() == [True, False]
    torch.testing.assert_close(x[0], b[0] / scale)


INVALID_ARGUMENTS = [
    (BoxInpainting, {"box_size": 0}, "box_size=0"),
    (BoxInpainting, {"box_size": 8, "box_size_max": 7}, "box_size_max=7"),
    (BoxInpainting, {"margin": -1}, "margin=-1"),
    (BoxInpainting, {"shared_seed": -1}, "shared_seed=-1"),
    (RandomInpainting, {"fraction": (0.5, 1.2)}, r"fraction=\(0.5, 1.2\)"),
    (RandomInpainting, {"fraction": (0.6, 0.5)}, r"fraction=\(0.6, 0.5\)"),
    (GaussianDeblur, {"kernel_size": 60}, "kernel_size=60 must be odd"),
    (GaussianDeblur, {"sigma_kernel": 0.0}, "sigma_kernel=0.0"),
    (MotionDeblur, {"kernel_size": 0}, "kernel_size=0"),
    (MotionDeblur, {"intensity": 1.5}, "intensity=1.5"),
    (MotionDeblur, {"shared_seed": 2**32}, "shared_seed=4294967296"),
    (SuperResolution, {"factor": 1}, "factor=1"),
    (SuperResolution, {"sigma_y": -0.1}, "sigma_y=-0.1"),
    (SuperResolution, {"poisson_rate": 0.0}, "poisson_rate=0.0"),
]


@pytest.mark.parametrize(("operator_class", "arguments", "message"), INVALID_ARGUMENTS)
def test_bad_arguments_are_named(operator_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        operator_class(**arguments)


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (BoxInpainting(32, margin=32), (3, 64, 64), "margin=32 on both sides needs a height of at least 97, got 64"),
        (BoxInpainting(8, margin=4), (3, 20, 16), "a width of at least 17, got 16"),
        (GaussianDeblur(61), (3, 32, 30), "61x61 pixels needs images of at least 31 pixels.* got 32x30"),
        (MotionDeblur(61), (3, 30, 64), "61x61 pixels needs images of at least 31 pixels"),
        (SuperResolution(8), (3, 64, 7), "64x7 pixels cannot be reduced by factor=8"),
    ],
)
def test_images_that_do_not_fit_are_refused(operator, shape, message):
    with pytest.raises(ValueError, match=message):
        operator.realize(shape, [0])


@pytest.mark.parametrize(
    ("operator", "parameters", "message"),
    [
        (RandomInpainting(), {}, "needs mask"),
        (RandomInpainting(), {"mask": torch.ones(2, 1, 8, 9)}, r"must be \(batch, 1, 8, 8\)"),
        (RandomInpainting(), {"mask": torch.ones(2, 3, 8, 8)}, r"must be \(batch, 1, 8, 8\)"),
        (RandomInpainting(), {"mask": torch.full((2, 1, 8, 8), 0.5)}, r"zeros and ones, got values in \[0.5, 0.5\]"),
        (MotionDeblur(), {}, "needs kernel"),
        (MotionDeblur(), {"kernel": torch.full((2, 4, 4), 1 / 16)}, "odd k"),
        (MotionDeblur(), {"kernel": torch.full((2, 3, 5), 1 / 15)}, "odd k"),
        (MotionDeblur(), {"kernel": torch.full((3, 3), 1 / 9)}, "odd k"),
        (MotionDeblur(), {"kernel": torch.full((2, 3, 3), torch.nan)}, "finite"),
        (MotionDeblur(), {"kernel": torch.ones(2, 3, 3)}, "the sum 1 .* got 9"),
        (MotionDeblur(), {"kernel": torch.full((2, 17, 17), 1 / 289)}, "17x17 pixels needs"),
    ],
)
def test_given_parameters_that_do_not_fit_are_refused(operator, parameters, message):
    with pytest.raises(ValueError, match=message):
        operator.with_parameters(parameters, (3, 8, 8))


@pytest.mark.parametrize(
    "operator_class", [BoxInpainting, RandomInpainting, GaussianDeblur, MotionDeblur, SuperResolution]
)
def test_the_command_line_builds_every_operator(operator_class):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(LinearOperator, "operator")
    config = parser.parse_args([f"--operator=equireg.operators.{operator_class.__name__}", "--operator.sigma_y=0.01"])
    operator = parser.instantiate_classes(config).operator
    assert type(operator) is operator_class
    assert operator.sigma_y == 0.01
    assert operator.realize((3, 256, 256), [0]).image_shape == (3, 256, 256)


def test_the_command_line_takes_intervals_and_margins():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(RandomInpainting, "random")
    parser.add_class_arguments(BoxInpainting, "box")
    config = parser.parse_args(["--random.fraction=[0.92, 0.92]", "--box.margin=[2, 3]", "--box.box_size_max=130"])
    built = parser.instantiate_classes(config)
    assert built.random.fraction == (0.92, 0.92)
    assert built.box.margin == (2, 3)
    assert built.box.box_size_max == 130
