"""What every posterior sampler promises; a new sampler joins by one line in SAMPLERS."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equireg.mpe import Encoder, PriorDecoder
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
from lightning_modules import DPS, MeasurementBaseline, PosteriorSampler

Make = Callable[[VPPrior, Operator], PosteriorSampler]

SAMPLERS: dict[str, Make] = {
    "DPS": lambda prior, operator: DPS(prior, operator, num_steps=4, zeta=0.5),
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


def penalty(encoder: Encoder, weight: float = 1.0, group: str = "d4") -> Regularizer:
    return Regularizer(encoder, group, WeightSchedule(weight))


@sampler
@operators
def test_a_restoration_has_the_shape_of_the_image(
    make: Make, make_operator: Callable[[], Operator], tiny_prior: VPPrior, images: Tensor
) -> None:
    x0 = restore(make(tiny_prior, make_operator()), images, [0, 1])
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
    module.attach(penalty(copy.deepcopy(encoder).double()))
    images = images.double()
    alone = torch.cat([restore(module, images, [i]) for i in range(6)])
    batches = [list(range(i, min(i + batch_size, 6))) for i in range(0, 6, batch_size)]
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
    module.attach(penalty(encoder, weight=0.0))
    assert torch.equal(restore(module, images, [0, 1]), plain)
    module.detach_penalty()
    module.attach(penalty(encoder, weight=50.0))
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
    module.attach(penalty(encoder, group="hflip"))
    wide = torch.cat([images[:2], images[2:4]], dim=-1)
    assert restore(module, wide, [0, 1]).shape == (2, 1, 16, 32)


@sampler
def test_a_latent_regulariser_is_refused_on_pixels(make: Make, tiny_prior: VPPrior) -> None:
    with pytest.raises(ValueError, match=r"PriorDecoder takes latent inputs, .* samples in pixel space"):
        make(tiny_prior, SuperResolution(4)).attach(Regularizer(PriorDecoder(), "hflip", WeightSchedule(1.0)))


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
