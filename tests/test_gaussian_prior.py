"""The Gaussian prior knows its denoiser, its schedule and what it is asked about; time maps; the posterior."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from equireg.gaussian import posterior
from equireg.noise import SampleNoise, Stream
from equireg.priors import GaussianPrior, VPPrior, make_betas, time_of_sigma
from tests.test_priors import Known

SHAPE = (2, 3, 4)


@pytest.fixture(scope="module")
def gaussian() -> tuple[Tensor, Tensor]:
    """A mean and a covariance of fields of this shape, in float64."""
    generator = torch.Generator().manual_seed(0)
    n = math.prod(SHAPE)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    return torch.randn(*SHAPE, generator=generator, dtype=torch.float64), root @ root.T


def bayes(gaussian: tuple[Tensor, Tensor], x: Tensor, sigma: float) -> Tensor:
    """E[x_0 | x_0 + sigma n = x] by the joint Gaussian."""
    mean, covariance = gaussian
    noisy = covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
    shift = torch.linalg.solve(noisy, (x - mean).flatten(1).T)
    return mean + (covariance @ shift).T.view_as(x)


def test_the_gaussian_prior_is_the_exact_denoiser(gaussian: tuple[Tensor, Tensor]) -> None:
    prior = GaussianPrior(*gaussian)
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sigma in (0.02, 0.5, 7.0, 100.0):  # between the timesteps; they are told in float32
        torch.testing.assert_close(prior.denoise(x, sigma), bayes(gaussian, x, sigma), rtol=1e-6, atol=1e-6)
    for step in prior.schedule(7):
        denoised = prior(x, step)
        scale, sigma = math.sqrt(step.alpha_bar), math.sqrt((1 - step.alpha_bar) / step.alpha_bar)
        torch.testing.assert_close(denoised.x0_hat, bayes(gaussian, x / scale, sigma))
        torch.testing.assert_close(scale * denoised.x0_hat + math.sqrt(1 - step.alpha_bar) * denoised.eps, x)


def test_ancestral_steps_draw_from_the_gaussian_prior() -> None:
    """4000 independent pixels with mean 0.3 and variance 0.25, after 200 steps."""
    n = 400
    prior = GaussianPrior(torch.full((1, 20, 20), 0.3), 0.25 * torch.eye(n))
    noise = SampleNoise(range(10), 0, Stream.SAMPLER)
    x = noise.randn((1, 20, 20), like=torch.zeros(()))
    for step in prior.schedule(200):
        x = prior.ancestral_step(x, prior(x, step), step, noise)
    assert x.mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ((1, 2, 2), torch.eye(3), "covariance is (3, 3), a mean of (1, 2, 2) needs n x n"),
        ((1, 1, 2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "covariance must be symmetric"),
        ((1, 1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "its least eigenvalue is -1"),
    ],
)
def test_what_is_no_covariance_is_refused(mean: tuple, covariance: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        GaussianPrior(torch.zeros(mean), covariance)
    assert message in str(error.value)


def test_the_gaussian_prior_takes_its_own_shape_only(gaussian: tuple[Tensor, Tensor]) -> None:
    prior = GaussianPrior(*gaussian)
    prior.check_shape(SHAPE)
    with pytest.raises(ValueError, match=r"images are \(2, 3, 8\), the Gaussian prior is on \(2, 3, 4\)"):
        prior.check_shape((2, 3, 8))


def test_the_posterior_is_that_of_the_precisions(gaussian: tuple[Tensor, Tensor]) -> None:
    mean, covariance = gaussian[0].flatten(), gaussian[1] + 0.1 * torch.eye(24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    y = torch.randn(5, generator=generator, dtype=torch.float64)
    precision = covariance.inverse() + matrix.T @ matrix / 0.3**2
    expected = torch.linalg.solve(precision, covariance.inverse() @ mean + matrix.T @ y / 0.3**2)
    ours, ours_covariance = posterior(mean, covariance, matrix, y, 0.3)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_covariance, precision.inverse())


def test_the_native_time_of_a_timesteps_sigma_is_the_timestep() -> None:
    alpha_bar = np.cumprod(1 - make_betas("scaled_linear", 1000, 0.0015, 0.0195))
    for t in (0, 1, 500, 999):
        sigma = math.sqrt((1 - alpha_bar[t]) / alpha_bar[t])
        assert time_of_sigma(sigma, alpha_bar, "native") == pytest.approx(t, abs=1e-9)
    assert time_of_sigma(1e-3, alpha_bar, "native") == 0
    assert time_of_sigma(1e3, alpha_bar, "native") == 999


@pytest.mark.parametrize(
    ("sigma", "vp_linear", "ddpm", "ldm"),
    [(0.1, 27.0, 26.4, 5.6), (1.0, 258.7, 258.1, 254.0), (10.0, 675.4, 673.7, 736.8)],
)
def test_published_times_fit_the_linear_schedule_and_not_latent_diffusions(
    sigma: float, vp_linear: float, ddpm: float, ldm: float
) -> None:
    linear = np.cumprod(1 - make_betas("linear", 1000, 1e-4, 0.02))
    latent = np.cumprod(1 - make_betas("scaled_linear", 1000, 0.0015, 0.0195))
    assert time_of_sigma(sigma, latent, "vp_linear") == pytest.approx(vp_linear, abs=0.05)
    assert time_of_sigma(sigma, linear, "native") == pytest.approx(ddpm, abs=0.2)
    assert time_of_sigma(sigma, latent, "native") == pytest.approx(ldm, abs=0.2)


@pytest.mark.parametrize(
    ("sigma", "published", "native"), [(0.1, 11.3, 10.4), (1.0, 354.9, 353.9), (10.0, 936.0, 933.5)]
)
def test_stable_diffusions_published_times_are_one_to_three_timesteps_off(
    sigma: float, published: float, native: float
) -> None:
    alpha_bar = np.cumprod(1 - make_betas("scaled_linear", 1000, 0.00085, 0.012))
    assert time_of_sigma(sigma, alpha_bar, "vp_scaled_linear") == pytest.approx(published, abs=0.05)
    assert time_of_sigma(sigma, alpha_bar, "native") == pytest.approx(native, abs=0.2)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_parameterisation_denoises_alike(prediction: str) -> None:
    """A network that knows x_0 is asked about it at a real-valued time."""
    prior = VPPrior.from_network(Known(), prediction=prediction)
    x_0, n, sigma = torch.rand(1, 1, 4, 4).double(), torch.randn(1, 1, 4, 4).double(), 3.0
    alpha_bar = torch.tensor(1 / (1 + sigma**2)).double()
    prior.network.answer = prior.target(x_0, n, alpha_bar)
    torch.testing.assert_close(prior.denoise(x_0 + sigma * n, sigma), x_0)
