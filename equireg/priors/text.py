"""Priors whose network reads a text, such as Stable Diffusion's."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from equireg.priors.schedule import BetaSchedule
from equireg.priors.vp import Prediction, VPPrior
from equireg.weights import read_diffusers_config


class TextPrior(VPPrior):
    """A VP prior with one text for all images, read from a file, so that no text encoder is needed.

    Samplers that solve inverse problems mostly use the empty prompt, where guidance between two texts changes nothing;
    the published LatentDAPS guides from it to "a natural looking image" with a scale of 7.5, at twice the cost.

    Args:
        weights: a diffusers folder (config.json beside its .safetensors) of a UNet2DConditionModel.
        prompt: a .safetensors file with ``prompt_embeds`` (1, tokens, width), the text encoder's last hidden state; for
            Stable Diffusion v1.5 that of the empty prompt, (1, 77, 768).
        null_prompt: a second such file, of the text that guidance leads away from; none when left out.
        guidance_scale: the answer is the null prompt's plus this times the difference to the prompt's (classifier-free
            guidance, Ho and Salimans 2021); without ``null_prompt`` it must be 1.
        prediction: what the network was trained to predict.
        num_train_timesteps: T.
        beta_schedule, beta_start, beta_end: the noise schedule of the training; the defaults are Stable Diffusion's.

    Raises:
        FileNotFoundError: if the weights or the prompt are not there.
        ValueError: if they are of another kind, or do not fit each other, or guidance is asked for with one prompt.
    """

    kind = "text_vp_prior"

    def __init__(
        self,
        weights: str,
        prompt: str,
        null_prompt: str | None = None,
        guidance_scale: float = 1.0,
        prediction: Prediction = "epsilon",
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
    ) -> None:
        nn.Module.__init__(self)
        if null_prompt is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale={guidance_scale} needs a null_prompt to lead away from")
        found = read_diffusers_config(weights).get("_class_name")
        if found != UNet2DConditionModel.__name__:
            raise ValueError(f"weights={weights!r} holds a {found}, not a {UNet2DConditionModel.__name__}")
        unet = UNet2DConditionModel.from_pretrained(weights, use_safetensors=True)
        chosen = {
            "prediction": prediction,
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        null = None if null_prompt is None else _read_prompt(null_prompt, "null_prompt")
        self._complete(TextUNet(unet, _read_prompt(prompt), null, guidance_scale), chosen, clip=False)


class TextUNet(nn.Module):
    """diffusers' UNet2DConditionModel with a fixed text.

    Args:
        unet: the network.
        prompt_embeds: (1, tokens, width).
        null_embeds: the same of the text that guidance leads away from, if there is guidance.
        guidance_scale: of classifier-free guidance.

    Raises:
        ValueError: if the network reads texts of another width.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        prompt_embeds: Tensor,
        null_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        for name, text in (("prompt", prompt_embeds), ("null_prompt", null_embeds)):
            if text is not None and (text.ndim != 3 or text.shape[0] != 1 or text.shape[2] != width):
                raise ValueError(f"{name}: prompt_embeds is {tuple(text.shape)}, must be (1, tokens, {width})")
        self.unet = unet
        self.guidance_scale = guidance_scale
        self.register_buffer("prompt_embeds", prompt_embeds.float(), persistent=False)
        self.register_buffer("null_embeds", None if null_embeds is None else null_embeds.float(), persistent=False)

    @property
    def in_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def out_channels(self) -> int:
        return self.unet.config.out_channels

    @property
    def side_divisor(self) -> int:
        """Sides must be multiples of this."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width the network was made for."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Output (B, out_channels, H, W) for latents x (B, c, H, W) at timesteps t (B,)."""
        texts = [self.prompt_embeds] if self.null_embeds is None else [self.null_embeds, self.prompt_embeds]
        text = torch.cat([each.expand(len(x), -1, -1) for each in texts])
        output = self.unet(x.repeat(len(texts), 1, 1, 1), t.repeat(len(texts)), encoder_hidden_states=text).sample
        if self.null_embeds is None:
            return output
        null, prompted = output.chunk(2)
        return null + self.guidance_scale * (prompted - null)


def _read_prompt(path: str, name: str = "prompt") -> Tensor:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{name}={path!r} does not exist; it must be a .safetensors file with prompt_embeds of the text encoder"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{name}={path!r} is truncated or not a safetensors file ({error})") from error
    if "prompt_embeds" not in tensors:
        raise ValueError(f"{name}={path!r} has no prompt_embeds; it has {', '.join(tensors) or 'nothing'}")
    return tensors["prompt_embeds"]
