"""What every posterior sampler promises; a new sampler joins by one line in SAMPLERS."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.mpe import MPE, Encoder, PriorDecoder
from equireg.noise import SampleNoise, Stream, hash_seed
from equireg.operators import (
    BoxInpainting,
    GaussianDeblur,
    LinearOperator,
    MotionDeblur,
    Operator,
    RandomInpainting,
    SuperResolution,
)
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import (
    DAPS,
    DDRM,
    DPS,
    MCG,
    MPGD,
    MPGDAE,
    PSLD,
    SITCOM,
    DiffPIR,
    LatentDAPS,
    MeasurementBaseline,
    PosteriorSampler,
    ReSample,
)
from tests.conftest import TINY_AUTOENCODER, make_latent_prior

Make = Callable[[VPPrior, Operator], PosteriorSampler]


def mpgd_ae(prior: VPPrior, operator: Operator) -> MPGDAE:
    dtype = next(prior.parameters()).dtype
    autoencoder = Autoencoder("random", "kl", TINY_AUTOENCODER).to(dtype)
    return MPGDAE(prior, operator, autoencoder, num_steps=5, scale=1.0, window=(0.1, 0.9))


def psld(prior: VPPrior, operator: Operator) -> PSLD:
    latent_prior = make_latent_prior(dtype=next(prior.parameters()).dtype)
    return PSLD(latent_prior, operator, num_steps=4, omega=1.0, gamma=0.1, eta=0.5)


def latent_daps(prior: VPPrior, operator: Operator) -> LatentDAPS:
    latent_prior = make_latent_prior("vq", next(prior.parameters()).dtype)
    return LatentDAPS(latent_prior, operator, num_steps=3, ode_steps=2, mcmc_steps=3, tau=0.05)


def resample(prior: VPPrior, operator: Operator) -> ReSample:
    """Optimises in pixels before j = 3 and j = 2, in the latent before j = 1 and at the end."""
    latent_prior = make_latent_prior("vq", next(prior.parameters()).dtype)
    iterations = {"pixel_iterations": 2, "latent_iterations": 2, "tolerance": 0.05}
    return ReSample(latent_prior, operator, num_steps=5, every=1, splits=2, lookahead=1, **iterations)


SAMPLERS: dict[str, Make] = {
    "DPS": lambda prior, operator: DPS(prior, operator, num_steps=4, zeta=0.5),
    "DDRM": lambda prior, operator: DDRM(prior, operator, num_steps=4),
    "MCG": lambda prior, operator: MCG(prior, operator, num_steps=4, ridge=0.1),
    "DiffPIR": lambda prior, operator: DiffPIR(prior, operator, num_steps=5),
    "MPGD": lambda prior, operator: MPGD(prior, operator, num_steps=4, scale=1.0),
    "MPGDAE": mpgd_ae,
    "SITCOM": lambda prior, operator: SITCOM(prior, operator, num_steps=3, inner_steps=2, equi_steps=1),
    "PSLD": psld,
    "ReSample": resample,
    "DAPS": lambda prior, operator: DAPS(prior, operator, num_steps=3, ode_steps=2, mcmc_steps=3, tau=0.05),
    "LatentDAPS": latent_daps,
}
"""Samplers that a penalty can push; few steps, since these tests are about the contract."""

OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "super_resolution": lambda: SuperResolution(4),
    "box_inpainting": lambda: BoxInpainting(box_size=6, margin=2),
    "random_inpainting": lambda: RandomInpainting(),
    "gaussian_deblur": lambda: GaussianDeblur(7, 1.0),
    "motion_deblur": lambda: MotionDeblur(9, 0.5),
}

sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
operators = pytest.mark.parametrize("make_operator", OPERATORS.values(), ids=OPERATORS.keys())


def measure(operator: Operator, x: Tensor, indices: list[int]) -> tuple[Operator, Tensor]:
    realised = operator.realize(tuple(x.shape[1:]), [hash_seed(0, Stream.OPERATOR, i) % 2**32 for i in indices])
    return realised, realised.measure(x, SampleNoise(indices, 0, Stream.MEASUREMENT))


def restore(module: PosteriorSampler, images: Tensor, indices: list[int]) -> Tensor:
    operator, y = measure(module.operator, images[indices], indices)
    return module(y, indices, operator)


def penalty(function: MPE, weight: float = 1.0, group: str = "d4") -> Regularizer:
    return Regularizer(function, group, WeightSchedule(weight))


def function_for(module: PosteriorSampler, encoder: Encoder) -> MPE:
    """An MPE function of the space that the module samples in."""
    return encoder if module.space == "pixel" else PriorDecoder()


@sampler
@operators
def test_a_restoration_has_the_shape_of_the_image(
    make: Make, make_operator: Callable[[], Operator], tiny_prior: VPPrior, images: Tensor
) -> None:
    module = make(tiny_prior, make_operator())
    refusal = module.supports(module.operator)
    if refusal:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            restore(module, images, [0, 1])
        return
    x0 = restore(module, images, [0, 1])
    assert x0.shape == images[:2].shape
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()
    assert not x0.requires_grad


@sampler
@operators
@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_sample_does_not_depend_on_its_batch(
    make: Make,
    make_operator: Callable[[], Operator],
    batch_size: int,
    tiny_prior: VPPrior,
    encoder: Encoder,
    images: Tensor,
) -> None:
    # float64: four steps with a random network amplify the last bits of float32 beyond any useful tolerance
    module = make(copy.deepcopy(tiny_prior).double(), make_operator())
    if module.supports(module.operator):
        pytest.skip("refused, as tested above")
    module.attach(penalty(function_for(module, copy.deepcopy(encoder).double())))
    images = images.double()
    alone = torch.cat([restore(module, images, [i]) for i in range(3)])
    batches = [list(range(i, min(i + batch_size, 3))) for i in range(0, 3, batch_size)]
    together = torch.cat([restore(module, images, batch) for batch in batches])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@sampler
def test_the_same_sample_is_the_same_bit_for_bit(make: Make, tiny_prior: VPPrior, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    assert torch.equal(restore(module, images, [3, 4]), restore(module, images, [3, 4]))


@sampler
def test_draws_share_the_measurement_and_differ(make: Make, tiny_prior: VPPrior, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    operator, y = measure(module.operator, images[[0, 0]], [0, 0])
    assert torch.equal(y[0], y[1])
    x0 = module(y, [0, 0], operator, draws=[0, 1])
    assert not torch.allclose(x0[0], x0[1], atol=1e-2)


@sampler
def test_the_penalty_moves_the_result_and_weight_zero_does_not(
    make: Make, tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    module = make(tiny_prior, SuperResolution(4))
    plain = restore(module, images, [0, 1])
    module.attach(penalty(function_for(module, encoder), weight=0.0))
    assert torch.equal(restore(module, images, [0, 1]), plain)
    module.detach_penalty()
    module.attach(penalty(function_for(module, encoder), weight=50.0))
    assert (restore(module, images, [0, 1]) - plain).abs().max() > 1e-3


@sampler
def test_listeners_hear_every_step_once(make: Make, tiny_prior: VPPrior, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    heard = []
    module.listeners.append(lambda module, step, x0_hat: heard.append((step.k, step.num_steps, x0_hat.requires_grad)))
    restore(module, images, [0])
    assert heard == [(k, len(heard), False) for k in range(len(heard))]


@sampler
def test_the_prior_is_frozen_and_no_graph_survives(make: Make, tiny_prior: VPPrior, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    restore(module, images, [0])
    assert not any(p.requires_grad or p.grad is not None for p in module.prior.parameters())


@sampler
def test_images_need_not_be_square(make: Make, tiny_prior: VPPrior, encoder: Encoder, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    module.attach(penalty(function_for(module, encoder), group="hflip"))
    wide = torch.cat([images[:2], images[2:4]], dim=-1)
    assert restore(module, wide, [0, 1]).shape == (2, 1, 16, 32)


@sampler
def test_a_regulariser_of_the_other_space_is_refused(make: Make, tiny_prior: VPPrior, encoder: Encoder) -> None:
    module = make(tiny_prior, SuperResolution(4))
    function, spaces = (PriorDecoder(), "latent inputs, .* samples in pixel")
    if module.space == "latent":
        function, spaces = encoder, "pixel inputs, .* samples in latent"
    with pytest.raises(ValueError, match=f"{type(function).__name__} takes {spaces} space"):
        module.attach(penalty(function, group="hflip"))


@sampler
def test_a_prior_of_the_other_space_is_refused(make: Make, tiny_prior: VPPrior) -> None:
    module = make(tiny_prior, SuperResolution(4))
    other = tiny_prior if module.space == "latent" else make_latent_prior()
    with pytest.raises(ValueError, match=rf"samples in {module.space} space, {type(other).__name__} is a prior on"):
        type(module)(other, SuperResolution(4), **({"autoencoder": None} if type(module) is MPGDAE else {}))


@sampler
def test_a_diverged_image_leaves_the_others_as_they_are(make: Make, tiny_prior: VPPrior, images: Tensor) -> None:
    module = make(tiny_prior, SuperResolution(4))
    operator, y = measure(module.operator, images[[0, 1]], [0, 1])
    whole = module(y, [0, 1], operator)
    y[0] = torch.nan
    broken = module(y, [0, 1], operator)
    assert not broken[0].isfinite().all()
    torch.testing.assert_close(broken[1], whole[1], rtol=1e-4, atol=1e-4)  # sums are ordered by the whole batch


def test_two_regularisers_are_refused(tiny_prior: VPPrior, encoder: Encoder) -> None:
    module = DPS(tiny_prior, SuperResolution(4), num_steps=2)
    module.attach(penalty(encoder))
    with pytest.raises(ValueError, match="takes one EquiReg"):
        module.attach(penalty(encoder))


def test_dps_counts_one_forward_and_one_backward_per_step(tiny_prior: VPPrior, images: Tensor) -> None:
    module = DPS(tiny_prior, SuperResolution(4), num_steps=7)
    module.evaluations.reset()
    restore(module, images, [0, 1])
    assert (module.evaluations.forward, module.evaluations.backward) == (7, 7)


def test_dps_follows_the_data(tiny_prior: VPPrior, images: Tensor) -> None:
    """With an uninformative prior a larger zeta must bring A(x0) closer to y."""
    distances = []
    for zeta in (0.01, 1.0):
        module = DPS(tiny_prior, RandomInpainting(sigma_y=0.0), num_steps=30, zeta=zeta)
        operator, y = measure(module.operator, images[:2], [0, 1])
        distances.append((y - operator(module(y, [0, 1], operator))).norm().item())
    assert distances[1] < 0.7 * distances[0]


def test_dps_refuses_a_step_size_that_is_not_positive(tiny_prior: VPPrior) -> None:
    with pytest.raises(ValueError, match="zeta=0 must be positive"):
        DPS(tiny_prior, SuperResolution(4), zeta=0)


def test_the_measurement_baseline_is_the_operators_own(images: Tensor) -> None:
    operator, y = measure(SuperResolution(4), images[:2], [0, 1])
    module = MeasurementBaseline(SuperResolution(4))
    torch.testing.assert_close(module(y, [0, 1], operator), operator.baseline(y, (1, 16, 16)))
