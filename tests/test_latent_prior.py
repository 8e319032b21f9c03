"""Latent priors: units, shapes, quantisation, scale factors, and what they refuse."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.groups import get_group
from equireg.mpe import PriorDecoder, PriorEncoder, PriorRoundTrip
from equireg.noise import SampleNoise, Stream
from equireg.priors import LatentPrior, TextPrior, VPPrior, ddim_step, ddim_steps
from equireg.regularizer import Regularizer, WeightSchedule, equi
from tests.conftest import TINY_AUTOENCODER, TINY_LATENT_UNET, make_latent_prior


def make_parts(family: str = "kl", **network: object) -> tuple[VPPrior, Autoencoder]:
    codes = {"num_vq_embeddings": 16} if family == "vq" else {}
    return VPPrior("random", network=TINY_LATENT_UNET), Autoencoder(
        "random", family, TINY_AUTOENCODER | codes | network
    )


@pytest.mark.parametrize("family", ["kl", "vq"])
def test_latents_are_codes_times_the_scale_factor(family: str, images: Tensor) -> None:
    prior, autoencoder = make_parts(family)
    latent = LatentPrior(prior, autoencoder, scale_factor=0.5)
    codes = autoencoder.encode(images)
    torch.testing.assert_close(latent.encode(images), 0.5 * codes)
    torch.testing.assert_close(latent.decode(0.5 * codes), autoencoder.decode(codes))
    assert latent.latent_shape((1, 16, 32)) == (2, 8, 16)
    assert tuple(codes.shape[1:]) == latent.latent_shape((1, 16, 16))
    assert latent.image_shape == (1, 16, 16)


def test_the_gradient_passes_encoder_and_decoder(images: Tensor) -> None:
    latent = make_latent_prior("vq")
    x = images[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(latent.decode(latent.encode(x)).sum(), x)
    assert gradient.abs().max() > 0


def test_the_autoencoder_computes_in_the_type_of_the_network(images: Tensor) -> None:
    """Images and latents stay float32, and half precision moves them by no more than its rounding."""
    latent = make_latent_prior("kl")
    z, x = latent.encode(images), latent.decode(latent.encode(images))
    latent.autocast_dtype = torch.bfloat16
    z_half, x_half = latent.encode(images), latent.decode(z)
    assert z_half.dtype == x_half.dtype == torch.float32
    for half, full in ((z_half, z), (x_half, x)):
        assert 0 < (half - full).norm() < 0.02 * full.norm()


def test_quantisation_snaps_to_codes_and_is_passed_straight_through(images: Tensor) -> None:
    prior, autoencoder = make_parts("vq")
    quantized, plain = LatentPrior(prior, autoencoder), LatentPrior(prior, autoencoder, quantize=False)
    code = autoencoder.net.quantize.embedding.weight[3].view(1, 2, 1, 1).expand(1, 2, 8, 8)
    z = (code + 1e-4).requires_grad_()
    torch.testing.assert_close(quantized.decode(z), plain.decode(code))
    assert not torch.equal(plain.decode(z), plain.decode(code))
    exact = code.clone().requires_grad_()
    ours, expected = (torch.autograd.grad(prior.decode(v).sum(), v)[0] for prior, v in ((quantized, z), (plain, exact)))
    torch.testing.assert_close(ours, expected)


def test_a_kl_latent_is_the_mean_and_on_request_a_draw(images: Tensor) -> None:
    latent = make_latent_prior("kl")
    mean, log_variance = latent.autoencoder.moments(images[:2]).chunk(2, dim=1)
    torch.testing.assert_close(latent.encode(images[:2]), mean)
    drawn = latent.encode(images[:2], SampleNoise([4, 7], 0, Stream.SAMPLER))
    eps = SampleNoise([4, 7], 0, Stream.SAMPLER).randn((2, 8, 8), like=mean)
    torch.testing.assert_close(drawn, mean + (0.5 * log_variance).exp() * eps)


def test_the_scale_factor_is_the_arguments_the_weights_or_the_autoencoders(tmp_path: Path) -> None:
    prior, autoencoder = make_parts("kl", scaling_factor=0.7)
    assert LatentPrior(prior, autoencoder).scale_factor == 0.7
    assert LatentPrior(*make_parts("vq")).scale_factor == 1.0  # not what diffusers' class has as its default
    LatentPrior(prior, autoencoder, scale_factor=0.3).save(tmp_path / "prior.safetensors")
    loaded = VPPrior(str(tmp_path / "prior.safetensors"))
    assert LatentPrior(loaded, autoencoder).scale_factor == 0.3
    with pytest.raises(ValueError, match=r"scale_factor=0.5 contradicts the prior's weights, trained with 0.3"):
        LatentPrior(loaded, autoencoder, scale_factor=0.5)


def test_latents_are_never_clipped() -> None:
    latent = make_latent_prior()
    step = ddim_steps(latent.alpha_bar, 4)[0]
    z_t = 3 * torch.randn(1, 2, 8, 8)
    assert latent(z_t, step).x0_hat.abs().max() > 10


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 15, 16), "image sides 15x16 must be multiples of the autoencoder's 2"),
        ((3, 16, 16), "images have 3 channels, the autoencoder was trained on 1"),
        ((1, 18, 16), "the latents of images of 18x16 pixels do not fit: image sides 9x8 must be multiples of 2"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_latent_prior().check_shape(shape)


def test_an_autoencoder_that_does_not_fit_is_refused() -> None:
    prior, autoencoder = make_parts("kl", latent_channels=3)
    with pytest.raises(ValueError, match="its latents have 3 channels, the prior was trained on 2"):
        LatentPrior(prior, autoencoder)
    with pytest.raises(ValueError, match="quantize=true needs an autoencoder of the family vq, this one is kl"):
        LatentPrior(*make_parts("kl"), quantize=True)
    with pytest.raises(ValueError, match="scale_factor=0 must be positive"):
        LatentPrior(*make_parts("kl"), scale_factor=0)


def test_a_kl_autoencoder_is_refused_where_a_configuration_says_vq(tmp_path: Path) -> None:
    make_parts("kl")[1].save(tmp_path / "kl.safetensors")
    with pytest.raises(ValueError, match=r"family='vq' contradicts weights=.*made with 'kl'"):
        Autoencoder(str(tmp_path / "kl.safetensors"), family="vq")


def test_a_copy_is_independent(images: Tensor) -> None:
    latent = make_latent_prior()
    double = copy.deepcopy(latent).double()
    assert double.encode(images.double()).dtype == torch.float64
    assert latent.encode(images).dtype == torch.float32


@pytest.mark.parametrize("function", [PriorDecoder, PriorEncoder, PriorRoundTrip])
def test_prior_functions_are_the_priors_own(function: type, images: Tensor) -> None:
    latent = make_latent_prior()
    f = function()
    f.bind(latent)
    z = latent.encode(images)
    expected = {PriorDecoder: latent.decode(z), PriorEncoder: z, PriorRoundTrip: latent.encode(latent.decode(z))}
    torch.testing.assert_close(f(images if function is PriorEncoder else z), expected[function])
    assert not list(f.parameters())


def test_a_decoded_latent_is_not_decoded_again_by_the_penalty(images: Tensor) -> None:
    latent = make_latent_prior()
    function = PriorDecoder()
    function.bind(latent)
    regularizer = Regularizer(function, "hflip", WeightSchedule(1.0, scale="none"))
    regularizer.start(SampleNoise([0, 1], 0, Stream.GROUP))
    z, step = latent.encode(images[:2]), ddim_steps(latent.alpha_bar, 4)[0]
    decoded = latent.decode(z)
    seen = []
    latent.decoder.register_forward_hook(lambda decoder, inputs, output: seen.append(len(output)))
    shared = regularizer(z, step, decoded=decoded)
    assert seen == [2]  # T_g z alone
    torch.testing.assert_close(shared, regularizer(z, step))
    assert seen == [2, 4]
    group, g = get_group("hflip"), torch.ones(2, dtype=torch.long)
    torch.testing.assert_close(shared, equi(latent.decode, group, z, g).flatten(1).norm(dim=1))


def test_a_ddim_chain_with_a_perfect_denoiser_ends_at_its_latent() -> None:
    alpha_bar = make_latent_prior().alpha_bar
    truth, noise = torch.randn(2, 3, 4, 4), SampleNoise([0, 1], 0, Stream.SAMPLER)
    for eta in (0.0, 1.0):
        z_t = noise.randn((3, 4, 4), like=truth)
        for step in ddim_steps(alpha_bar, 20, eta, set_alpha_to_one=True):
            eps = (z_t - step.alpha_bar**0.5 * truth) / (1 - step.alpha_bar) ** 0.5
            z_t = ddim_step(step.x0_hat(z_t, eps), eps, step, noise)
        torch.testing.assert_close(z_t, truth, rtol=0, atol=1e-4)


def test_a_ddim_chain_runs_as_many_steps_as_its_stride_gives() -> None:
    alpha_bar = make_latent_prior().alpha_bar
    assert [len(ddim_steps(alpha_bar, count)) for count in (1000, 500, 80, 14)] == [1000, 500, 84, 15]
    full, fixed = ddim_steps(alpha_bar, 1000), ddim_steps(alpha_bar, 1000, shift_full=False)
    assert (full[0].t, full[-1].t, fixed[0].t, fixed[-1].t) == (1000, 1, 999, 0)
    assert [step.alpha_bar for step in full] == [step.alpha_bar for step in fixed]
    assert full[-1].alpha_bar == full[-1].alpha_bar_prev  # the published chain ends with a step that goes nowhere
    assert [step.j for step in full[-2:]] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_steps=0"), ((1001,), "num_steps=1001"), ((10, 1.5), "eta=1.5 must be between 0 and 1")],
)
def test_a_ddim_chain_that_makes_no_sense_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim_steps(make_latent_prior().alpha_bar, *arguments)


def test_enlarged_images_have_larger_latents_and_come_back(images: Tensor) -> None:
    prior, autoencoder = make_parts("kl")
    latent = LatentPrior(prior, autoencoder, enlarge=2)
    assert latent.latent_shape((1, 16, 16)) == (2, 16, 16)
    assert latent.image_shape == (1, 8, 8)
    z = latent.encode(images)
    torch.testing.assert_close(
        z, latent.scale_factor * autoencoder.encode(images.repeat_interleave(2, -1).repeat_interleave(2, -2))
    )
    x = latent.decode(z)
    assert x.shape == images.shape
    latent.autoencoder.decode = lambda code: code  # what is left of the decoder commutes with flips
    torch.testing.assert_close(latent.decode(z.flip(-1)), latent.decode(z).flip(-1))
    with pytest.raises(ValueError, match="enlarge=3 must be positive and divide the autoencoder's 2"):
        LatentPrior(prior, autoencoder, enlarge=3)


TINY_TEXT_UNET = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 6,
}


def test_a_text_prior_reads_its_folder_and_its_prompt(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    unet.save_pretrained(tmp_path / "unet")
    prompt = torch.randn(1, 5, 6)
    save_file({"prompt_embeds": prompt}, tmp_path / "prompt.safetensors")
    prior = TextPrior(str(tmp_path / "unet"), str(tmp_path / "prompt.safetensors"))
    latent = LatentPrior(prior, make_parts("kl")[1])
    assert latent.image_shape == (1, 16, 16)
    assert latent.alpha_bar[0] == pytest.approx(1 - 0.00085)
    step = ddim_steps(latent.alpha_bar, 10)[3]
    z_t = latent.encode(images[:2])
    expected = unet(z_t, step.t, encoder_hidden_states=prompt.expand(2, -1, -1)).sample
    torch.testing.assert_close(latent(z_t, step).eps, expected)


def test_a_text_prior_guides_from_its_null_prompt_to_its_prompt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    unet.save_pretrained(tmp_path / "unet")
    texts = torch.randn(2, 1, 5, 6)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("null", "prompt")]
    for file, text in zip(files, texts, strict=True):
        save_file({"prompt_embeds": text.contiguous()}, file)
    prior = TextPrior(str(tmp_path / "unet"), files[1], null_prompt=files[0], guidance_scale=7.5)
    z, t = torch.randn(2, 2, 8, 8), torch.tensor([300.5, 300.5])
    null, prompted = (unet(z, t, encoder_hidden_states=text.expand(2, -1, -1)).sample for text in texts)
    torch.testing.assert_close(prior.network(z, t), null + 7.5 * (prompted - null), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance_scale=7.5 needs a null_prompt"):
        TextPrior(str(tmp_path / "unet"), files[1], guidance_scale=7.5)


def test_a_text_prior_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    UNet2DConditionModel(**TINY_TEXT_UNET).save_pretrained(tmp_path / "unet")
    unet, prompt = str(tmp_path / "unet"), str(tmp_path / "prompt.safetensors")
    with pytest.raises(FileNotFoundError, match=r"prompt=.* does not exist"):
        TextPrior(unet, prompt)
    save_file({"other": torch.zeros(1)}, prompt)
    with pytest.raises(ValueError, match="has no prompt_embeds; it has other"):
        TextPrior(unet, prompt)
    save_file({"prompt_embeds": torch.zeros(1, 5, 7)}, prompt)
    with pytest.raises(ValueError, match=r"prompt_embeds is \(1, 5, 7\), must be \(1, tokens, 6\)"):
        TextPrior(unet, prompt)
    VPPrior("random", network=TINY_LATENT_UNET).network.unet.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a UNet2DModel, not a UNet2DConditionModel"):
        TextPrior(str(tmp_path / "plain"), prompt)
