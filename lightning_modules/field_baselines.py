"""What a sampler of fields has to beat: the best linear estimate, and an operator or a solver applied to it."""

from typing import Literal, get_args

import torch
from torch import Tensor

from equireg.fno import FNO
from equireg.noise import Noise
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.pde.linear_mmse import EmpiricalFields, GaussianFields, HelmholtzFields
from lightning_modules.base import PosteriorSampler
from lightning_modules.baselines import NoPrior

Completion = Literal["linear", "fno", "solver"]
Statistics = Literal["exact", "empirical"]


class FieldLinearMMSE(PosteriorSampler):
    """The best linear estimate of x = (a, u) from sensors: the posterior mean under a Gaussian of the same covariance.

    For the Helmholtz equation the covariance is known exactly and the fields are Gaussian, so this is the posterior
    mean itself; otherwise it is that of the data module's ``train`` split. With ``fno`` or ``solver`` the unobserved
    field is not the linear estimate, but what an operator makes of the linear estimate of the observed one.

    Args:
        operator: the sensors.
        completion: ``linear``; ``fno``: the FNO on the estimate; ``solver``: the equation's solver on the estimate of
            a, which gives u.
        fno: from the observed field to the other, with completion ``fno``.
        statistics: ``exact`` or ``empirical``; exact where it is known when left out.
        ridge: variance added at the sensors, in units of their own; 1e-10 for exact and 1e-6 for empirical statistics
            when left out.
        seed: see ``PosteriorSampler``.

    Raises:
        ValueError: if the arguments do not fit each other; in ``setup`` if they do not fit the data.
    """

    space = "field"
    uses_sigma_y = True

    def __init__(
        self,
        operator: Sensors,
        completion: Completion = "linear",
        fno: FNO | None = None,
        statistics: Statistics | None = None,
        ridge: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(AnyFields(), operator, seed)
        if completion not in get_args(Completion):
            raise ValueError(f"completion={completion!r} must be one of {', '.join(get_args(Completion))}")
        if (completion == "fno") != (fno is not None):
            raise ValueError(f"completion={completion!r}: completion='fno' and only that needs an fno")
        if fno is not None and fno.target != operator.recovered:
            raise ValueError(f"fno: direction={fno.direction!r} does not fit task={operator.task!r}, which asks for it")
        if completion == "solver" and operator.task == "inverse":
            raise ValueError("completion='solver' solves for u; the inverse task asks for a")
        if statistics not in (None, *get_args(Statistics)):
            raise ValueError(f"statistics={statistics!r} must be one of {', '.join(get_args(Statistics))}")
        if ridge is not None and not ridge >= 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        self.completion: Completion = completion
        self.fno = None if fno is None else fno.eval().requires_grad_(False)
        self.statistics: Statistics | None = statistics
        self.ridge = ridge
        self.fields: GaussianFields | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        pde = getattr(data, "pde", None)
        if pde is None:
            raise ValueError(f"{type(self).__name__} estimates fields of an equation, {type(data).__name__} has none")
        if self.fno is not None:
            self.fno.check_shape(data.image_shape)
            self.fno.check_equation(pde)
        self.prior.adopt(data)
        self.law = law = data.law
        is_exact = isinstance(law, HelmholtzLaw) if self.statistics is None else self.statistics == "exact"
        if not is_exact:
            train = data.dataset("train")
            self.fields = EmpiricalFields(torch.stack([train[i]["x"] for i in range(len(train))]))
        elif isinstance(law, HelmholtzLaw):
            field = law.field
            self.fields = HelmholtzFields(law.size, law.solver.wavenumber, field.alpha, field.tau)
        else:
            raise ValueError(f"statistics='exact': the covariance is known for helmholtz only, not for {pde}")
        if self.ridge is None:
            self.ridge = 1e-10 if is_exact else 1e-6

    @torch.no_grad()
    def sample(self, y: Tensor, operator: Sensors, noise: Noise) -> Tensor:
        x = self.fields.estimate(y, operator.positions, operator.sigma_y, self.ridge).to(y)
        if self.completion == "fno":
            x[:, self.fno.target] = self.fno.map(x[:, self.fno.source, None])[:, 0]
        elif self.completion == "solver":
            x[:, 1] = self.law.solve(x[:, 0])
        return x

    def _equivariance_error(self, x: Tensor) -> list[float]:
        return self.penalty.error(self.prior.normalize(x)).tolist()


class AnyFields(NoPrior):
    """Stands where a baseline on fields has no prior; knows the units in which a regulariser measures."""

    space = "field"

    def adopt(self, data: object) -> None:
        """Takes the units of a data module."""
        self.normalizer = data.normalizer

    def normalize(self, x: Tensor) -> Tensor:
        """Fields from physical units to those of networks."""
        return self.normalizer.normalize(x)
