"""The equivariance penalty: losses Equi and EquiCon, reductions, weight schedules."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from equireg.groups import Group, get_group
from equireg.mpe import MPE
from equireg.noise import Noise
from equireg.priors.schedule import Step

Loss = Literal["equi", "equicon"]
Reduction = Literal["norm", "sqnorm", "mse", "rms"]
NoiseScale = Literal["sigma", "one_minus_alphabar", "sigma_over_alpha", "beta", "sqrt_alphabar", "none"]
Attachment = Literal["in_norm", "separate_step"]


class WeightSchedule:
    """lambda at every step of a sampler.

    Args:
        weight: lambda before scaling.
        scale: factor from the noise level of the step: ``sigma`` sqrt(1 - alpha_bar), ``one_minus_alphabar``,
            ``sigma_over_alpha`` sqrt((1 - alpha_bar) / alpha_bar) (unbounded), ``beta``, ``sqrt_alphabar``, ``none``.
            The paper scales lambda "by the noise scheduler" for DPS; only a factor that vanishes with the noise needs
            no early stopping, hence the default.
        every: penalise every k-th step, the first one included.
        last_tenth_off: no penalty from step ceil(0.9 N) on, the paper's rule for unscaled weights.
        legacy_cutoff: the authors' library's rule instead: no penalty in steps numbered above N - 100.

    Raises:
        ValueError: if the weight is negative or ``every`` is below one.
    """

    def __init__(
        self,
        weight: float,
        scale: NoiseScale = "sigma",
        every: int = 1,
        last_tenth_off: bool = False,
        legacy_cutoff: bool = False,
    ) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight={weight} must be a finite number, not negative")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        if last_tenth_off and legacy_cutoff:
            raise ValueError("last_tenth_off and legacy_cutoff exclude each other")
        self.weight = weight
        self.scale: NoiseScale = scale
        self.every = every
        self.last_tenth_off = last_tenth_off
        self.legacy_cutoff = legacy_cutoff

    def __call__(self, step: Step) -> float:
        """lambda_t of the step."""
        if step.k % self.every:
            return 0.0
        if self.last_tenth_off and step.k >= math.ceil(0.9 * step.num_steps):
            return 0.0
        if self.legacy_cutoff and step.k > step.num_steps - 100:
            return 0.0
        return self.weight * self._factor(step)

    def _factor(self, step: Step) -> float:
        if self.scale == "sigma":
            return math.sqrt(1 - step.alpha_bar)
        if self.scale == "one_minus_alphabar":
            return 1 - step.alpha_bar
        if self.scale == "sigma_over_alpha":
            return math.sqrt((1 - step.alpha_bar) / step.alpha_bar)
        if self.scale == "beta":
            return step.beta
        if self.scale == "sqrt_alphabar":
            return math.sqrt(step.alpha_bar)
        return 1.0


class Regularizer(nn.Module):
    """EquiReg's penalty lambda_t R(x0_hat), per image.

    Equi: d = S_g f(x) - f(T_g x). EquiCon: d = x - T_g^-1 f(T_g x), for an f that maps into x's own space. g is drawn
    per image and step from the image's own stream. f(x) and f(T_g x) are one batched pass; a step of weight zero
    costs nothing.

    Args:
        function: the MPE function f.
        group: name of the group.
        schedule: lambda per step.
        loss: "equi" or "equicon".
        reduction: ``norm`` ||d||, ``sqnorm`` ||d||^2, ``mse`` mean of d^2 or ``rms`` its root, over one image.
        attachment: ``in_norm``: the penalty joins the data misfit under the sampler's step size; ``separate_step``:
            lambda is itself the size of the penalty's gradient step.

    Raises:
        ValueError: if the group is unknown, or EquiCon is asked of an f that does not map into its own space.
    """

    def __init__(
        self,
        function: MPE,
        group: str,
        schedule: WeightSchedule,
        loss: Loss = "equi",
        reduction: Reduction = "norm",
        attachment: Attachment = "in_norm",
    ) -> None:
        super().__init__()
        self.function = function
        self.group = get_group(group)
        self.schedule = schedule
        self.loss: Loss = loss
        self.reduction: Reduction = reduction
        self.attachment: Attachment = attachment
        if loss == "equicon" and not function.maps_to_itself:
            raise ValueError(
                f"loss='equicon' needs a function that maps into its own space, such as RoundTrip; "
                f"{type(function).__name__} does not"
            )
        self.noise: Noise | None = None
        self.autocast_dtype: torch.dtype | None = None  # set to bfloat16 by EquiReg under bf16-mixed
        self.image_by_image = False  # that of the sampler's prior, once attached

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError when inputs of this (C, H, W) cannot be penalised."""
        self.group.check_shape(shape)
        self.function.check_shape(shape)

    def start(self, noise: Noise) -> None:
        """Begins a batch: group elements are drawn from ``noise`` from here on."""
        self.noise = noise

    def forward(self, x0_hat: Tensor, step: Step, step_size: float = 1.0, decoded: Tensor | None = None) -> Tensor:
        """lambda_t R(x0_hat) per image (B,).

        Args:
            x0_hat: what the paper penalises at this sampler, (B, C, H, W).
            step: where the sampler is.
            step_size: what the sampler multiplies the gradient by; ``separate_step`` divides it out.
            decoded: the image of the latent x0_hat, where the sampler has it: an f that decodes is then evaluated
                once less, with the same result.
        """
        weight = self.schedule(step)
        if weight == 0:
            return x0_hat.new_zeros(len(x0_hat))
        if self.attachment == "separate_step":
            weight /= step_size
        g = self.group.draw(self.noise, len(x0_hat), x0_hat.device)
        known = None if decoded is None else self.function.known(decoded)
        return weight * reduce(self.defect(x0_hat, g, known), self.reduction)

    def defect(self, x: Tensor, g: Tensor, f_x: Tensor | None = None) -> Tensor:
        """d of the chosen loss for group elements g (B,); ``f_x`` is f(x) where it is known."""
        if self.loss == "equi":
            return equi(self._evaluate, self.group, x, g, f_x)
        return equicon(self._evaluate, self.group, x, g)

    def _evaluate(self, x: Tensor) -> Tensor:
        """f(x); like the prior, f alone runs in half precision under bf16-mixed, and image by image where that does."""
        if self.image_by_image and len(x) > 1:
            return torch.cat([self._evaluate(image) for image in x.split(1)])
        if self.autocast_dtype is None:
            return self.function(x)
        with torch.autocast(x.device.type, self.autocast_dtype):
            return self.function(x).to(x.dtype)

    @torch.no_grad()
    def error(self, x: Tensor) -> Tensor:
        """Relative equivariance error (B,), averaged over the group's pool: a measurement that draws nothing."""
        errors = [
            equivariance_error(self.function, self.group, x, torch.full((len(x),), number, device=x.device))
            for number in self.group.pool
        ]
        return torch.stack(errors).mean(0)


def equi(f: Callable[[Tensor], Tensor], group: Group, x: Tensor, g: Tensor, f_x: Tensor | None = None) -> Tensor:
    """S_g f(x) - f(T_g x), f evaluated once on both, or on T_g x alone where f(x) is given."""
    if f_x is None:
        f_x, f_gx = f(torch.cat([x, group.transform(x, g)])).chunk(2)
    else:
        f_gx = f(group.transform(x, g))
    return group.transform_features(f_x, g) - f_gx


def equicon(f: Callable[[Tensor], Tensor], group: Group, x: Tensor, g: Tensor) -> Tensor:
    """x - T_g^-1 f(T_g x): equivariance and consistency of a round trip in one."""
    return x - group.transform(f(group.transform(x, g)), group.inverse(g))


def reduce(d: Tensor, reduction: Reduction) -> Tensor:
    """One number per image (B,) of d (B, ...)."""
    flat = d.flatten(1)
    if reduction == "norm":
        return flat.norm(dim=1)
    if reduction == "rms":
        return flat.norm(dim=1) / math.sqrt(flat.shape[1])
    if reduction == "sqnorm":
        return flat.square().sum(1)
    return flat.square().mean(1)


@torch.no_grad()
def equivariance_error(f: Callable[[Tensor], Tensor], group: Group, x: Tensor, g: Tensor) -> Tensor:
    """||S_g f(x) - f(T_g x)|| / ||f(x)|| per image (B,): comparable between images, functions and noise levels."""
    f_x, f_gx = f(torch.cat([x, group.transform(x, g)])).chunk(2)
    defect = group.transform_features(f_x, g) - f_gx
    return defect.flatten(1).norm(dim=1) / f_x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
