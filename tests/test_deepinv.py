"""Physics of the library deepinv as operators: contract, refusals, restorations."""

import importlib
import sys

import pytest
import torch
from torch import Tensor

from equireg.gaussian import posterior
from equireg.noise import SampleNoise, Stream
from equireg.operators import LinearOperator, Operator
from equireg.priors import GaussianPrior
from lightning_modules import DPS, DiffPIR, PosteriorSampler

physics = pytest.importorskip("deepinv.physics")

from equireg.operators.deepinv import DeepInv, LinearDeepInv  # noqa: E402  needs the optional library

SHAPE = (1, 16, 16)
MASK = (torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def tomography(angles: int = 20, **options: bool) -> "physics.Tomography":
    return physics.Tomography(angles=angles, img_width=16, normalize=True, **options)


LINEAR = {
    "tomography": (tomography, SHAPE),
    "mri": (lambda: physics.MRI(mask=MASK), (2, 16, 16)),
    "compressed_sensing": (lambda: physics.CompressedSensing(m=60, img_size=SHAPE), SHAPE),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=LINEAR)
def linear(request: pytest.FixtureRequest) -> LinearOperator:
    make, shape = LINEAR[request.param]
    return LinearDeepInv(make()).realize(shape, [1, 2, 3])


def test_the_adjoint_satisfies_its_definition_and_is_the_gradient(linear: LinearOperator) -> None:
    x = randn(3, *linear.image_shape).requires_grad_()
    y = randn(3, *linear.y_shape(linear.image_shape), seed=1)
    measured = linear(x)
    assert measured.shape == y.shape
    back = linear.adjoint(y)
    torch.testing.assert_close((measured * y).flatten(1).sum(1), (x * back).flatten(1).sum(1), rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad((measured * y).sum(), x)
    torch.testing.assert_close(back, gradient, rtol=0, atol=1e-5)


def test_images_are_measured_and_inverted_on_their_own(linear: LinearOperator) -> None:
    x = randn(3, *linear.image_shape)
    for apply in (linear, lambda x: linear.pinv(linear(x), 0.1), lambda x: linear.baseline(linear(x), x.shape[1:])):
        alone = torch.cat([apply(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(apply(x), alone, rtol=0, atol=1e-4)


def test_the_regularised_inverse_solves_its_equation(linear: LinearOperator) -> None:
    y = linear(randn(2, *linear.image_shape))
    x = linear.pinv(y, ridge=0.05)
    torch.testing.assert_close(linear.adjoint(linear(x)) + 0.05 * x, linear.adjoint(y), rtol=0, atol=1e-4)


def test_a_physics_with_singular_values_has_a_pseudo_inverse_the_others_say_no() -> None:
    mri = LinearDeepInv(physics.MRI(mask=MASK)).realize((2, 16, 16), [0])
    y = mri(randn(2, 2, 16, 16))
    torch.testing.assert_close(mri(mri.pinv(y)), y, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"ridge=0\.0 must be positive: LinearDeepInv is not invertible"):
        LinearDeepInv(tomography()).pinv(randn(1, 1, 23, 20))


def test_a_nonlinear_physics_is_differentiated() -> None:
    fold = physics.SpatialUnwrapping(threshold=0.5)
    operator = DeepInv(fold).realize(SHAPE, [0, 1])
    x = randn(2, *SHAPE).requires_grad_()
    assert torch.equal(operator(x), fold.A(x))
    (gradient,) = torch.autograd.grad(operator(x).sum(), x)
    assert (gradient != 0).any()
    with pytest.raises(ValueError, match="physics SpatialUnwrapping is not linear; DeepInv takes it"):
        LinearDeepInv(fold)


def test_the_noise_is_ours_and_reproducible(linear: LinearOperator) -> None:
    x = randn(3, *linear.image_shape)
    y = linear.measure(x, SampleNoise([4, 5, 6], 0, Stream.MEASUREMENT))
    alone = linear.measure(x[1:2], SampleNoise([5], 0, Stream.MEASUREMENT))
    torch.testing.assert_close(y[1:2], alone, rtol=0, atol=1e-5)
    assert (y - linear(x)).std().item() == pytest.approx(0.05, rel=0.2)


def test_a_physics_given_by_its_name_is_that_physics() -> None:
    arguments = {"angles": 20, "img_width": 16, "normalize": True}
    x = randn(2, *SHAPE)
    torch.testing.assert_close(LinearDeepInv("Tomography", arguments)(x), LinearDeepInv(tomography())(x))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "equireg.operators.deepinv")
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(ImportError, match=r"pip install 'equireg\[deepinv\]'"):
        importlib.import_module("equireg.operators.deepinv")


def test_other_settings_are_another_measurement() -> None:
    prints = [LinearDeepInv(tomography(angles)).fingerprint(0) for angles in (5, 5, 6)]
    assert prints[0] == prints[1] != prints[2]
    masks = [LinearDeepInv(physics.MRI(mask=mask)).fingerprint(0) for mask in (MASK, 1 - MASK)]
    assert masks[0] != masks[1]


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: DeepInv(physics.Denoising(physics.GaussianNoise(0.1))), SHAPE, "its own noise .GaussianNoise."),
        (lambda: LinearDeepInv(tomography()), (1, 32, 32), "physics Tomography cannot measure images of 1x32x32: "),
        (lambda: LinearDeepInv(physics.MRI(mask=MASK)), SHAPE, "physics MRI cannot measure images of 1x16x16: "),
        (lambda: LinearDeepInv(tomography(adjoint_via_backprop=False)), SHAPE, "is not the adjoint of A .relative"),
        (lambda: DeepInv(tomography().stack(tomography())), SHAPE, "measures TensorLists that are not real tensors"),
        (lambda: DeepInv("Tomografy"), SHAPE, "physics='Tomografy' is unknown; available: .*, Tomography"),
        (lambda: DeepInv("Tomography", {"angle": 3}), SHAPE, "physics Tomography refuses arguments=.*'img_width'"),
        (
            lambda: DeepInv(tomography(), {"angles": 3}),
            SHAPE,
            "arguments belong to a physics that is given by its name",
        ),
    ],
    ids=["noise", "size", "channels", "adjoint", "stack", "unknown", "arguments", "both"],
)
def test_what_does_not_fit_is_refused(make, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().realize(shape, [0])


@pytest.fixture(scope="module")
def smooth_prior() -> GaussianPrior:
    """Images whose pixels are correlated over three pixels."""
    place = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    covariance = 0.25 * torch.exp(-torch.cdist(place, place).square() / (2 * 3**2))
    return GaussianPrior(torch.zeros(SHAPE), covariance + 1e-4 * torch.eye(256))


SAMPLERS = {
    "DPS": lambda prior, operator: DPS(prior, operator, num_steps=100, zeta=2.0),
    "DiffPIR": lambda prior, operator: DiffPIR(prior, operator, num_steps=30),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_tomography_is_restored_nearly_as_well_as_can_be(make, smooth_prior: GaussianPrior) -> None:
    network = smooth_prior.network
    x = ((randn(3, 256) * network.eigenvalues.sqrt()) @ network.eigenvectors.T).view(3, *SHAPE)
    module: PosteriorSampler = make(smooth_prior, LinearDeepInv(tomography(), sigma_y=0.05))
    operator: Operator = module.operator.realize(SHAPE, [0, 1, 2])
    y = operator.measure(x, SampleNoise([0, 1, 2], 0, Stream.MEASUREMENT))
    restored = module(y, [0, 1, 2], operator)

    matrix = operator(torch.eye(256).view(256, *SHAPE)).flatten(1).T
    covariance = (network.eigenvectors * network.eigenvalues) @ network.eigenvectors.T
    best = torch.stack([posterior(network.mean, covariance, matrix, row.flatten(), 0.05)[0] for row in y])
    pictures = (restored, best.view_as(x), operator.baseline(y, SHAPE))
    error, least, plain = ((picture - x).flatten(1).norm(dim=1) for picture in pictures)
    assert (error < 2 * least).all()
    assert (error < 0.5 * plain).all()
