"""The regulariser as a callback: EquiReg plugs into any sampler."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from equireg.mpe import MPE
from equireg.regularizer import Attachment, Loss, NoiseScale, Reduction, Regularizer, WeightSchedule


class EquiReg(Callback):
    """Penalises the equivariance error of an MPE function at every step of a sampler (EquiReg, Alg. 1).

    Args:
        function: the MPE function f; loaded on its own (``Encoder``) or the sampler's own network (``PriorDecoder``).
        group: name of the transformation group.
        weight: lambda; 0 measures the equivariance error of the result and changes nothing.
        loss: ``equi`` S_g f(x) - f(T_g x), or ``equicon`` x - T_g^-1 f(T_g x).
        reduction: ``norm``, ``sqnorm``, ``mse`` or ``rms`` of the difference, per image.
        scale: factor of lambda from the noise level, see ``WeightSchedule``.
        every: penalise every k-th step.
        last_tenth_off: no penalty in the last tenth of the steps.
        legacy_cutoff: the authors' library's early stop instead.
        attachment: ``in_norm``: one step size for misfit and penalty; ``separate_step``: lambda is a step size itself.

    Raises:
        ValueError: if the weight is negative, the group is unknown or the pieces do not fit each other or the sampler.
    """

    def __init__(
        self,
        function: MPE,
        group: str = "hflip",
        weight: float = 0.1,
        loss: Loss = "equi",
        reduction: Reduction = "norm",
        scale: NoiseScale = "sigma",
        every: int = 1,
        last_tenth_off: bool = False,
        legacy_cutoff: bool = False,
        attachment: Attachment = "in_norm",
    ) -> None:
        schedule = WeightSchedule(weight, scale, every, last_tenth_off, legacy_cutoff)
        self.regularizer = Regularizer(function.eval(), group, schedule, loss, reduction, attachment)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "attach"):
            raise ValueError(f"EquiReg regularises samplers; {type(pl_module).__name__} is none")
        pl_module.attach(self.regularizer)
        self.regularizer.autocast_dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        shape = trainer.datamodule.image_shape
        latent = self.regularizer.function.space == "latent"
        self.regularizer.check_shape(pl_module.prior.latent_shape(shape) if latent else shape)
        self.regularizer.function.check_equation(getattr(trainer.datamodule, "pde", None))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.regularizer.to(pl_module.device)  # a callback's modules are moved by nobody else

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.detach_penalty()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(pl_module, "detach_penalty"):
            pl_module.detach_penalty()
