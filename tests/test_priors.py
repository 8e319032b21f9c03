"""Priors: schedules and respacing, parameterisations, weight files and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from equireg.autoencoder import Autoencoder
from equireg.noise import SampleNoise, Stream
from equireg.priors import VPPrior, space_timesteps
from tests.conftest import TINY_AUTOENCODER, TINY_UNET


class Known(nn.Module):
    """Answers what it is told to: stands for a network that knows the truth."""

    in_channels, out_channels, image_size, side_divisor = 1, 1, (4, 4), 1

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer


def test_respacing_follows_guided_diffusion() -> None:
    assert space_timesteps(1000, 12) == [0, 91, 182, 272, 363, 454, 545, 636, 727, 817, 908, 999]
    assert space_timesteps(1000, "12") == space_timesteps(1000, 12)
    assert space_timesteps(1000, "ddim20") == list(range(0, 1000, 50))
    assert space_timesteps(1000, 1000) == list(range(1000))
    sections = space_timesteps(300, "10,15,20")
    assert [sum(a <= t < a + 100 for t in sections) for a in (0, 100, 200)] == [10, 15, 20]


@pytest.mark.parametrize("respacing", ["ddim999", "0", "-3", "fast", "1001", "10,2000"])
def test_respacing_refuses_what_it_cannot_do(respacing: str) -> None:
    with pytest.raises(ValueError, match="respacing="):
        space_timesteps(1000, respacing)


@pytest.mark.parametrize("num_steps", [2, 20, 1000])
def test_a_respaced_chain_ends_where_the_long_one_ends(tiny_prior: VPPrior, num_steps: int) -> None:
    steps = list(tiny_prior.schedule(num_steps))
    assert [step.k for step in steps] == list(range(num_steps))
    assert (steps[0].t, steps[-1].t) == (999, 0)
    assert steps[0].alpha_bar == pytest.approx(tiny_prior.alpha_bar[-1])
    product = np.prod([1 - step.beta for step in steps])
    assert product == pytest.approx(tiny_prior.alpha_bar[-1])  # re-derived betas keep the total noise
    assert (steps[-1].c_x0, steps[-1].c_xt) == (1, 0)  # the last mean is x0_hat


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_parameterisation_recovers_x0_and_eps(prediction: str) -> None:
    torch.manual_seed(0)
    x_0, eps = torch.rand(2, 1, 4, 4).double() * 2 - 1, torch.randn(2, 1, 4, 4).double()
    prior = VPPrior.from_network(Known(), prediction=prediction)
    step = list(prior.schedule(10))[5]
    alpha_bar = torch.tensor(step.alpha_bar, dtype=torch.float64)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    prior.network.answer = prior.target(x_0, eps, alpha_bar)
    denoised = prior(x_t, step)
    torch.testing.assert_close(denoised.x0_hat, x_0)
    torch.testing.assert_close(denoised.eps, eps)


def test_a_perfect_denoiser_samples_its_image() -> None:
    x_0 = torch.rand(1, 1, 4, 4) * 2 - 1
    prior = VPPrior.from_network(Known(), prediction="sample")
    prior.network.answer = x_0
    noise = SampleNoise([0], 0, Stream.SAMPLER)
    x_t = noise.randn((1, 4, 4), like=x_0)
    for step in prior.schedule(10):
        x_t = prior.ancestral_step(x_t, prior(x_t, step), step, noise)
    torch.testing.assert_close(x_t, x_0)


def test_learned_variances_lie_between_their_bounds() -> None:
    network = Known()
    network.out_channels = 2
    prior = VPPrior.from_network(network)
    assert prior.variance == "learned_range"
    step = list(prior.schedule(10))[5]
    for v, expected in ((-1.0, step.log_beta_small), (1.0, step.log_beta)):
        network.answer = torch.cat([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), v)], 1)
        log_variance = prior(torch.zeros(1, 1, 4, 4), step).log_variance
        torch.testing.assert_close(log_variance, torch.full((1, 1, 4, 4), expected))
    with pytest.raises(ValueError, match="variance='fixed_small' does not fit"):
        VPPrior.from_network(network, variance="fixed_small")


def test_x0_hat_is_clipped_inside_the_graph(tiny_prior: VPPrior) -> None:
    prior = VPPrior.from_network(Known())
    prior.network.answer = torch.zeros(1, 1, 4, 4)
    x_t = torch.full((1, 1, 4, 4), 0.9, requires_grad=True)
    step = next(iter(prior.schedule(10)))
    x0_hat = prior(x_t, step).x0_hat
    assert x0_hat.max() == 1
    (gradient,) = torch.autograd.grad(x0_hat.sum(), x_t)
    assert not gradient.any()  # the published code's behaviour: no guidance where x0_hat is clipped


def test_a_saved_prior_comes_back_within_half_precision(tiny_prior: VPPrior, tmp_path: Path) -> None:
    tiny_prior.save(tmp_path / "prior.safetensors")
    loaded = VPPrior(str(tmp_path / "prior.safetensors"))
    assert loaded.description == tiny_prior.description
    x, step = torch.rand(1, 1, 16, 16), next(iter(tiny_prior.schedule(5)))
    torch.testing.assert_close(loaded(x, step).eps, tiny_prior(x, step).eps, rtol=1e-2, atol=1e-2)
    assert [file.name for file in tmp_path.iterdir()] == ["prior.safetensors"]


def test_a_fixed_variance_is_chosen_at_sampling(tiny_prior: VPPrior, tmp_path: Path) -> None:
    tiny_prior.save(tmp_path / "prior.safetensors")
    for variance in ("fixed_small", "fixed_large"):
        assert VPPrior(str(tmp_path / "prior.safetensors"), variance=variance).variance == variance


def test_a_diffusers_folder_is_a_prior(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET)
    unet.save_pretrained(tmp_path)
    prior = VPPrior(str(tmp_path))
    x = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(prior.network(x, torch.tensor([7])), unet(x, torch.tensor([7])).sample)


@pytest.mark.parametrize("family", ["kl", "vq"])
def test_a_diffusers_folder_is_an_autoencoder(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    made = Autoencoder("random", family, TINY_AUTOENCODER)
    made.net.save_pretrained(tmp_path)
    loaded = Autoencoder(str(tmp_path))
    assert loaded.family == family
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(loaded.features(x), made.features(x))
    UNet2DModel(**TINY_UNET).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds a UNet2DModel, not one of AutoencoderKL, VQModel"):
        Autoencoder(str(tmp_path / "unet"))


def test_random_weights_are_asked_for_by_name_and_need_a_network() -> None:
    with pytest.raises(ValueError, match="needs the arguments of the network"):
        VPPrior("random")
    with pytest.raises(TypeError, match="weights"):
        VPPrior(network=TINY_UNET)
    with pytest.raises(ValueError, match="network: "):
        VPPrior("random", network={"no_such_argument": 1})


def test_bad_weight_files_are_refused_in_one_sentence(tiny_prior: VPPrior, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    tiny_prior.save(good)
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors' does not exist"):
        VPPrior(str(missing))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        VPPrior(str(truncated))
    pickle = tmp_path / "weights.pt"
    torch.save({}, pickle)
    with pytest.raises(ValueError, match="pickles can run code"):
        VPPrior(str(pickle))
    with pytest.raises(ValueError, match="holds a vp_prior, not a autoencoder"):
        Autoencoder(str(good))
    with pytest.raises(ValueError, match="contradicts weights"):
        VPPrior(str(good), network=TINY_UNET | {"block_out_channels": [8, 32]})
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        VPPrior(str(tmp_path))


def test_a_file_whose_description_lies_is_of_another_architecture(tiny_prior: VPPrior, tmp_path: Path) -> None:
    from equireg.weights import save_weights

    path = tmp_path / "lie.safetensors"
    description = json.loads(json.dumps(tiny_prior.description))
    description["network"]["block_out_channels"] = [8, 32]
    save_weights(path, tiny_prior.network.unet.state_dict(), description)
    with pytest.raises(ValueError, match="belong to another architecture"):
        VPPrior(str(path))


def test_a_prior_refuses_images_it_cannot_take(tiny_prior: VPPrior) -> None:
    tiny_prior.check_shape((1, 16, 32))
    with pytest.raises(ValueError, match="16x18 must be multiples of 4"):
        tiny_prior.check_shape((1, 16, 18))
    with pytest.raises(ValueError, match="images have 3 channels"):
        tiny_prior.check_shape((3, 16, 16))


def test_vq_autoencoders_encode_before_quantising_and_decode_after() -> None:
    torch.manual_seed(0)
    network = {
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 2,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 16,
    }
    autoencoder = Autoencoder("random", "vq", network)
    x = torch.rand(2, 1, 16, 16)
    z = autoencoder.encode(x)
    assert z.shape == (2, 2, 8, 8)
    assert len(torch.unique(z)) > 2 * 16  # continuous: not the codebook's values
    assert autoencoder(x).shape == x.shape
    image, commitment = autoencoder.decode_training(z)
    assert image.shape == x.shape
    assert commitment > 0


def test_image_by_image_a_prior_answers_with_the_same_bits_in_every_batch(tmp_path: Path, tiny_prior: VPPrior) -> None:
    tiny_prior.save(tmp_path / "prior.safetensors")
    prior = VPPrior(str(tmp_path / "prior.safetensors"), image_by_image=True)
    step = list(prior.schedule(10))[4]
    x_t = SampleNoise(range(5), 0, Stream.SAMPLER).randn((1, 16, 16), like=torch.zeros(1))
    together = prior(x_t, step).eps
    alone = torch.cat([prior(x, step).eps for x in x_t.split(1)])
    assert torch.equal(together, alone)
