"""The penalty is what the paper says, per image, and costs nothing where its weight is zero."""

import pytest
import torch
from torch import Tensor, nn

from equireg.autoencoder import Autoencoder
from equireg.groups import get_group
from equireg.mpe import MPE, Encoder, Features, PriorDecoder, PriorEncoder, PriorRoundTrip, RoundTrip
from equireg.noise import SampleNoise, Stream
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule, equi, equicon, equivariance_error, reduce


class Conv(MPE):
    """A convolution: equivariant to flips when its kernel is even."""

    maps_to_itself = True

    def __init__(self, even: bool) -> None:
        super().__init__()
        kernel = torch.tensor([[0.1, 0.5, 0.1], [0.2, 0.3, 0.2], [0.0, 0.7, 0.0]]) if even else torch.rand(3, 3)
        self.register_buffer("kernel", kernel.view(1, 1, 3, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.conv2d(x, self.kernel, padding=1)


@pytest.fixture
def steps(tiny_prior: VPPrior) -> list:
    return list(tiny_prior.schedule(20))


def make(function: MPE, **options: object) -> Regularizer:
    schedule = WeightSchedule(options.pop("weight", 1.0), options.pop("scale", "none"), options.pop("every", 1))
    penalty = Regularizer(function, options.pop("group", "hflip"), schedule, **options)
    penalty.start(SampleNoise(range(6), 0, Stream.GROUP))
    return penalty


def test_the_penalty_vanishes_for_an_equivariant_function(images: Tensor, steps: list) -> None:
    assert make(Conv(even=True))(images, steps[0]).max() < 1e-5
    assert make(Conv(even=False))(images, steps[0]).min() > 1e-2


@pytest.mark.parametrize("reduction", ["norm", "sqnorm", "mse"])
@pytest.mark.parametrize("group", ["hflip", "rot90", "d4"])
@pytest.mark.parametrize("loss", ["equi", "equicon"])
def test_an_image_is_penalised_as_if_it_were_alone(
    images: Tensor, steps: list, reduction: str, group: str, loss: str
) -> None:
    f = Conv(even=False)
    together = make(f, reduction=reduction, group=group, loss=loss)(images, steps[0])
    for i in range(len(images)):
        penalty = make(f, reduction=reduction, group=group, loss=loss)
        penalty.start(SampleNoise([i], 0, Stream.GROUP))
        torch.testing.assert_close(penalty(images[i : i + 1], steps[0])[0], together[i])


def test_equi_and_equicon_are_their_formulas(images: Tensor) -> None:
    f, group = Conv(even=False), get_group("rot90")
    g = torch.tensor([1, 3, 1, 3, 1, 3])
    torch.testing.assert_close(equi(f, group, images, g), group.transform(f(images), g) - f(group.transform(images, g)))
    back = group.transform(f(group.transform(images, g)), group.inverse(g))
    torch.testing.assert_close(equicon(f, group, images, g), images - back)


def test_reductions_are_over_one_image() -> None:
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    assert reduce(d, "norm").tolist() == [5.0, 0.0]
    assert reduce(d, "sqnorm").tolist() == [25.0, 0.0]
    assert reduce(d, "mse").tolist() == [12.5, 0.0]


def test_equi_evaluates_f_once_and_a_step_of_weight_zero_not_at_all(images: Tensor, steps: list) -> None:
    f = Conv(even=False)
    penalty = make(f, every=5)
    penalty(images, steps[0])
    assert f.calls == 1
    assert penalty(images, steps[1]).tolist() == [0.0] * len(images)
    assert f.calls == 1


def test_a_zero_distance_has_a_finite_gradient(steps: list) -> None:
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    penalty = make(Conv(even=True))
    (gradient,) = torch.autograd.grad(penalty(x, steps[0]).sum(), x)
    assert gradient.isfinite().all()


def test_the_separate_step_divides_the_step_size_out(images: Tensor, steps: list) -> None:
    f = Conv(even=False)
    joined, separate = (make(f, attachment=a)(images, steps[0], 0.5) for a in ("in_norm", "separate_step"))
    torch.testing.assert_close(separate, joined / 0.5)


def test_schedules_follow_their_rules(steps: list) -> None:
    n = len(steps)
    assert [k for k in range(n) if WeightSchedule(1.0, "none", every=5)(steps[k])] == [0, 5, 10, 15]
    last = [WeightSchedule(1.0, "none", last_tenth_off=True)(step) for step in steps]
    assert last == [1.0] * 18 + [0.0] * 2
    for scale, expected in (
        ("sigma", lambda a: (1 - a) ** 0.5),
        ("one_minus_alphabar", lambda a: 1 - a),
        ("sigma_over_alpha", lambda a: ((1 - a) / a) ** 0.5),
        ("sqrt_alphabar", lambda a: a**0.5),
    ):
        for step in steps:
            assert WeightSchedule(2.0, scale)(step) == pytest.approx(2 * expected(step.alpha_bar))
    assert WeightSchedule(2.0, "beta")(steps[3]) == 2 * steps[3].beta


def test_the_legacy_cutoff_counts_a_hundred_steps(tiny_prior: VPPrior) -> None:
    active = [WeightSchedule(1.0, "none", legacy_cutoff=True)(step) for step in tiny_prior.schedule(1000)]
    assert sum(w > 0 for w in active) == 901  # the authors' library is off by one
    assert active[0] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0 must be"),
        ({"weight": float("nan")}, "weight=nan must be"),
        ({"weight": 1.0, "every": 0}, "every=0 must be"),
        ({"weight": 1.0, "last_tenth_off": True, "legacy_cutoff": True}, "exclude each other"),
    ],
)
def test_schedules_refuse_nonsense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSchedule(**arguments)


def test_equicon_refuses_a_function_that_leaves_its_space(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="maps into its own space, such as RoundTrip; Encoder does not"):
        Regularizer(encoder, "hflip", WeightSchedule(1.0), loss="equicon")


def test_turning_groups_refuse_images_that_are_not_square(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="must be square, not 16x24"):
        Regularizer(encoder, "rot90", WeightSchedule(1.0)).check_shape((1, 16, 24))
    Regularizer(encoder, "hflip", WeightSchedule(1.0)).check_shape((1, 16, 24))


def test_the_encoder_refuses_sides_it_cannot_halve(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="15x16 must be multiples of the autoencoder's 2"):
        encoder.check_shape((1, 15, 16))


def test_the_relative_error_ignores_the_scale_of_f(images: Tensor) -> None:
    f, group, g = Conv(even=False), get_group("hflip"), torch.ones(6, dtype=torch.long)
    error = equivariance_error(f, group, images, g)
    f.kernel *= 7
    torch.testing.assert_close(equivariance_error(f, group, images, g), error)


def test_the_round_trip_is_the_decoder_after_the_encoder(tiny_autoencoder: Autoencoder, images: Tensor) -> None:
    f = RoundTrip(tiny_autoencoder)
    assert f(images).shape == images.shape
    torch.testing.assert_close(f(images), tiny_autoencoder.decode(tiny_autoencoder.encode(images)))


def test_features_normalise_and_want_maps() -> None:
    f = Features(nn.Identity(), mean=[0.5], std=[0.25])
    torch.testing.assert_close(f(torch.full((1, 1, 2, 2), 0.5)), torch.full((1, 1, 2, 2), 1.0))
    with pytest.raises(ValueError, match="returns 2 axes"):
        Features(nn.Flatten())(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="has no such method"):
        Features(nn.Identity(), method="forward_features")
    with pytest.raises(ValueError, match="belong together"):
        Features(nn.Identity(), mean=[0.5])


@pytest.mark.parametrize("function", [PriorEncoder, PriorDecoder, PriorRoundTrip])
def test_functions_of_a_latent_prior_refuse_a_pixel_prior(function: type[MPE], tiny_prior: VPPrior) -> None:
    with pytest.raises(ValueError, match="needs a latent prior; VPPrior works on pixels"):
        function().bind(tiny_prior)


def test_functions_of_a_latent_prior_use_its_own_networks() -> None:
    class Latent(nn.Module):
        def encode(self, x: Tensor) -> Tensor:
            return x[..., ::2, ::2]

        def decode(self, z: Tensor) -> Tensor:
            return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    prior, x = Latent(), torch.rand(1, 1, 4, 4)
    for function, argument, expected in (
        (PriorEncoder(), x, prior.encode(x)),
        (PriorDecoder(), prior.encode(x), prior.decode(prior.encode(x))),
        (PriorRoundTrip(), prior.encode(x), prior.encode(x)),
    ):
        function.bind(prior)
        torch.testing.assert_close(function(argument), expected)
        assert not list(function.parameters())


def test_in_mixed_precision_the_function_alone_runs_in_half_precision(images: Tensor, steps: list) -> None:
    class Watched(Conv):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            self.dtypes = (x.dtype, output.dtype)
            return output

    penalty = make(Watched(even=False))
    exact = penalty(images, steps[0])
    penalty.autocast_dtype = torch.bfloat16
    rounded = penalty(images, steps[0])
    assert penalty.function.dtypes == (torch.float32, torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)  # a difference of values rounded to 8 bits
    assert not torch.equal(rounded, exact)
