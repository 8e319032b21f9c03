"""PSLD and ReSample beyond the common contract: what a step costs, what their switches do, what they refuse."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks import EquiReg, PredictionWriter
from equireg.mpe import PriorDecoder, PriorRoundTrip
from equireg.noise import SampleNoise, Stream
from equireg.operators import BoxInpainting, GaussianDeblur, Operator, RandomInpainting, SuperResolution
from equireg.priors import LatentPrior
from equireg.regularizer import Regularizer, WeightSchedule
from equireg.runs import read_run
from lightning_modules import PSLD, PosteriorSampler, ReSample
from tests.conftest import make_latent_prior
from tests.test_samplers import measure, restore
from tests.tiny_run import TinyData, predict

PENALTIES = {"none": None, "equi": PriorDecoder, "equicon": PriorRoundTrip}


@pytest.fixture(params=["kl", "vq"])
def latent_prior(request: pytest.FixtureRequest) -> LatentPrior:
    return make_latent_prior(request.param)


def regularise(module: PosteriorSampler, form: str, weight: float = 0.1) -> None:
    if PENALTIES[form] is not None:
        schedule = WeightSchedule(weight, scale="none", last_tenth_off=True)
        module.attach(Regularizer(PENALTIES[form](), "hflip", schedule, form, "mse"))


def cost(module: PosteriorSampler, images: Tensor) -> tuple[int, ...]:
    """Forward and backward passes of network, decoder and encoder in one restoration of two images."""
    module.evaluations.reset()
    restore(module, images, [0, 1])
    counter = module.evaluations
    names = ("decodes", "decode_backwards", "encodes", "encode_backwards")
    return (counter.forward, counter.backward, *(counter.autoencoder[name] for name in names))


def make_resample(prior: LatentPrior, operator: Operator, **options: object) -> ReSample:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tolerance
        return ReSample(prior, operator, **options)


@pytest.mark.parametrize("form", PENALTIES)
def test_a_psld_step_costs_what_the_paper_needs(form: str, latent_prior: LatentPrior, images: Tensor) -> None:
    module = PSLD(latent_prior, SuperResolution(4), num_steps=20)
    regularise(module, form)
    steps, active = 20, 18  # no penalty in the last tenth
    decodes = steps + (active if form != "none" else 0)  # of T_g z0_hat: D(z0_hat) is shared
    encodes = steps + (active if form == "equicon" else 0)
    assert cost(module, images) == (steps, steps, decodes + 1, decodes, encodes, encodes)


def test_psld_without_gluing_encodes_nothing(latent_prior: LatentPrior, images: Tensor) -> None:
    assert cost(PSLD(latent_prior, SuperResolution(4), num_steps=5, gamma=0.0), images) == (5, 5, 6, 5, 0, 0)


@pytest.mark.parametrize("form", PENALTIES)
def test_a_resample_run_costs_what_the_paper_needs(form: str, latent_prior: LatentPrior, images: Tensor) -> None:
    options = {"num_steps": 20, "every": 3, "lookahead": 4, "pixel_iterations": 5, "latent_iterations": 7}
    module = make_resample(latent_prior, SuperResolution(4), **options)
    regularise(module, form)
    pixel_stages, latent_stages = 3, 1  # j = 12, 9, 6, and j = 3, which has three steps left to look ahead
    network = 20 + 3 * 4 + 3
    in_latent = 7 * (latent_stages + 1)
    penalised = 7 * latent_stages if form != "none" else 0  # the last optimisation comes after the last step
    decodes = 20 + in_latent + penalised
    encodes = penalised if form == "equicon" else 0
    expected = (network, 0, decodes + pixel_stages + 1, decodes, encodes + pixel_stages, encodes)
    assert cost(module, images) == expected


def test_what_listeners_decode_is_not_counted(latent_prior: LatentPrior, images: Tensor) -> None:
    module = PSLD(latent_prior, SuperResolution(4), num_steps=5)
    plain = cost(module, images)
    module.listeners.append(lambda sampler, step, z0_hat: sampler.prior.decode(z0_hat))
    assert cost(module, images) == plain


def test_what_does_not_fit_is_refused_before_the_first_network_call(tmp_path: Path) -> None:
    module = PSLD(make_latent_prior(), RandomInpainting(), num_steps=2)
    wide = TinyData(count=1, shape=(1, 16, 32))
    with pytest.raises(ValueError, match="must be square, not 8x16"):
        predict(tmp_path / "run", EquiReg(PriorDecoder(), group="rot90"), sampler=module, data=wide)
    with pytest.raises(ValueError, match="image sides 15x16 must be multiples of the autoencoder's 2"):
        predict(tmp_path / "run", sampler=module, data=TinyData(count=1, shape=(1, 15, 16)))
    singular = PSLD(make_latent_prior(), GaussianDeblur(7, 3.0, sigma_y=0.0), num_steps=2, adjoint="pinv")
    with pytest.raises(ValueError, match=r"ridge=0.0 must be positive: the singular values of GaussianDeblur"):
        predict(tmp_path / "run", sampler=singular, data=TinyData(count=1, shape=(1, 16, 16)))
    assert (module.evaluations.forward, singular.evaluations.forward) == (0, 0)


def test_a_run_records_the_passes_of_the_autoencoder_and_names_what_diverged(tmp_path: Path) -> None:
    module = PSLD(make_latent_prior(), RandomInpainting(), num_steps=4)
    regularise(module, "equi")
    original = module.sample

    def sample(y: Tensor, operator: Operator, noise: SampleNoise) -> Tensor:
        broken = torch.tensor([index == 1 for index in module.problem.indices]).view(-1, 1, 1, 1)
        return original(torch.where(broken, torch.nan, y), operator, noise)

    module.sample = sample
    with pytest.raises(RuntimeError, match="1 of 3 samples diverged, they were not written: 00001 image 1"):
        predict(tmp_path / "run", PredictionWriter(), sampler=module, data=TinyData(count=3, shape=(1, 16, 16)))
    rows = read_run(tmp_path / "run").rows
    assert [row.index for row in rows] == [0, 2]
    wanted = {"decodes": 9, "decode_backwards": 8, "encodes": 4, "encode_backwards": 4, "network_evaluations": 4}
    assert wanted.items() <= rows[0].metrics.items()
    assert rows[0].metrics["equivariance_error"] > 0


def test_psld_follows_the_data(images: Tensor) -> None:
    """With an uninformative prior a larger weight of the measurement must bring A(x0) closer to y."""
    weak, strong = (PSLD(make_latent_prior(), RandomInpainting(sigma_y=0.0), num_steps=20, omega=w) for w in (0.0, 4.0))
    assert misfit(strong, images) < 0.9 * misfit(weak, images)


def test_a_step_of_psld_is_no_longer_than_its_limit(images: Tensor) -> None:
    """Without weights z_t follows the chain alone: what a limited guidance adds to its first step is known in size."""
    limit, latent_prior, latents = 0.01, make_latent_prior(), {}
    for name, options in {
        "chain": {"omega": 0.0, "gamma": 0.0},
        "limited": {"omega": 50.0, "step_limit": limit},
    }.items():
        module = PSLD(latent_prior, SuperResolution(4), num_steps=2, **options)
        seen = []
        handle = latent_prior.network.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        restore(module, images, [0, 1])
        handle.remove()
        latents[name] = seen[1]
    rms = (latents["limited"] - latents["chain"]).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, limit), rtol=1e-3, atol=0.0)


def test_a_step_within_the_limit_is_left_alone(images: Tensor) -> None:
    latent_prior = make_latent_prior()
    free, limited = (
        restore(PSLD(latent_prior, SuperResolution(4), num_steps=3, step_limit=limit), images, [0, 1])
        for limit in (None, 1e6)
    )
    assert torch.equal(free, limited)


def test_resample_follows_the_data(images: Tensor) -> None:
    operator = RandomInpainting(sigma_y=0.0)
    options = {"num_steps": 10, "every": 2, "latent_lr": 0.1}
    weak, strong = (
        make_resample(make_latent_prior(), operator, pixel_iterations=n, latent_iterations=n, **options)
        for n in (1, 30)
    )
    assert misfit(strong, images) < 0.9 * misfit(weak, images)


def misfit(module: PosteriorSampler, images: Tensor) -> float:
    operator, y = measure(module.operator, images[[0, 1]], [0, 1])
    return (y - operator(module(y, [0, 1], operator))).norm().item()


def test_a_chain_that_ends_at_alpha_bar_one_ends_at_its_estimate(images: Tensor) -> None:
    latent_prior = make_latent_prior()
    for is_set in (True, False):
        module = PSLD(latent_prior, SuperResolution(4), num_steps=5, omega=0.0, gamma=0.0, set_alpha_to_one=is_set)
        estimates = []
        module.listeners.append(lambda sampler, step, z0_hat, estimates=estimates: estimates.append(z0_hat))
        x0 = restore(module, images, [0, 1])
        assert torch.allclose(x0, latent_prior.decode(estimates[-1]).clamp(-1, 1), atol=1e-5) == is_set


def test_known_pixels_can_be_pasted(latent_prior: LatentPrior, images: Tensor) -> None:
    module = PSLD(latent_prior, BoxInpainting(box_size=6, margin=2), num_steps=3, paste_known=True)
    operator, y = measure(module.operator, images[[0, 1]], [0, 1])
    torch.testing.assert_close(operator(module(y, [0, 1], operator)), operator.mask * y)
    with pytest.raises(ValueError, match="paste_known=true needs known pixels; SuperResolution measures none"):
        PSLD(latent_prior, SuperResolution(4), paste_known=True)


def test_the_encoder_of_the_kl_family_alone_is_sampled(latent_prior: LatentPrior, images: Tensor) -> None:
    drawn, mean = (
        restore(PSLD(latent_prior, SuperResolution(4), num_steps=4, sample_encoder=b), images, [0])
        for b in (True, False)
    )
    assert torch.equal(drawn, mean) == (latent_prior.autoencoder.family == "vq")


def test_poisson_noise_is_not_added_to_the_prediction(latent_prior: LatentPrior, images: Tensor) -> None:
    operator = SuperResolution(4, poisson_rate=1.0)
    as_published, plain = (
        restore(PSLD(latent_prior, operator, num_steps=4, renoise_prediction=b), images, [0]) for b in (True, False)
    )
    assert torch.equal(as_published, plain)


@pytest.mark.parametrize("option", [{"adjoint": "exact"}, {"adjoint": "pinv"}, {"renoise_prediction": False}])
def test_every_switch_of_psld_changes_the_result(option: dict, images: Tensor) -> None:
    latent_prior = make_latent_prior()
    make = {"num_steps": 4, "omega": 1.0, "gamma": 1.0}
    published = restore(PSLD(latent_prior, SuperResolution(4), **make), images, [0])
    switched = restore(PSLD(latent_prior, SuperResolution(4), **make, **option), images, [0])
    assert (published - switched).abs().max() > 1e-4


@pytest.mark.parametrize("option", [{"tweedie": "exact"}, {"unet_grad": True}, {"fix_lookahead_index": True}])
def test_every_switch_of_resample_changes_the_result(option: dict, images: Tensor) -> None:
    latent_prior = make_latent_prior()
    make = {"num_steps": 10, "every": 2, "pixel_iterations": 2, "latent_iterations": 2}
    published = restore(make_resample(latent_prior, SuperResolution(4), **make), images, [0])
    switched = restore(make_resample(latent_prior, SuperResolution(4), **make, **option), images, [0])
    assert (published - switched).abs().max() > 1e-5


def test_every_image_stops_by_itself() -> None:
    module = make_resample(make_latent_prior(), SuperResolution(4), tolerance=0.3)
    start = torch.tensor([0.1, 1.0, 2.0, torch.nan]).view(4, 1, 1, 1).expand(4, 2, 8, 8)
    calls = []

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return x.flatten(1).square().mean(1), x.new_zeros(len(x))

    together = module.optimize(start, loss, 0.01, 100, None)
    assert len(calls) == 100
    alone, iterations = [], []
    for row in start:
        calls.clear()
        alone.append(module.optimize(row[None], loss, 0.01, 100, None))
        iterations.append(len(calls))
    assert (iterations[0], iterations[2:]) == (
        1,
        [100, 1],
    )  # below the tolerance at once, after a while, never; NaN is no use
    assert 1 < iterations[1] < 100
    torch.testing.assert_close(together, torch.cat(alone), equal_nan=True)


def test_the_latent_stage_stops_where_the_loss_rises() -> None:
    module = make_resample(make_latent_prior(), SuperResolution(4))
    rising = iter(range(1, 1000))
    seen = []

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(next(rising))
        return 0 * x.sum((1, 2, 3)) + seen[-1], x.new_zeros(len(x))

    module.optimize(torch.zeros(1, 2, 8, 8), loss, 0.01, 500, None, window=200)
    assert len(seen) == 201


@pytest.mark.parametrize(("stop_on", "stops"), [("data", True), ("total", False)])
def test_the_stopping_rule_sees_what_it_is_told_to(stop_on: str, stops: bool) -> None:
    module = make_resample(make_latent_prior(), SuperResolution(4), stop_on=stop_on)
    calls = []

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x)
        return 0 * x.sum((1, 2, 3)), 1 + x.square().sum((1, 2, 3))

    module.optimize(torch.zeros(1, 2, 8, 8), loss, 0.01, 5, None)
    assert len(calls) == (1 if stops else 5)


def test_resampling_draws_from_the_product_of_two_gaussians() -> None:
    module = make_resample(make_latent_prior(), SuperResolution(4), num_steps=50)
    step = module.steps[20]
    z0_y, z_t = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    v, w = module.resample_variance(step), 1 - step.alpha_bar_prev
    precision = 1 / v + 1 / w
    mean = (z_t / v + step.alpha_bar_prev**0.5 * z0_y / w) / precision
    noise = SampleNoise([0], 0, Stream.SAMPLER).randn((2, 8, 8), like=z_t)
    drawn = module.resample(z0_y, z_t, step, SampleNoise([0], 0, Stream.SAMPLER))
    torch.testing.assert_close(drawn, mean + noise / precision**0.5)


def test_a_tolerance_below_the_noise_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"tolerance=0.001 is below the noise level sigma_y=0.05"):
        ReSample(make_latent_prior(), SuperResolution(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReSample(make_latent_prior(), SuperResolution(4), tolerance=0.05)


@pytest.mark.parametrize(
    ("sampler", "option", "message"),
    [
        (PSLD, {"omega": -1}, "omega=-1 must not be negative"),
        (PSLD, {"gamma": -1}, "gamma=-1 must not be negative"),
        (PSLD, {"step_limit": 0.0}, "step_limit=0.0 must be positive, or null for none"),
        (PSLD, {"num_steps": 0}, "num_steps=0 must be between 1 and 1000"),
        (PSLD, {"eta": 2}, "eta=2 must be between 0 and 1"),
        (ReSample, {"num_steps": 501}, "num_steps=501 must be at most 500"),
        (ReSample, {"every": 0}, "every=0 must be positive"),
        (ReSample, {"latent_lr": 0}, "latent_lr=0 must be positive"),
        (ReSample, {"tolerance": -1}, "tolerance=-1 must not be negative"),
    ],
)
def test_arguments_out_of_range_are_refused(sampler: type[PosteriorSampler], option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(make_latent_prior(), SuperResolution(4), **option)
