"""What DDRM, MCG, DiffPIR, MPGD and SITCOM promise beyond the contract of every sampler."""

import re

import pytest
import torch
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.mpe import Encoder
from equireg.noise import SampleNoise, Stream, hash_seed
from equireg.operators import (
    BoxInpainting,
    CircularBlur,
    GaussianDeblur,
    LinearOperator,
    MotionDeblur,
    Operator,
    RandomInpainting,
    SuperResolution,
)
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import DDRM, DPS, MCG, MPGD, MPGDAE, SITCOM, DiffPIR, PosteriorSampler
from lightning_modules.diffpir import skipped_timesteps
from lightning_modules.sitcom import Adam

SHAPE = (1, 16, 16)


class Saturation(Operator):
    """A nonlinear operator: clip(2 x, -1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).clamp(-1, 1)


class Divider(DPS):
    """A sampler that says it divides by the noise level."""

    needs_noise = True


def measure(operator: Operator, x: Tensor) -> tuple[Operator, Tensor]:
    indices = list(range(len(x)))
    realised = operator.realize(tuple(x.shape[1:]), [hash_seed(0, Stream.OPERATOR, i) % 2**32 for i in indices])
    return realised, realised.measure(x, SampleNoise(indices, 0, Stream.MEASUREMENT))


def restore(module: PosteriorSampler, images: Tensor) -> Tensor:
    operator, y = measure(module.operator, images)
    return module(y, list(range(len(images))), operator)


def gaussian_prior(side: int = 16) -> VPPrior:
    """The exact prior of white noise of unit variance: eps(x_t) = sqrt(1 - alpha_bar_t) x_t."""
    prior = VPPrior.from_network(White(side), clip=False)
    prior.network.alpha_bar = torch.from_numpy(prior.alpha_bar)
    return prior


class White(torch.nn.Module):
    in_channels, out_channels, side_divisor = 1, 1, 1

    def __init__(self, side: int) -> None:
        super().__init__()
        self.image_size = (side, side)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (1 - self.alpha_bar[t]).sqrt().view(-1, 1, 1, 1).to(x) * x


# What is refused


@pytest.mark.parametrize(
    ("sampler", "operator", "reason"),
    [
        (DDRM, Saturation(), "DDRM needs a linear operator, Saturation is not"),
        (MCG, Saturation(), "MCG needs a linear operator, Saturation is not"),
        (DDRM, MotionDeblur(9), "DDRM needs a closed-form singular value decomposition, MotionDeblur has none"),
        (Divider, SuperResolution(4, sigma_y=0.0), "divides by the noise level: sigma_y=0 of SuperResolution must be"),
        (Divider, SuperResolution(4, sigma_y=0.0, poisson_rate=1.0), None),
        (DiffPIR, Saturation(), None),
        (MPGD, Saturation(), None),
        (SITCOM, Saturation(), None),
        (DDRM, GaussianDeblur(7, sigma_y=0.0), None),
    ],
)
def test_what_a_sampler_cannot_do_is_told_before_any_network_call(
    sampler: type[PosteriorSampler], operator: Operator, reason: str | None, tiny_prior: VPPrior, images: Tensor
) -> None:
    answer = sampler.supports(operator)
    if reason is None:
        assert answer is None
        return
    assert reason in answer
    module = sampler(tiny_prior, operator)
    with pytest.raises(ValueError, match=re.escape(reason)):
        restore(module, images[:1])
    assert module.evaluations.forward == 0


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        (DDRM, {"num_steps": 0}, "num_steps=0 must be between 1 and 1000"),
        (DDRM, {"eta": 1.5}, "eta=1.5 must be in"),
        (DDRM, {"svd_threshold": -1.0}, "svd_threshold=-1.0 must not be negative"),
        (MCG, {"zeta": 0.0}, "zeta=0.0 must be positive"),
        (MCG, {"legacy_projection": True}, "published code's for blurs, not for SuperResolution"),
        (DiffPIR, {"num_steps": 1}, "num_steps=1 must be at least 2"),
        (DiffPIR, {"num_steps": 900}, "not repeat one of 1000 timesteps"),
        (DiffPIR, {"lam": 0.0}, "lam=0.0 must be positive"),
        (DiffPIR, {"paste_known": True}, "paste_known needs an inpainting operator, got SuperResolution"),
        (MPGD, {"scale": -1.0}, "scale=-1.0 must be positive"),
        (MPGD, {"num_steps": "ddim999"}, "no integer stride"),
        (SITCOM, {"inner_steps": 0}, "inner_steps=0 must be at least 1"),
        (SITCOM, {"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
    ],
)
def test_a_bad_argument_is_named(
    sampler: type[PosteriorSampler], arguments: dict, message: str, tiny_prior: VPPrior
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tiny_prior, SuperResolution(4), **arguments)


# Samplers that do not differentiate the network


@pytest.mark.parametrize("sampler", [DDRM, DiffPIR])
@pytest.mark.parametrize("regularised", [False, True])
def test_the_network_is_evaluated_without_an_autograd_graph(
    sampler: type[PosteriorSampler], regularised: bool, tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    module = sampler(tiny_prior, GaussianDeblur(7, 1.0), num_steps=4)
    if regularised:
        module.attach(Regularizer(encoder, "hflip", WeightSchedule(1.0)))
    modes = []
    handle = tiny_prior.network.register_forward_hook(
        lambda _, inputs, output: modes.append((torch.is_grad_enabled(), output.requires_grad))
    )
    restore(module, images[:2])
    handle.remove()
    assert modes
    assert set(modes) == {(False, False)}


@pytest.mark.parametrize("sampler", [DDRM, DiffPIR, MPGD, SITCOM, MCG])
def test_what_is_said_about_backward_passes_is_true(
    sampler: type[PosteriorSampler], tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    module = sampler(tiny_prior, RandomInpainting(), num_steps=4)
    restore(module, images[:1])
    assert (module.evaluations.backward > 0) == sampler.differentiates_prior


# DDRM


def test_ddrm_reproduces_noiseless_measurements_where_it_has_singular_values(
    tiny_prior: VPPrior, images: Tensor
) -> None:
    for operator in (RandomInpainting(sigma_y=0.0), SuperResolution(4, sigma_y=0.0)):
        module = DDRM(tiny_prior, operator, num_steps=20)
        operator, y = measure(operator, images)
        x0 = module(y, list(range(6)), operator)
        # the last step knows nothing of y beyond what the state carries, at the noise of the step before: sigma_50
        assert (operator(x0) - y).abs().mean() < 0.2 * (operator(torch.zeros_like(x0)) - y).abs().mean()


@pytest.mark.parametrize("operator", [RandomInpainting(), GaussianDeblur(7, 1.0)], ids=["inpainting", "deblur"])
def test_ddrm_measures_the_posterior_mean_under_a_gaussian_prior(operator: LinearOperator) -> None:
    """For x ~ N(0, I) the mean is A^T (A A^T + sigma^2 I)^-1 y; the average of the draws measures what it measures."""
    module = DDRM(gaussian_prior(), operator, num_steps=20)
    truth = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    operator, y = measure(operator, truth)
    average = torch.cat([module(y, [0], operator, draws=[draw]) for draw in range(40)]).mean(0, keepdim=True)
    mean = operator.pinv(y, ridge=operator.sigma_y**2)
    assert (operator(average) - operator(mean)).norm() < 0.06 * mean.norm()


# DiffPIR


def test_diffpir_solves_its_data_subproblem_the_same_way_by_every_route(images: Tensor) -> None:
    rho = torch.tensor([0.05, 0.3, 2.0]).view(-1, 1, 1, 1).double()
    x = images[:3].double()
    for operator in (
        RandomInpainting(),
        SuperResolution(4),
        GaussianDeblur(7, 1.0),
        MotionDeblur(9),
        CircularBlur(7, 1.0),
        CircularBlur(7, 1.0, factor=4),
    ):
        operator, y = measure(operator, images[3:6].double())
        z = x + DiffPIR(gaussian_prior(), operator).correction(operator)(y, x, rho)
        gradient = operator.adjoint(operator(z) - y) + rho * (z - x)
        assert gradient.norm() < 1e-4 * operator.adjoint(operator(x) - y).norm()


def test_diffpir_takes_a_gradient_step_for_a_nonlinear_operator(images: Tensor) -> None:
    operator, y = measure(Saturation(), images[:2])
    x = images[2:4]
    rho = torch.full((2, 1, 1, 1), 0.5)
    step = DiffPIR(gaussian_prior(), operator, lipschitz=4.0).correction(operator)(y, x, rho)
    inside = (2 * x).abs() <= 1
    torch.testing.assert_close(step, -2 * inside * (operator(x) - y) / 4.5)


@pytest.mark.parametrize("skip_type", ["quad", "uniform"])
def test_diffpir_walks_from_the_highest_level_to_the_lowest(skip_type: str) -> None:
    timesteps = skipped_timesteps(1000, 20, skip_type)
    assert (timesteps[0], timesteps[-1]) == (0, 999)
    assert timesteps == sorted(set(timesteps))
    assert len(timesteps) == (20 if skip_type == "quad" else 21)


def test_diffpir_pastes_what_is_known_and_returns_the_denoised_state_when_asked(
    tiny_prior: VPPrior, images: Tensor
) -> None:
    operator, y = measure(BoxInpainting(6, margin=2), images[:2])
    x = {
        options: DiffPIR(tiny_prior, operator, num_steps=4, **dict.fromkeys(options, True))(y, [0, 1], operator)
        for options in ((), ("paste_known",), ("return_x0",))
    }
    known = operator.mask.bool()
    torch.testing.assert_close(x["paste_known",][known], y[known])
    torch.testing.assert_close(x["paste_known",][~known], x[()][~known])
    assert x["return_x0",].abs().max() <= 1 < x[()].abs().max()


# MCG


def test_mcg_ends_on_the_measurement_when_asked(tiny_prior: VPPrior, images: Tensor) -> None:
    operator, y = measure(RandomInpainting(), images[:2])
    module = MCG(tiny_prior, operator, num_steps=3, final_replace=True)
    torch.testing.assert_close(operator(module(y, [0, 1], operator)), operator.mask * y)


def test_mcg_does_not_look_at_the_noise_on_masked_pixels(tiny_prior: VPPrior, images: Tensor) -> None:
    operator, y = measure(RandomInpainting(noise_on_masked=True), images[:2])
    module = MCG(tiny_prior, operator, num_steps=3)
    assert torch.equal(module(y, [0, 1], operator), module(operator.mask * y, [0, 1], operator))


def test_the_projection_of_mcg_moves_onto_the_measurement(tiny_prior: VPPrior, images: Tensor) -> None:
    for make_operator, remaining in (
        (lambda: RandomInpainting(sigma_y=0.0), 1e-6),
        (lambda: GaussianDeblur(7, 1.0, sigma_y=0.0), 0.1),
        (lambda: MotionDeblur(9, sigma_y=0.0), 0.1),
        (lambda: SuperResolution(4, sigma_y=0.0), 0.5),  # the nearest enlargement is not an inverse
    ):
        operator, y = measure(make_operator(), images[:2])
        x = images[2:4]
        projected = MCG(tiny_prior, operator).project(x, y, operator)
        assert (operator(projected) - y).norm() <= remaining * (operator(x) - y).norm()


def test_the_published_projection_of_blurs_can_be_asked_for(tiny_prior: VPPrior, images: Tensor) -> None:
    operator, y = measure(GaussianDeblur(7, 1.0), images[:2])
    module = MCG(tiny_prior, operator, num_steps=3, legacy_projection=True)
    expected = y - operator(y) - operator(images[2:4])
    torch.testing.assert_close(module.project(images[2:4], y, operator), expected)


# MPGD


def test_mpgd_ae_measures_the_round_trip_within_its_window_alone(
    tiny_prior: VPPrior, tiny_autoencoder: Autoencoder, images: Tensor
) -> None:
    module = MPGDAE(tiny_prior, SuperResolution(4), tiny_autoencoder, num_steps="ddim20")
    calls = []
    handle = tiny_autoencoder.register_forward_hook(lambda *_: calls.append(1))
    restore(module, images[:1])
    handle.remove()
    assert len(calls) == 3  # i = 7, 8, 9 of 20: the bounds themselves are outside
    inside = [step.k for step in module.steps if module.project(images[:1], step)[1] != module.scale]
    assert [19 - k for k in inside] == [9, 8, 7]


def test_a_separate_penalty_step_of_mpgd_has_the_size_that_is_asked(
    tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    """Twice the guidance's step size halves the weight in the loss, so that the penalty's own step stays the same."""
    weights = []
    for scale in (1.0, 2.0):
        module = MPGD(tiny_prior, SuperResolution(4), num_steps=2, scale=scale)
        schedule = WeightSchedule(1.0, scale="none")
        module.attach(Regularizer(encoder, "hflip", schedule, attachment="separate_step"))
        penalty_at = module.penalty_at
        module.penalty_at = lambda *args, at=penalty_at: weights.append(at(*args)) or weights[-1]
        restore(module, images[:1])
    torch.testing.assert_close(weights[0], 2 * weights[2])


# SITCOM


def test_sitcom_stops_every_image_at_its_noise_level(images: Tensor) -> None:
    operator, y = measure(SuperResolution(4), images[:3])
    y = torch.stack([y[0], y[1], y[2] + 100])  # the last one cannot be explained
    module = SITCOM(gaussian_prior(), operator, num_steps=2, inner_steps=200, learning_rate=0.05)
    x_t = SampleNoise([0, 1, 2], 0, Stream.SAMPLER).randn(SHAPE, like=y)
    step = module.steps[-1]
    x0_hat = module.consistent_estimate(x_t, step, y, operator)
    misfit = (operator(x0_hat) - y).flatten(1).square().mean(1).sqrt()
    goal = operator.sigma_y + module.stop_slack
    assert (misfit[:2] < goal).all()
    assert (misfit[:2] > 0.5 * goal).all()  # left alone from there on
    assert misfit[2] > goal
    alone = torch.cat([module.consistent_estimate(x_t[i : i + 1], step, y[i : i + 1], operator) for i in range(2)])
    torch.testing.assert_close(x0_hat[:2], alone, rtol=0, atol=1e-4)


def test_sitcom_stops_at_once_where_the_measurement_is_explained(tiny_prior: VPPrior, images: Tensor) -> None:
    module = SITCOM(tiny_prior, SuperResolution(4, sigma_y=100.0), num_steps=3, inner_steps=5)
    restore(module, images[:2])
    assert (module.evaluations.forward, module.evaluations.backward) == (3, 0)


def test_sitcom_makes_no_evaluation_that_changes_nothing(tiny_prior: VPPrior, images: Tensor) -> None:
    module = SITCOM(tiny_prior, SuperResolution(4, sigma_y=0.0), num_steps=3, inner_steps=5)
    restore(module, images[:2])
    assert (module.evaluations.forward, module.evaluations.backward) == (15, 12)


@pytest.mark.parametrize("noise_on_masked", [True, False])
def test_sitcom_stops_at_the_noise_that_y_carries(noise_on_masked: bool, images: Tensor) -> None:
    operator, y = measure(RandomInpainting((0.9, 0.9), noise_on_masked), images[:1])
    module = SITCOM(gaussian_prior(), operator, num_steps=1, inner_steps=300, learning_rate=0.02, inpaint_scale=0.0)
    x0 = module(y, [0], operator)
    known = (operator(x0) - y)[operator.mask.bool()].square().mean().sqrt()
    # the masked pixels are a constant of the published misfit: the known ones end where the sum crosses the goal
    assert (0.2 if noise_on_masked else 0.8) * operator.sigma_y < known < 1.5 * operator.sigma_y


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_adam_is_adam(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *SHAPE, generator=generator)
    gradients = torch.randn(steps, 3, *SHAPE, generator=generator)
    parameter = torch.nn.Parameter(x.clone())
    theirs = torch.optim.Adam([parameter], lr=0.1)
    ours = Adam(x, 0.1)
    for gradient in gradients:
        parameter.grad = gradient
        theirs.step()
        x = ours.step(x, gradient, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(x, parameter.detach(), rtol=0, atol=1e-6)


def test_an_image_that_pauses_keeps_its_state() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradients = torch.randn(1, *SHAPE, generator=generator), torch.randn(4, 1, *SHAPE, generator=generator)
    paused, straight = Adam(x, 0.1), Adam(x, 0.1)
    a = b = x
    for k, gradient in enumerate(gradients):
        active = torch.tensor([k != 1])
        a = paused.step(a, gradient, active)
        if active:
            b = straight.step(b, gradient, active)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_weight_of_equi_sitcom_hardly_matters_and_its_steps_do(
    tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    def run(weight: float, steps: int) -> Tensor:
        module = SITCOM(tiny_prior, SuperResolution(4), num_steps=2, inner_steps=2, equi_steps=steps)
        module.attach(Regularizer(encoder, "hflip", WeightSchedule(weight, scale="none"), reduction="sqnorm"))
        return restore(module, images[:1])

    reference = run(0.01, 3)
    assert (run(0.1, 3) - reference).abs().max() < 0.1 * (run(0.01, 6) - reference).abs().max()


# The operator with a closed form in Fourier space


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_circular_blur_is_a_periodic_convolution(factor: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 1, 8, 12, generator=generator, dtype=torch.float64)
    operator = CircularBlur(3, factor=factor).with_parameters({"kernel": kernel}, (1, 8, 12))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    flipped = kernel.flip(1, 2)[:, None]
    expected = torch.nn.functional.conv2d(padded.transpose(0, 1), flipped, groups=2).transpose(0, 1)
    y = operator(x)
    torch.testing.assert_close(y, expected[..., ::factor, ::factor])
    assert y.shape[1:] == operator.y_shape((1, 8, 12))
    v = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((y * v).sum(), (x * operator.adjoint(v)).sum())


def test_a_circular_blur_refuses_sides_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"at least 3 that are multiples of 4, got 8x10"):
        CircularBlur(3, factor=4).realize((1, 8, 10), [0])
    with pytest.raises(ValueError, match="kernel of 61x61 pixels"):
        CircularBlur().realize((1, 32, 32), [0])
