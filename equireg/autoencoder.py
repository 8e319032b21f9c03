"""Autoencoders: the first stage of latent diffusion, and the MPE function of the paper."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from equireg.folding import fold, unfold
from equireg.noise import Noise
from equireg.weights import RANDOM, load_state, load_weights, read_diffusers_config, save_weights, settle

CLASSES = {"kl": AutoencoderKL, "vq": VQModel}


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL or VQModel with a deterministic encoder, for images in [-1, 1].

    Args:
        weights: a .safetensors file of this library, a diffusers folder (config.json beside its .safetensors), or
            "random" for untrained weights, which need ``family`` and ``network``.
        family: "kl" (AutoencoderKL) or "vq" (VQModel); read from ``weights`` when left out.
        network: arguments of that class; read from ``weights`` when left out, checked against them otherwise. Its
            channels are those after folding.
        space_to_depth: side of the blocks of pixels folded into channels in front of the encoder.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if they are damaged or of another architecture, or if random ones come without ``network``.
    """

    kind = "autoencoder"

    def __init__(
        self,
        weights: str,
        family: Literal["kl", "vq"] | None = None,
        network: dict[str, Any] | None = None,
        space_to_depth: int | None = None,
    ) -> None:
        super().__init__()
        described, state = _read(weights)
        asked = settle({"family": family, "network": network, "space_to_depth": space_to_depth}, described, weights)
        if asked["family"] is None or asked["network"] is None:
            raise ValueError("weights='random' needs family='kl' or 'vq' and that class's arguments: network={...}")
        asked["space_to_depth"] = asked["space_to_depth"] or 1
        self.description = {"kind": self.kind} | asked
        self.space_to_depth: int = asked["space_to_depth"]
        self.family: Literal["kl", "vq"] = asked["family"]
        try:
            self.net = CLASSES[self.family](**asked["network"])
        except TypeError as error:
            raise ValueError(f"network: {error}") from error
        if state is not None:
            load_state(self.net, state, weights)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.net.config.in_channels // self.space_to_depth**2

    @property
    def factor(self) -> int:
        """Side of the image pixels behind one latent pixel."""
        return self.space_to_depth * 2 ** (len(self.net.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        config = self.net.config
        return (config.get("vq_embed_dim") if self.family == "vq" else None) or config.latent_channels

    @property
    def scale_factor(self) -> float:
        """What latent diffusion multiplies these latents by: 1 for VQ, whatever diffusers' VQModel has as default."""
        return self.net.config.scaling_factor if self.family == "kl" else 1.0

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when the autoencoder cannot take images of this (C, H, W)."""
        channels, height, width = shape
        if channels != self.channels:
            raise ValueError(f"images have {channels} channels, the autoencoder was trained on {self.channels}")
        if height % self.factor or width % self.factor:
            raise ValueError(f"image sides {height}x{width} must be multiples of the autoencoder's {self.factor}")

    def moments(self, x: Tensor) -> Tensor:
        """Output of the encoder: mean and log-variance (B, 2c, h, w) for KL, the latent (B, c, h, w) for VQ."""
        h = self.net.encoder(fold(x, self.space_to_depth))
        return h if self.net.quant_conv is None else self.net.quant_conv(h)

    def encode(self, x: Tensor) -> Tensor:
        """The latent (B, c, h, w), deterministic: the mean of a KL encoder, the unquantised output of a VQ one."""
        return self.latent(self.moments(x))

    def latent(self, moments: Tensor) -> Tensor:
        """The deterministic latent in the encoder's output."""
        return moments.chunk(2, dim=1)[0] if self.family == "kl" else moments

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """A latent drawn from the Gaussian of a KL encoder."""
        moments = self.moments(x)
        mean = self.latent(moments)
        return sample_latent(moments, noise.randn(tuple(mean.shape[1:]), like=mean))

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """The image (B, C, H, W) of a latent; a VQ latent is quantised first, with straight-through gradients.

        Args:
            z: latents (B, c, h, w).
            quantize: snap VQ latents to the codes; without meaning for KL.
        """
        options = {"force_not_quantize": not quantize} if self.family == "vq" else {}
        return unfold(self.net.decode(z, **options).sample, self.space_to_depth)

    def decode_training(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of a latent and the codebook's commitment loss (VQ family), for training."""
        output = self.net.decode(z)
        return unfold(output.sample, self.space_to_depth), output.commit_loss.mean()

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Gives every latent channel mean 0 and deviation 1: images and features stay what they are.

        The map z -> (z - mean) / std goes into the 1x1 convolution after the encoder, its inverse into the one before
        the decoder.

        Args:
            mean: (c,) of the latents so far.
            std: (c,), positive.

        Raises:
            ValueError: if the family is VQ, whose codes fix the scale, the network has no such convolutions, or a
                deviation is not positive.
        """
        before, after = self.net.quant_conv, self.net.post_quant_conv
        if self.family != "kl" or before is None or after is None:
            raise ValueError("only an AutoencoderKL with quant_conv and post_quant_conv can be standardised")
        if not (std > 0).all():
            raise ValueError(f"std={std.tolist()} must be positive")
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std.view(1, -1, 1, 1)
        before.weight[: len(mean)] /= std.view(-1, 1, 1, 1)
        before.bias[: len(mean)] -= mean
        before.bias[: len(mean)] /= std
        before.bias[len(mean) :] -= 2 * std.log()  # the log-variance belongs to the scaled latent

    def features(self, x: Tensor) -> Tensor:
        """The MPE function of the paper's code: post_quant_conv of the latent, no sampling, no quantisation."""
        z = self.encode(x)
        return z if self.net.post_quant_conv is None else self.net.post_quant_conv(z)

    def forward(self, x: Tensor) -> Tensor:
        """Decode(encode(x))."""
        return self.decode(self.encode(x))

    def save(self, path: str | Path) -> None:
        """Writes a file that ``Autoencoder(weights=path)`` reads, in half precision."""
        save_weights(path, self.net.state_dict(), self.description)


def _read(weights: str) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Description and tensors behind the argument ``weights``; no tensors for random ones."""
    if weights == RANDOM:
        return {}, None
    if not Path(weights).is_dir():
        return load_weights(weights, Autoencoder.kind)
    config = read_diffusers_config(weights)
    families = {cls.__name__: family for family, cls in CLASSES.items()}
    if config.get("_class_name") not in families:
        raise ValueError(f"weights={weights!r} holds a {config.get('_class_name')}, not one of {', '.join(families)}")
    family = families[config["_class_name"]]
    state = CLASSES[family].from_pretrained(weights, use_safetensors=True).state_dict()
    network = {name: value for name, value in config.items() if not name.startswith("_")}
    return {"family": family, "network": network}, state


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) per image (B,), summed over the latent, from mean and log-variance."""
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)  # diffusers' and latent diffusion's bounds
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def sample_latent(moments: Tensor, eps: Tensor | None = None) -> Tensor:
    """z ~ q(z|x) from mean and log-variance, with the given standard normals or those of the global generator."""
    mean, log_variance = moments.chunk(2, dim=1)
    eps = torch.randn_like(mean) if eps is None else eps
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps
