"""The exact prior of the Helmholtz equation, and what guidance makes of it."""

import pytest
import torch
from torch import Tensor

from equireg.metrics import relative_l2
from equireg.noise import SampleNoise, Stream
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.pde.linear_mmse import HelmholtzFields
from equireg.pde.random_fields import exponential_covariance
from equireg.priors.gaussian_field import GaussianFieldPrior
from lightning_modules import FieldPiGDM, FunDPS

SIZE = 12


@pytest.fixture(scope="module")
def law() -> HelmholtzFields:
    return HelmholtzFields(SIZE)


@pytest.fixture(scope="module")
def prior(law: HelmholtzFields) -> GaussianFieldPrior:
    return GaussianFieldPrior(law, "helmholtz")


@pytest.fixture(scope="module")
def fields() -> Tensor:
    return HelmholtzLaw(SIZE).sample(range(24), 0, "test")


@pytest.mark.parametrize("noise", ["exponential", "white"])
def test_its_denoiser_is_the_conditional_mean(noise: str, law: HelmholtzFields, fields: Tensor) -> None:
    """mu + C (C + sigma^2 K)^-1 (x - mu), with the matrices written out."""
    prior = GaussianFieldPrior(law, "helmholtz", noise, noise_scale=0.3)
    count = 2 * SIZE**2
    unit = torch.eye(count, dtype=torch.float64).view(count, 2, SIZE, SIZE)
    scale = prior.normalizer.std.double() / 0.5
    covariance = (law.covariance(unit / scale) / scale).flatten(1)
    one = torch.eye(SIZE**2, dtype=torch.float64)
    k = torch.block_diag(*2 * [exponential_covariance(SIZE, 0.3) if noise == "exponential" else one])
    x = prior.normalize(fields[:3].double()) + torch.randn(3, 2, SIZE, SIZE, dtype=torch.float64)
    mean = prior.normalize(law.mean)
    expected = mean + (covariance @ torch.linalg.solve(covariance + 0.49 * k, (x - mean).flatten(1).T)).T.view_as(x)
    torch.testing.assert_close(prior.denoise(x, 0.7), expected, rtol=0, atol=1e-8)


def test_its_samples_have_the_law_of_the_fields(law: HelmholtzFields, prior: GaussianFieldPrior) -> None:
    noise = SampleNoise(range(800), 0, Stream.SAMPLER)
    steps = prior.steps(30)
    x = steps[0].sigma * prior.draw_noise(noise, (2, SIZE, SIZE), like=torch.zeros(1, dtype=torch.float64))
    for step in steps:
        x, _ = prior.heun_step(x, step)
    middle = SIZE // 2 * SIZE + SIZE // 2
    points = torch.tensor([middle, middle + 1, middle + SIZE**2])  # a twice, u once
    values = prior.denormalize(x).flatten(1)[:, points]
    covariance = law.between(points)
    spread = covariance.diagonal().sqrt()
    torch.testing.assert_close(
        values.T @ values / 800 / spread / spread[:, None], covariance / spread / spread[:, None], rtol=0, atol=0.15
    )  # 800 samples


def test_guidance_brings_fundps_towards_the_posterior_mean(
    law: HelmholtzFields, prior: GaussianFieldPrior, fields: Tensor
) -> None:
    """The exact posterior mean is the bar that nothing passes on average; more steps come nearer to it."""
    indices = list(range(len(fields)))
    operator = Sensors("inverse", count=20).realize((2, SIZE, SIZE), indices)
    y = operator(fields)

    def error(x_hat: Tensor) -> float:
        return relative_l2(x_hat[:, 0], fields[:, 0].to(x_hat)).mean().item()

    best = error(law.estimate(y, operator.positions))
    errors = [error(FunDPS(prior, operator, num_steps, weight=40.0)(y, indices, operator)) for num_steps in (15, 60)]
    assert best < errors[1] < errors[0] < 1


@pytest.mark.parametrize("sigma_y", [0.0, 0.001])
def test_pseudo_inverse_guidance_ends_at_the_posterior_mean(
    sigma_y: float, law: HelmholtzFields, prior: GaussianFieldPrior, fields: Tensor
) -> None:
    """From the middle of the initial noise, for sensors on both fields, without and with measurement noise."""
    indices = list(range(6))
    operator = Sensors("both", count=12, sigma_y=sigma_y).realize((2, SIZE, SIZE), indices)
    y = operator.measure(fields[:6], SampleNoise(indices, 0, Stream.MEASUREMENT))
    module = FieldPiGDM(prior, operator, num_steps=60, ridge=1e-8, sigma_max=3000.0, temperature=0.0)
    expected = law.estimate(y, operator.positions, sigma_y)
    scale = fields.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(
        module(y, indices, operator) / scale, expected / scale, rtol=0, atol=0.01, check_dtype=False
    )  # in units of the fields' standard deviation; 60 steps, and a chain that does not start at infinity


def test_the_posterior_covariance_is_the_jacobian_of_the_denoiser_times_the_noise(prior: GaussianFieldPrior) -> None:
    """Tweedie's second moment: Cov[x_0 | x] = sigma^2 J K."""
    sigma, positions = 0.4, torch.tensor([[30, 75, 200, 260]])
    x = torch.zeros(1, 2, SIZE, SIZE, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: prior.denoise(v, sigma).flatten()[positions[0]], x)
    expected = sigma**2 * prior.noise.covariance(jacobian[:, 0]).flatten(1)[:, positions[0]]
    torch.testing.assert_close(prior.covariance_between(positions, sigma)[0], expected)


def test_a_field_of_another_size_is_refused(prior: GaussianFieldPrior) -> None:
    with pytest.raises(ValueError, match=r"fields are \(2, 16, 16\), the Gaussian prior is on \(2, 12, 12\)"):
        prior.check_shape((2, 16, 16))
