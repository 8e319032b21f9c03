"""DAPS and LatentDAPS: what they cost, what their settings mean, what happens when a chain diverges."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from equireg.mpe import Encoder, PriorDecoder
from equireg.noise import SampleNoise, Stream
from equireg.operators import RandomInpainting, SuperResolution
from equireg.priors import GaussianPrior, VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import DAPS, LatentDAPS
from tests.conftest import make_latent_prior

FEW = {"num_steps": 3, "ode_steps": 2, "mcmc_steps": 4}


def restore(module: DAPS, images: Tensor) -> Tensor:
    indices = list(range(len(images)))
    operator = module.operator.realize(tuple(images.shape[1:]), indices)
    return module(operator.measure(images, SampleNoise(indices, 0, Stream.MEASUREMENT)), indices, operator)


@pytest.mark.parametrize(
    ("prior_solver", "forwards"),
    [("gaussian", 3 * 2), ("score_t", 3 * (2 + 1)), ("score_min", 3 * (2 + 1)), ("exact", 3 * (2 + 4))],
)
def test_the_network_is_evaluated_along_the_flow_and_never_differentiated(
    prior_solver: str, forwards: int, tiny_prior: VPPrior, images: Tensor
) -> None:
    module = DAPS(tiny_prior, SuperResolution(4), **FEW, prior_solver=prior_solver)
    restore(module, images[:2])
    assert (module.evaluations.forward, module.evaluations.backward) == (forwards, 0)


def test_latent_daps_decodes_once_per_chain_step_and_once_at_the_end(images: Tensor) -> None:
    module = LatentDAPS(make_latent_prior(), SuperResolution(4), **FEW)
    restore(module, images[:2])
    assert (module.evaluations.forward, module.evaluations.backward) == (3 * 2, 0)
    passes = {"decodes": 3 * 4 + 1, "decode_backwards": 3 * 4, "encodes": 0, "encode_backwards": 0}
    assert module.evaluations.autoencoder == passes
    module.evaluations.reset()
    module.attach(Regularizer(PriorDecoder(), "hflip", WeightSchedule(1.0)))
    restore(module, images[:2])
    assert module.evaluations.autoencoder["decodes"] == 3 * (4 + 2) + 1
    assert module.evaluations.autoencoder["decode_backwards"] == 3 * (4 + 2)


def test_half_the_likelihood_is_tau_times_root_two(tiny_prior: VPPrior, images: Tensor) -> None:
    settings = FEW | {"eta": 1e-5}
    halved = DAPS(tiny_prior, SuperResolution(4), **settings, tau=0.02, likelihood_scale=0.5)
    published = DAPS(tiny_prior, SuperResolution(4), **settings, tau=0.02 * 2**0.5)
    torch.testing.assert_close(restore(halved, images[:2]), restore(published, images[:2]), rtol=1e-4, atol=1e-4)


def test_momentum_moves_the_chain_and_none_draws_no_velocity(tiny_prior: VPPrior, images: Tensor) -> None:
    draws = {}
    for momentum in (0.0, 0.5):
        module = DAPS(tiny_prior, SuperResolution(4), **FEW, momentum=momentum)
        noise = SampleNoise([0], 0, Stream.SAMPLER)
        randn, draws[momentum] = noise.randn, 0

        def count(*args: object, randn=randn, momentum: float = momentum, **kwargs: object) -> Tensor:
            draws[momentum] += 1
            return randn(*args, **kwargs)

        noise.randn = count
        operator = module.operator.realize((1, 16, 16), [0])
        with torch.enable_grad():
            module.sample(operator(images[:1]), operator, noise)
    assert draws == {0.0: 1 + 3 * (4 + 1), 0.5: 1 + 3 * (1 + 4 + 1)}


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_the_penalty_is_one_gradient_step_after_the_chain(
    space: str, tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    if space == "pixel":
        module, function = DAPS(tiny_prior, SuperResolution(4), **FEW | {"num_steps": 1}), encoder
    else:
        module, function = LatentDAPS(make_latent_prior(), SuperResolution(4), **FEW | {"num_steps": 1}), PriorDecoder()
    states = []
    module.listeners.append(lambda sampler, step, x0: states.append(x0))
    restore(module, images[:2])
    penalty = Regularizer(function, "hflip", WeightSchedule(0.7))
    module.attach(penalty)
    restore(module, images[:2])
    plain, pushed = states
    plain.requires_grad_()
    sigma = module.steps[0].sigma
    (gradient,) = torch.autograd.grad(
        0.7
        * sigma
        / (1 + sigma**2) ** 0.5
        * (penalty.defect(plain, torch.ones(2, dtype=torch.long)).flatten(1).norm(dim=1).sum()),
        plain,
    )
    torch.testing.assert_close(pushed, plain - gradient, rtol=1e-4, atol=1e-5)


def test_the_latent_gradient_is_clipped_before_tau_divides_it(images: Tensor) -> None:
    """The first step of a chain with next to no noise moves no element by more than clip eta / tau^2."""
    settings = {"num_steps": 1, "mcmc_steps": 1, "momentum": 0.0, "eta": 1e-12, "tau": 1e-7, "gradient_clip": 0.01}
    flows, chains = [], []
    module = LatentDAPS(make_latent_prior(), SuperResolution(4), **settings)
    flow = module.probability_flow
    module.probability_flow = lambda z, sigma: flows.append(flow(z, sigma)) or flows[-1]
    module.listeners.append(lambda sampler, step, z0: chains.append(z0))
    restore(module, images[:2])
    change = (chains[0] - flows[0]).abs()
    assert change.max() == pytest.approx(0.01 * 1e-12 / 1e-14, rel=1e-3)
    assert change.min() < 0.9 * change.max()


class FailsOnce(nn.Module):
    """An operator's stand-in: row 1 of the measurement is not a number at one call."""

    def __init__(self, operator: SuperResolution, call: int) -> None:
        super().__init__()
        self.operator, self.call, self.calls = operator, call, 0
        self.image_shape = operator.image_shape

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.operator(x)
        if self.calls == self.call:
            y = y * torch.tensor([1.0, torch.nan, 1.0]).view(3, 1, 1, 1)
        return y


def test_a_diverged_chain_starts_again_alone(tiny_prior: VPPrior, images: Tensor) -> None:
    module = DAPS(tiny_prior, SuperResolution(4), **FEW)
    operator = SuperResolution(4).realize((1, 16, 16), [0, 1, 2])
    y = operator(images[:3])
    noise = lambda: SampleNoise([0, 1, 2], 0, Stream.SAMPLER)  # noqa: E731
    with torch.enable_grad():
        well = module.sample(y, operator, noise())
        with pytest.warns(UserWarning, match=r"images \[1\] diverged at step 1"):
            restarted = module.sample(y, FailsOnce(operator, call=6), noise())
        lost = module.sample(y, FailsOnce(operator, call=11), noise())
    assert torch.equal(restarted[[0, 2]], well[[0, 2]])
    assert restarted[1].isfinite().all()
    assert (restarted[1] - well[1]).abs().max() > 1e-3
    assert torch.equal(lost[[0, 2]], well[[0, 2]])
    assert lost[1].isnan().all()  # nothing comes after the last chain: reported, not hidden


def test_a_transform_of_the_data_gradient_sees_every_chain_step_and_one_state_per_level(
    tiny_prior: VPPrior, images: Tensor
) -> None:
    module = DAPS(tiny_prior, SuperResolution(4), **FEW)
    seen = []

    def remove(gradient: Tensor, state: Tensor, iteration: int) -> Tensor:
        seen.append((iteration, state))
        return torch.zeros_like(gradient)

    remove.everything = True
    module.gradient_transforms.append(remove)
    without_data = restore(module, images[:2])
    assert [iteration for iteration, _ in seen] == [0, 1, 2, 3] * 3
    assert len({id(state) for _, state in seen}) == 3
    module.gradient_transforms.clear()
    assert (restore(module, images[:2]) - without_data).abs().max() > 1e-3


class Saved:
    """What a graph holds on to, counted as long as the graph lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("make", [DAPS, LatentDAPS])
def test_no_graph_outlives_its_step(make: type[DAPS], tiny_prior: VPPrior, encoder: Encoder, images: Tensor) -> None:
    module = make(tiny_prior if make is DAPS else make_latent_prior(), RandomInpainting(), **FEW)
    module.attach(Regularizer(encoder if make is DAPS else PriorDecoder(), "hflip", WeightSchedule(1.0)))
    saved, ever, alive = weakref.WeakSet(), [], []

    def pack(tensor: Tensor) -> Saved:
        ever.append(1)
        holder = Saved(tensor)
        saved.add(holder)
        return holder

    module.listeners.append(lambda sampler, step, x0: alive.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        restore(module, images[:2])
    assert ever
    assert alive == [0, 0, 0]


def test_the_time_map_reaches_the_network(images: Tensor) -> None:
    covariance = 0.1 * torch.eye(256)
    prior = GaussianPrior(torch.zeros(1, 16, 16), covariance)
    told = []
    prior.network.register_forward_pre_hook(lambda network, inputs: told.append(inputs[1][0].item()))
    for time_map in ("vp_linear", "native"):
        restore(DAPS(prior, SuperResolution(4), num_steps=1, ode_steps=1, mcmc_steps=1, time_map=time_map), images[:1])
    assert told == pytest.approx([956.4, 953.3], abs=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"mcmc_steps": 0}, "mcmc_steps=0 must be at least 1"),
        ({"eta": 0.0}, "eta=0.0 must be positive"),
        ({"tau": -0.01}, "tau=-0.01 must be positive"),
        ({"momentum": 1.0}, "momentum=1.0 must be at least 0 and below 1"),
        ({"eta_min_ratio": 0.0}, "eta_min_ratio=0.0 must be above 0 and at most 1"),
        ({"sigma_min": 200.0}, "0 < ode_sigma_min=0.01 < sigma_min=200.0 < sigma_max=100.0 does not hold"),
        ({"sigma_min": 0.005}, "0 < ode_sigma_min=0.01 < sigma_min=0.005 < sigma_max=100.0 does not hold"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str, tiny_prior: VPPrior) -> None:
    with pytest.raises(ValueError) as error:
        DAPS(tiny_prior, SuperResolution(4), **settings)
    assert message in str(error.value)


def test_a_prior_of_the_other_space_is_refused(tiny_prior: VPPrior) -> None:
    with pytest.raises(ValueError, match="DAPS samples in pixel space, LatentPrior is a prior on latents"):
        DAPS(make_latent_prior(), SuperResolution(4))
    with pytest.raises(ValueError, match="LatentDAPS samples in latent space, VPPrior is a prior on pixels"):
        LatentDAPS(tiny_prior, SuperResolution(4))
    with pytest.raises(ValueError, match="gradient_clip=0 must be positive"):
        LatentDAPS(make_latent_prior(), SuperResolution(4), gradient_clip=0)
