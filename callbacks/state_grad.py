"""DiffStateGrad as a callback: the measurement's gradient, projected from outside."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from equireg.state_projection import RankRule, StateProjection


class StateGrad(Callback):
    """Projects the data gradient onto the state's leading singular vectors (Zirvi et al., DiffStateGrad, ICLR 2025).

    With EquiReg attached the penalty is part of what is differentiated, and the projection acts on the gradient of
    both; the order of the two callbacks does not matter.

    Args:
        variance: tau, the share of the state's energy that the kept singular vectors hold.
        period: projects in every period-th iteration; 0 never projects.
        rank_rule: ``official``, the published code's rank, or ``per_channel_mean``, the one that its text describes.
        project: what is projected where a sampler's gradient holds more than the data misfit and the penalty (PSLD's
            gluing): the ``measurement`` alone or ``all``.

    Raises:
        ValueError: if ``variance`` or ``period`` is out of range, or the sampler has no gradient to project.
    """

    def __init__(
        self,
        variance: float = 0.99,
        period: int = 1,
        rank_rule: RankRule = "official",
        project: Literal["measurement", "all"] = "measurement",
    ) -> None:
        self.projection = StateProjection(variance, period, rank_rule, everything=project == "all")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not getattr(pl_module, "takes_state_grad", False):
            raise ValueError(f"StateGrad projects a sampler's data gradient; {type(pl_module).__name__} offers none")
        if pl_module.gradient_transforms:
            raise ValueError("a sampler takes one StateGrad; the callbacks list holds two")
        pl_module.gradient_transforms.append(self.projection)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    def _detach(self, pl_module: LightningModule) -> None:
        if self.projection in getattr(pl_module, "gradient_transforms", ()):
            pl_module.gradient_transforms.remove(self.projection)
