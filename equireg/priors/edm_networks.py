"""Networks of function-space priors: the published U-Nets with the names of their checkpoints, and a small one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from neuralop.layers.spectral_convolution import SpectralConv as NeuralopSpectralConv
from tltorch.factorized_tensors.core import FactorizedTensor
from torch import Tensor, nn

from equireg.priors.networks import UNet
from equireg.priors.spectral import Basis, SpectralDenoiser

Resample = Literal["up", "down"] | None
Padding = Literal["zeros", "circular"]


class FieldUNet(UNet):
    """diffusers' UNet2DModel for fields (B, 2, H, W), told the noise label in place of a timestep.

    Args:
        config: arguments of ``diffusers.UNet2DModel`` without its channels and sample size.
        side: height and width the network is made for.
        space_to_depth: side of the blocks of points folded into channels.
        padding: what the convolutions see beyond the edge; ``circular`` suits periodic equations.
        coordinates: feed cos and sin of 2 pi row / H and 2 pi column / W beside the field: circular convolutions see no
            edges, and the forcing of an equation need not be the same everywhere.
        linear: leave to the network what the linear denoiser in this basis misses, see ``SpectralDenoiser``: the
            estimate takes the place of EDM's c_skip x, and the network sees it. The training fits it first.
    """

    TIME_SCALE = 250.0
    """c_noise lies between -1.6 and 1.1; diffusers' sinusoids are made for timesteps from 0 to 1000."""

    def __init__(
        self,
        config: dict[str, Any],
        side: int,
        space_to_depth: int = 1,
        padding: Padding = "zeros",
        coordinates: bool = True,
        linear: Basis | None = None,
    ) -> None:
        if padding not in ("zeros", "circular"):
            raise ValueError(f"network: padding={padding!r} must be 'zeros' or 'circular'")
        folded = space_to_depth**2
        channels = 2 + 4 * coordinates + 2 * (linear is not None)
        sizes = {
            "sample_size": side // space_to_depth,
            "in_channels": channels * folded,
            "out_channels": 2 * folded,
        }
        super().__init__(config | sizes, space_to_depth)
        self.coordinates = coordinates
        self.linear = None if linear is None else SpectralDenoiser(side, linear)
        for module in self.unet.modules():
            if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                module.padding_mode = padding
        nn.init.zeros_(self.unet.conv_out.weight)  # training starts at D = c_skip x

    @property
    def in_channels(self) -> int:
        return self.out_channels

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """F (B, 2, H, W) for fields x (B, 2, H, W), with a linear denoiser x and its estimate, and labels (B,)."""
        if self.coordinates:
            x = torch.cat([x, self._coordinates(x)], 1)
        return super().forward(x, self.TIME_SCALE * c_noise)

    @staticmethod
    def _coordinates(x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        rows = torch.arange(height, device=x.device, dtype=x.dtype).view(1, -1, 1) * (2 * math.pi / height)
        columns = torch.arange(width, device=x.device, dtype=x.dtype).view(1, 1, -1) * (2 * math.pi / width)
        waves = [wave(angle).expand(1, height, width) for angle in (rows, columns) for wave in (torch.cos, torch.sin)]
        return torch.cat(waves).expand(count, 4, height, width)


class SongNetwork(nn.Module):
    """The DDPM++ U-Net of Song et al. (ICLR 2021) as Karras et al. (NeurIPS 2022) arrange it, for square fields.

    Encoder outputs are pushed on a stack and joined again in front of every decoder block. Layers are named after the
    nominal resolution ``img_resolution``, as in the published checkpoints, also when fields of another size are fed.

    Args:
        img_resolution: nominal side; it names the layers, and sets where attention sits.
        img_channels: channels of a field.
        model_channels: channels of the finest level.
        channel_mult: channels of every level, in multiples of ``model_channels``, finest first.
        channel_mult_emb: channels of the noise embedding, in multiples of ``model_channels``.
        channel_mult_noise: channels of its sinusoids, likewise.
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: levels with attention in their blocks; the bottleneck always has it.
        dropout: between the two convolutions of a block.
        fixed: choices of the official constructors that have one value here, see ``FIXED``.

    Raises:
        ValueError: if the official constructor is asked for what the published checkpoints do not use.
    """

    FIXED: dict[str, tuple[Any, ...]] = {
        "embedding_type": ("positional",),
        "encoder_type": ("standard",),
        "decoder_type": ("standard",),
        "resample_filter": ([1, 1],),
        "label_dim": (0,),
        "use_fp16": (False, True),  # how it was trained; here networks compute in float32
    }

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] | list[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] | list[int] = (16,),
        dropout: float = 0.10,
        **fixed: Any,
    ) -> None:
        super().__init__()
        self._refuse(fixed)
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"img_resolution={img_resolution} cannot be halved {len(channel_mult) - 1} times")
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.levels = len(channel_mult)
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.frequencies = noise_channels // 2
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = [model_channels * m for m in channel_mult]
        sides = [img_resolution >> level for level in range(self.levels)]

        def block(name: str, in_channels: int, out_channels: int, side: int, **options: Any) -> Block:
            convolution = partial(self.convolution, side=side)
            return Block(name, in_channels, out_channels, emb_channels, convolution, dropout, **options)

        channels = model_channels
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = self.projection(self.input_channels, channels)
        skips = [channels]
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            if level:
                name = f"{side}x{side}_down"
                self.enc[name] = block(name, channels, channels, side, resample="down")
                skips.append(channels)
            for i in range(num_blocks):
                name = f"{side}x{side}_block{i}"
                self.enc[name] = block(name, channels, width, side, attention=side in attn_resolutions)
                channels = width
                skips.append(channels)
        for level in reversed(range(self.levels)):
            side, width = sides[level], widths[level]
            if level == self.levels - 1:
                self.dec[f"{side}x{side}_in0"] = block(f"{side}x{side}_in0", channels, channels, side, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(f"{side}x{side}_in1", channels, channels, side)
            else:
                name = f"{side}x{side}_up"
                self.dec[name] = block(name, channels, channels, side, resample="up")
            for i in range(num_blocks + 1):
                name = f"{side}x{side}_block{i}"
                attention = i == num_blocks and side in attn_resolutions
                self.dec[name] = block(name, channels + skips.pop(), width, side, attention=attention)
                channels = width
        name = f"{img_resolution}x{img_resolution}"
        self.dec[f"{name}_aux_norm"] = group_norm(channels)
        self.dec[f"{name}_aux_conv"] = self.projection(channels, img_channels)

    @property
    def in_channels(self) -> int:
        """Channels of a field."""
        return self.img_channels

    @property
    def out_channels(self) -> int:
        """The same."""
        return self.img_channels

    @property
    def side_divisor(self) -> int:
        """Sides must be multiples of this."""
        return 2 ** (self.levels - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width the network was made for."""
        return self.img_resolution, self.img_resolution

    @property
    def input_channels(self) -> int:
        """Channels of the first convolution's input."""
        return self.img_channels

    def convolution(self, in_channels: int, out_channels: int, side: int, resample: Resample = None) -> nn.Module:
        """The convolution of a block at the level of nominal side ``side``."""
        raise NotImplementedError

    def projection(self, in_channels: int, out_channels: int) -> nn.Module:
        """The first and the last convolution."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> Tensor:
        """What the first convolution sees of a field."""
        return x

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """F(x, c_noise) for fields x (B, C, H, W) and noise labels (B,)."""
        embedding = F.silu(self.map_layer0(self._sinusoids(c_noise).to(x.dtype)))
        embedding = F.silu(self.map_layer1(embedding))
        skips = []
        x = self.prepare(x)
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("_aux_norm"):
                x = F.silu(layer(x))
            elif isinstance(layer, Block):
                x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, embedding)
            else:
                x = layer(x)
        return x

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        k = torch.arange(self.frequencies, dtype=torch.float32, device=c_noise.device)
        angles = c_noise.float().outer((1 / 10000) ** (k / (self.frequencies - 1)))
        return torch.cat([angles.sin(), angles.cos()], 1)

    def _refuse(self, fixed: dict[str, Any]) -> None:
        for name, value in fixed.items():
            if name not in self.FIXED:
                raise ValueError(f"network: {type(self).__name__} has no argument {name!r}")
            if value not in self.FIXED[name]:
                raise ValueError(f"network: {name}={value!r} is not supported; allowed: {self.FIXED[name][0]!r}")


class SongUNet(SongNetwork):
    """The network of DiffusionPDE ("ddpmpp"): 3x3 convolutions.

    Args:
        augment_dim: width of the augmentation label the network was trained with; at sampling it contributes nothing.
        options: see ``SongNetwork``.
    """

    FIXED = SongNetwork.FIXED | {"label_dropout": (0,)}

    def __init__(self, img_resolution: int, img_channels: int, augment_dim: int = 0, **options: Any) -> None:
        super().__init__(img_resolution, img_channels, **options)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self.map_layer0.in_features, bias=False)

    def convolution(self, in_channels: int, out_channels: int, side: int, resample: Resample = None) -> nn.Module:
        return Convolution(in_channels, out_channels, 3, resample)

    def projection(self, in_channels: int, out_channels: int) -> nn.Module:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class SongUNO(SongNetwork):
    """The network of FunDPS: a U-shaped neural operator, spectral convolutions in place of the 3x3 ones.

    Two channels of coordinates join the field, so that the network can be used at other resolutions than its own.

    Args:
        fmult: Fourier modes of a level, as a fraction of its nominal side.
        rank: size of the Tucker factors relative to the full spectral weights; 1 stores these densely.
        options: see ``SongNetwork``.
    """

    FIXED = SongNetwork.FIXED | {"cond": (False,), "augment_dim": (0,), "label_dropout": (0,)}

    def __init__(
        self, img_resolution: int, img_channels: int, fmult: float = 0.5, rank: float = 0.1, **options: Any
    ) -> None:
        self.fmult = fmult
        self.rank = rank
        super().__init__(img_resolution, img_channels, **options)

    @property
    def input_channels(self) -> int:
        return self.img_channels + 2

    def convolution(self, in_channels: int, out_channels: int, side: int, resample: Resample = None) -> nn.Module:
        return SpectralConvolution(in_channels, out_channels, int(side * self.fmult), self.rank, resample)

    def projection(self, in_channels: int, out_channels: int) -> nn.Module:
        return nn.Conv2d(in_channels, out_channels, 1)

    def prepare(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        rows = torch.linspace(0, 1, height, dtype=x.dtype, device=x.device).view(1, 1, -1, 1)
        columns = torch.linspace(0, 1, width, dtype=x.dtype, device=x.device).view(1, 1, 1, -1)
        return torch.cat([x, rows.expand(count, 1, height, width), columns.expand(count, 1, height, width)], 1)

    def adopt_ranks(self, state: dict[str, Tensor]) -> None:
        """Gives the spectral weights the Tucker ranks of ``state``: the rule that made them may have changed since."""
        for name, module in self.named_modules():
            core = state.get(f"{name}.weight.core")
            if isinstance(module, SpectralConvolution) and core is not None:
                module.set_ranks(tuple(core.shape[:-1]))


class Block(nn.Module):
    """A residual block of two convolutions with the noise embedding between them, and attention after them."""

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        convolution: Callable[..., nn.Module],
        dropout: float,
        resample: Resample = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0 = group_norm(in_channels)
        self.conv0 = convolution(in_channels, out_channels, resample=resample)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = convolution(out_channels, out_channels)
        if in_channels != out_channels or resample:
            self.skip = Convolution(in_channels, out_channels, 1, resample)
        else:
            self.skip = nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(x)) * math.sqrt(0.5)
        if self.attention:
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * math.sqrt(0.5)
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        """One head over all points; q, k and v of a channel lie side by side."""
        count, channels, height, width = qkv.shape
        q, k, v = qkv.view(count, channels // 3, 3, height * width).unbind(2)
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(channels // 3)).softmax(2)
        return torch.einsum("bqk,bck->bcq", weights, v).reshape(count, channels // 3, height, width)


class Convolution(nn.Conv2d):
    """A convolution after averaging 2x2 points ("down") or repeating each ("up")."""

    def __init__(self, in_channels: int, out_channels: int, size: int, resample: Resample) -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.resample: Resample = resample
        if resample:  # in the published checkpoints; the two ways of resampling are its two uses
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return super().forward(x)


class SpectralConvolution(NeuralopSpectralConv):
    """neuraloperator's spectral convolution, in float32 whatever the precision around it.

    Resampling crops or pads the rows of the unshifted spectrum at its end, which is no interpolation; the published
    weights were trained with exactly that.
    """

    def __init__(self, in_channels: int, out_channels: int, modes: int, rank: float, resample: Resample) -> None:
        factor = {None: None, "down": 0.5, "up": 2}[resample]
        super().__init__(
            in_channels,
            out_channels,
            (modes, modes),
            resolution_scaling_factor=factor,
            rank=rank,
            factorization="ComplexTucker" if rank < 1 else "Dense",
            implementation="factorized",
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # complex weights have no half precision
            return super().forward(x.float())

    def set_ranks(self, ranks: tuple[int, ...]) -> None:
        """Replaces the weights by zeros of other Tucker ranks."""
        if tuple(self.weight.rank) != ranks:
            shape = self.weight.shape
            self.weight = FactorizedTensor.new(shape, rank=ranks, factorization="ComplexTucker", dtype=torch.cfloat)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least four channels, 32 at most."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
