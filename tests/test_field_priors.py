"""Priors on fields: preconditioning, units, noise, weight files, networks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from equireg.gaussian import ImageStatistics
from equireg.noise import SampleNoise, Stream
from equireg.priors import EDMPrior
from equireg.priors.edm_networks import SongUNet, SongUNO
from equireg.priors.spectral import SpectralDenoiser
from tests.tiny_fields import TINY_FIELD_NETWORK, tiny_field_prior

SONG = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NETWORKS = {
    "FieldUNet": TINY_FIELD_NETWORK,
    "SongUNO": SONG | {"fmult": 0.5, "rank": 0.2},
    "SongUNet": SONG | {"augment_dim": 9},
}
architectures = pytest.mark.parametrize("architecture", NETWORKS)


class Answer(nn.Module):
    """Answers what it is told to, in the place of F."""

    in_channels, image_size, side_divisor = 2, (4, 4), 1

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.answer


class Knows(nn.Module):
    """The network of a perfect denoiser: F is what makes D = x_0."""

    in_channels, image_size, side_divisor = 2, (4, 4), 1

    def __init__(self, x_0: Tensor) -> None:
        super().__init__()
        self.x_0 = x_0

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        root = (0.25 + sigma**2).sqrt()
        return (self.x_0 - 0.25 / root * x) * root / (0.5 * sigma)


def test_an_answer_of_zero_leaves_the_skip_connection() -> None:
    prior = EDMPrior.from_network(Answer(torch.zeros(2, 2, 4, 4)), pde="helmholtz")
    x = torch.randn(2, 2, 4, 4)
    for sigma in (0.002, 0.5, 80.0):
        torch.testing.assert_close(prior.denoise(x, sigma), 0.25 / (0.25 + sigma**2) * x)


def test_the_loss_weight_makes_errors_of_the_network_count_the_same_at_all_levels() -> None:
    prior = EDMPrior.from_network(Answer(torch.ones(3, 2, 4, 4)), pde="helmholtz")
    sigma = torch.tensor([0.01, 1.0, 30.0])
    c_out = prior.denoise(torch.zeros(3, 2, 4, 4), sigma)[:, 0, 0, 0]
    torch.testing.assert_close(prior.loss_weight(sigma) * c_out**2, torch.ones(3))


def test_a_perfect_denoiser_samples_its_field() -> None:
    x_0 = torch.randn(1, 2, 4, 4)
    prior = EDMPrior.from_network(Knows(x_0), pde="helmholtz")
    steps = prior.steps(10)
    x = steps[0].sigma * torch.randn(1, 2, 4, 4)
    for step in steps:
        x, _ = prior.heun_step(x, step)
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)  # float32 at sigma = 80


def test_levels_fall_to_zero_and_stay_where_the_network_was_trained() -> None:
    prior = EDMPrior.from_network(Answer(torch.zeros(1, 2, 4, 4)), pde="helmholtz", sigma_min=0.01, sigma_max=50.0)
    steps = prior.steps(20)
    assert (len(steps), steps[-1].sigma_next) == (20, 0)
    assert (steps[0].sigma, steps[-1].sigma) == (pytest.approx(50.0), pytest.approx(0.01))
    assert all(step.sigma > step.sigma_next for step in steps)
    with pytest.raises(ValueError, match="num_steps=1 must be at least 2"):
        prior.steps(1)
    with pytest.raises(ValueError, match=r"must fall from sigma_max=0.005 to sigma_min=0.01"):
        prior.steps(20, sigma_max=0.005)


def test_normalised_fields_have_the_published_units_and_come_back() -> None:
    prior = tiny_field_prior("helmholtz")
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64) * torch.tensor([0.2844538, 0.00428004]).view(2, 1, 1)
    normalised = prior.normalize(x)
    assert normalised.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.5, 0.5], rel=0.2)
    assert normalised.dtype == torch.float64
    torch.testing.assert_close(prior.denormalize(normalised), x)


@pytest.mark.parametrize("kind", ["exponential", "white"])
def test_the_noise_has_unit_variance_and_the_correlation_of_its_law(kind: str) -> None:
    prior = EDMPrior.from_network(Answer(torch.zeros(1)), pde="helmholtz", noise=kind, noise_scale=0.25)
    g = prior.draw_noise(SampleNoise(range(500), 0, Stream.SAMPLER), (2, 8, 8), like=torch.zeros(1))
    assert g.var().item() == pytest.approx(1, abs=0.03)  # 64 000 numbers
    expected = math.exp(-1 / 8 / (2 * 0.25**2)) if kind == "exponential" else 0.0
    assert (g[..., 1:] * g[..., :-1]).mean().item() == pytest.approx(expected, abs=0.03)
    assert (g[:, 0] * g[:, 1]).mean().item() == pytest.approx(0, abs=0.03)


@architectures
@torch.no_grad()
def test_a_saved_prior_comes_back(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = EDMPrior("random", "navier_stokes", architecture, NETWORKS[architecture], noise="white", sigma_max=60.0)
    for parameter in prior.network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    prior.save(tmp_path / "prior.safetensors", half=False)
    loaded = EDMPrior(str(tmp_path / "prior.safetensors"))
    assert loaded.description == prior.description
    assert (loaded.pde, loaded.sigma_max) == ("navier_stokes", 60.0)
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(loaded.eval().denoise(x, 0.3), prior.eval().denoise(x, 0.3), rtol=0, atol=0)


@architectures
def test_networks_take_fields_of_another_size(architecture: str) -> None:
    prior = EDMPrior("random", "helmholtz", architecture, NETWORKS[architecture]).eval()
    prior.check_shape((2, 16, 16))
    assert prior.denoise(torch.randn(1, 2, 16, 16), 1.0).shape == (1, 2, 16, 16)


def test_an_operator_network_sees_the_same_function_at_another_resolution() -> None:
    """Spectral convolutions act on functions: a smooth field refined by two gives the refined answer, nearly."""
    torch.manual_seed(0)
    network = SongUNO(**SONG | {"channel_mult": [1], "attn_resolutions": [], "fmult": 0.5, "rank": 1.0}).eval()
    network.prepare = lambda x: torch.cat([x, torch.zeros_like(x)], 1)  # the coordinates' last point is at 1, not 1 - h

    def wave(size: int) -> Tensor:
        p = torch.arange(size) * (2 * math.pi / size)
        return torch.stack([p[:, None].cos() + p.sin(), p[:, None].sin() * p.cos()])[None]

    with torch.no_grad():
        for block in network.dec.values():
            if hasattr(block, "attention"):
                block.attention = False  # its scores grow with the number of points
        coarse, fine = network(wave(16), torch.zeros(1)), network(wave(32), torch.zeros(1))
    assert (fine[..., ::2, ::2] - coarse).norm() < 0.05 * coarse.norm()


def test_bf16_keeps_spectral_weights_in_float32() -> None:
    prior = EDMPrior("random", "helmholtz", "SongUNO", NETWORKS["SongUNO"]).eval()
    x = torch.randn(1, 2, 8, 8)
    exact = prior.denoise(x, 1.0)
    prior.autocast_dtype = torch.bfloat16
    rounded = prior.denoise(x, 1.0)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": None}, "needs the arguments of the network"),
        ({"architecture": "UNO"}, "architecture='UNO' is unknown; available: FieldUNet"),
        ({"network": {"no_such_argument": 1}}, "network: "),
        ({"pde": "darcy"}, "pde='darcy' is unknown; available: helmholtz, navier_stokes"),
        ({"pde": None}, "mean and std of the fields are needed where pde is not given"),
        ({"noise": "pink"}, "noise='pink' must be 'exponential' or 'white'"),
        ({"std": [1.0, 0.0]}, "must be positive"),
        ({"sigma_data": 0.0}, "sigma_data=0.0 must be positive"),
        ({"network": TINY_FIELD_NETWORK | {"padding": "reflect"}}, "padding='reflect' must be 'zeros' or 'circular'"),
        ({"architecture": "SongUNO", "network": SONG | {"cond": True}}, "cond=True is not supported; allowed: False"),
        ({"architecture": "SongUNet", "network": SONG | {"img_resolution": 9}}, "cannot be halved 1 times"),
    ],
)
def test_a_prior_that_cannot_be_made_is_refused_in_one_sentence(options: dict, message: str) -> None:
    arguments = {"weights": "random", "pde": "helmholtz", "network": TINY_FIELD_NETWORK} | options
    with pytest.raises(ValueError, match=message):
        EDMPrior(**arguments)


def test_weights_of_another_kind_or_equation_are_refused(tmp_path: Path, tiny_prior: nn.Module) -> None:
    tiny_prior.save(tmp_path / "vp.safetensors")
    with pytest.raises(ValueError, match="holds a vp_prior, not a edm_prior"):
        EDMPrior(str(tmp_path / "vp.safetensors"))
    prior = tiny_field_prior("helmholtz")
    prior.save(tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match="pde='navier_stokes' contradicts weights"):
        EDMPrior(str(tmp_path / "edm.safetensors"), pde="navier_stokes")
    with pytest.raises(ValueError, match="the prior is on fields of helmholtz, the data are of navier_stokes"):
        prior.check_equation("navier_stokes")


def test_fields_that_do_not_fit_are_refused() -> None:
    prior = tiny_field_prior("helmholtz")
    with pytest.raises(ValueError, match="fields have 1 channels, the prior was trained on 2"):
        prior.check_shape((1, 8, 8))
    with pytest.raises(ValueError, match="field sides 6x8 must be multiples of 4"):
        prior.check_shape((2, 6, 8))


def test_the_published_sizes() -> None:
    """The constructor arguments of the published checkpoints make networks of the published numbers of parameters."""
    with torch.device("meta"):
        uno = SongUNO(
            64, 2, model_channels=64, channel_mult=[1, 2, 4, 4], num_blocks=4, attn_resolutions=[8], fmult=0.5, rank=0.1
        )
        unet = SongUNet(
            128, 2, augment_dim=9, model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16]
        )
    assert sum(p.numel() for p in uno.parameters()) == 54_120_008
    assert len(uno.state_dict()) == 900
    assert sum(p.numel() for p in unet.parameters()) == 54_412_034


@pytest.mark.parametrize("basis", ["fourier", "sine"])
def test_an_unfitted_linear_denoiser_is_edms_skip_connection(basis: str) -> None:
    linear = SpectralDenoiser(8, basis)
    x = torch.randn(3, 2, 8, 8)
    x[..., [0, -1], :] = x[..., [0, -1]] = 0  # what a sine series can hold
    sigma = torch.tensor([0.1, 1.0, 10.0])
    expected = 0.25 / (0.25 + sigma**2)
    torch.testing.assert_close(linear(x, sigma), expected.view(-1, 1, 1, 1) * x)
    if basis == "fourier":
        torch.testing.assert_close(linear.error(sigma), 0.5 * sigma / (0.25 + sigma**2).sqrt())


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("basis", ["fourier", "sine"])
def test_a_fitted_linear_denoiser_is_the_best_linear_one_where_modes_are_independent(basis: str, size: int) -> None:
    torch.manual_seed(0)
    linear = SpectralDenoiser(size, basis).double()

    def fields(count: int) -> Tensor:
        """a: smooth and random in this basis; u: half of a and something of its own, around a mean."""
        modes = linear.transform(torch.randn(count, 2, size, size, dtype=torch.float64))
        i, j = torch.meshgrid(*(torch.arange(n) for n in modes.shape[-2:]), indexing="ij")
        rows = torch.minimum(i, size - i) if basis == "fourier" else i
        modes = modes / (1 + rows**2 + j**2)
        modes[:, 1] = 0.5 * modes[:, 0] + 0.3 * modes[:, 1]
        return linear.inverse(modes) + 0.1

    linear.fit(fields(4000))
    x_0, sigma = fields(1000), 0.3
    x = x_0 + sigma * torch.randn_like(x_0)
    error = (linear(x, torch.full((1000,), sigma)) - x_0).square().mean().sqrt()
    best = ImageStatistics(fields(20000)).denoise(x, sigma)
    assert error < 1.02 * (best - x_0).square().mean().sqrt()
    assert linear.error(torch.tensor([sigma]))[0] == pytest.approx(error.item(), rel=0.02)


@pytest.mark.parametrize("basis", ["fourier", "sine"])
def test_the_covariance_of_a_linear_denoiser_is_its_jacobian_times_the_noise(basis: str) -> None:
    """Tweedie's second moment, Cov[x_0 | x] = sigma^2 J, at points of both channels."""
    torch.manual_seed(0)
    linear = SpectralDenoiser(8, basis).double()
    fields = torch.randn(200, 2, 8, 8, dtype=torch.float64) / (1 + torch.arange(8.0))
    linear.fit(fields + 0.5 * fields.flip(1))
    positions, sigma = torch.tensor([[9, 20, 42, 64 + 20, 127 - 9], [10, 11, 12, 64 + 9, 64 + 50]]), 0.3
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: linear(v, torch.tensor([sigma])), x).reshape(128, 128)
    covariance = linear.covariance_between(positions, sigma)
    for p, ours in zip(positions, covariance, strict=True):
        torch.testing.assert_close(ours, sigma**2 * jacobian[p][:, p], rtol=1e-5, atol=1e-9)


def test_a_prior_with_a_linear_denoiser_is_saved_with_it(tmp_path: Path) -> None:
    network = TINY_FIELD_NETWORK | {"linear": "fourier"}
    prior = EDMPrior("random", "navier_stokes", network=network)
    prior.linear.fit(torch.randn(50, 2, 8, 8) / (1 + torch.arange(8.0)))
    nn.init.normal_(prior.network.unet.conv_out.weight, std=0.1)
    prior.save(tmp_path / "prior.safetensors")
    loaded = EDMPrior(str(tmp_path / "prior.safetensors")).eval()
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(loaded.denoise(x, 0.3), prior.eval().denoise(x, 0.3), rtol=0, atol=2e-2)
    assert loaded.linear.fitted
    with pytest.raises(ValueError, match="the prior's linear denoiser is for 8 a side"):
        loaded.check_shape((2, 16, 16))
