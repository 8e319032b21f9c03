"""Everything about a posterior sampler that is not its algorithm."""

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor, nn

from equireg.metrics import data_misfit
from equireg.noise import Noise, SampleNoise, Stream, hash_seed
from equireg.operators import LinearOperator, Operator
from equireg.priors import Step
from equireg.regularizer import Regularizer
from equireg.selection import Selection

PRECISIONS = ("32-true", "bf16-mixed")

Listener = Callable[["PosteriorSampler", Step, Tensor], None]


class GradientTransform(Protocol):
    """Changes the gradient of the data misfit from outside; the callback StateGrad attaches one.

    Attributes:
        everything: whether it also takes the gradient of terms that do not measure anything.
    """

    everything: bool

    def __call__(self, gradient: Tensor, state: Tensor, iteration: int) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """The batch being restored, for listeners.

    Attributes:
        indices: data set index per image.
        draws: number of the posterior draw per image.
        y: measurements.
        operator: the operator with this batch's parameters.
    """

    indices: list[int]
    draws: list[int]
    y: Tensor
    operator: Operator


class PosteriorSampler(LightningModule, ABC):
    """Draws x given y = A(x) + noise; a subclass writes its paper's algorithm in ``sample``.

    The base class owns gradients in predict, the measurement, the regulariser, counting, timing, and what is recorded.
    Everything is per image: a batch gives what single runs give.

    Args:
        prior: the diffusion prior; frozen.
        operator: the measurement operator.
        seed: with the sample's index and draw it determines every random number of the run.
    """

    space = "pixel"
    """What the sampler hands to ``penalty_at``: "pixel" images or "latent" codes."""

    linear_only = False
    """Whether the algorithm needs a LinearOperator."""

    needs_svd = False
    """Whether it works in the singular basis of the operator, which not every linear operator offers."""

    needs_noise = False
    """Whether it divides by sigma_y, so that noiseless measurements are refused."""

    uses_sigma_y = False
    """Whether the result depends on the noise level that the operator states."""

    differentiates_prior = True
    """Whether a step costs a backward pass of the network (without a regulariser)."""

    takes_state_grad = False
    """Whether DiffStateGrad may project the gradient of the data misfit (callback StateGrad)."""

    def __init__(self, prior: nn.Module, operator: Operator, seed: int = 0) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        if getattr(prior, "space", self.space) != self.space:
            raise ValueError(
                f"prior: {type(self).__name__} samples in {self.space} space, {type(prior).__name__} is a prior on "
                f"{prior.space}s"
            )
        self.prior = prior.eval().requires_grad_(False)
        self.operator = operator
        self.seed = seed
        self.listeners: list[Listener] = []
        self.problem: Problem | None = None
        self.evaluations = EvaluationCounter(prior)
        self._penalty: list[Regularizer] = []  # a list, so that it does not become a submodule
        self.gradient_transforms: list[GradientTransform] = []
        self.selection = Selection(runs=1)
        """How many restorations of a measurement are made and which one is kept; the callback BestOf sets it."""
        self._run = 0

    @abstractmethod
    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        """Draws one x0 (B, C, H, W) per measurement.

        Args:
            y: measurements (B, ...).
            operator: A with the parameters of these images.
            noise: where every random number comes from.
        """

    def forward(
        self, y: Tensor, indices: Sequence[int], operator: Operator | None = None, draws: Sequence[int] | None = None
    ) -> Tensor:
        """``sample`` with the noise streams of the samples ``indices``; needs no Trainer.

        Args:
            y: measurements (B, ...).
            indices: data set index of every measurement.
            operator: the realised operator; the sampler's own when left out.
            draws: number of the posterior draw of every measurement; zeros when left out.
        """
        operator = self.operator if operator is None else operator
        self._refuse(operator)
        draws = [0] * len(indices) if draws is None else list(draws)
        self.problem = Problem(list(indices), draws, y, operator)
        self.evaluations.images = len(indices)
        if self.penalty is not None:
            self.penalty.start(SampleNoise(indices, self.seed, Stream.GROUP, draws))
        with torch.enable_grad():
            x0 = self.sample(y, operator, SampleNoise(indices, self.seed, Stream.SAMPLER, draws)).detach()
        self.problem = None
        return x0

    @property
    def penalty(self) -> Regularizer | None:
        """The attached regulariser."""
        return self._penalty[0] if self._penalty else None

    def attach(self, penalty: Regularizer) -> None:
        """Attaches a regulariser; the callback EquiReg calls this.

        Raises:
            ValueError: if there is one already, or it penalises what this sampler does not have.
        """
        if self._penalty:
            raise ValueError("a sampler takes one EquiReg; the callbacks list holds two")
        if penalty.function.space != self.space:
            raise ValueError(
                f"{type(penalty.function).__name__} takes {penalty.function.space} inputs, "
                f"{type(self).__name__} samples in {self.space} space"
            )
        penalty.function.bind(self.prior)
        penalty.image_by_image = getattr(self.prior, "image_by_image", False)
        self._penalty.append(penalty)

    def detach_penalty(self) -> None:
        """Removes the regulariser."""
        self._penalty.clear()

    def penalty_at(self, x0_hat: Tensor, step: Step, step_size: float = 1.0, decoded: Tensor | None = None) -> Tensor:
        """The weighted penalty per image (B,), zero when there is none.

        Args:
            x0_hat: what the paper penalises.
            step: where the sampler is.
            step_size: what the sampler multiplies the gradient by.
            decoded: the image of the latent x0_hat, where the sampler has it, so that it is not computed again.
        """
        if not self._penalty:
            return x0_hat.new_zeros(len(x0_hat))
        return self._penalty[0](x0_hat, step, step_size, decoded)

    def penalty_step(self, x0_hat: Tensor, step: Step) -> Tensor:
        """x0_hat after one gradient step on its weighted penalty, for samplers that differentiate nothing else."""
        if not self._penalty or self._penalty[0].schedule(step) == 0:
            return x0_hat
        with torch.enable_grad():
            x0_hat = x0_hat.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.penalty_at(x0_hat, step).sum(), x0_hat)
        return (x0_hat - gradient).detach()

    def guidance(
        self, loss: Tensor, x_t: Tensor, iteration: int = 0, state: Tensor | None = None, aside: Tensor | None = None
    ) -> Tensor:
        """Gradient of every image's loss (B,) with respect to its own x_t.

        Args:
            loss: the data misfit with its penalty; the gradient transforms act on its gradient.
            x_t: what the loss is differentiated by, (B, C, H, W).
            iteration: number of the step, or of the iteration of an inner loop, for transforms with a period.
            state: the diffusion state that the transforms refer to; x_t when left out.
            aside: further terms (B,) that do not measure anything, such as PSLD's gluing; not transformed.
        """
        apart = aside is not None and not all(transform.everything for transform in self.gradient_transforms)
        if aside is not None and not apart:
            loss = loss + aside
        (gradient,) = torch.autograd.grad(loss, x_t, torch.ones_like(loss), retain_graph=apart)
        for transform in self.gradient_transforms:
            gradient = transform(gradient, x_t if state is None else state, iteration)
        if apart:
            gradient = gradient + torch.autograd.grad(aside, x_t, torch.ones_like(aside))[0]
        return gradient

    def emit(self, step: Step, x0_hat: Tensor) -> None:
        """Tells listeners (bars, inspectors) where the sampler is; called once per step."""
        if self.selection.runs > 1:  # to a listener the runs are one long chain
            num_steps = step.num_steps * self.selection.runs
            step = replace(step, k=self._run * step.num_steps + step.k, num_steps=num_steps)
        with self.evaluations.paused():
            for listener in self.listeners:
                listener(self, step, x0_hat.detach())

    @classmethod
    def supports(cls, operator: Operator) -> str | None:
        """Why the algorithm cannot restore measurements of ``operator``, in one sentence; None when it can."""
        name, kind = cls.__name__, type(operator).__name__
        if cls.linear_only and not isinstance(operator, LinearOperator):
            return f"{name} needs a linear operator, {kind} is not"
        if cls.needs_svd and not has_svd(operator):
            return f"{name} needs a closed-form singular value decomposition, {kind} has none"
        if cls.needs_noise and operator.sigma_y == 0 and operator.poisson_rate is None:
            return f"{name} divides by the noise level: sigma_y={operator.sigma_y:g} of {kind} must be positive"
        return None

    @classmethod
    def is_extension(cls, operator: Operator) -> bool:
        """Whether the authors' method does not treat ``operator``, and ours does by what its docstring says."""
        return False

    def _refuse(self, operator: Operator) -> None:
        reason = self.supports(operator)
        if reason is not None:
            raise ValueError(reason)

    def setup(self, stage: str) -> None:
        """Refuses, before any network call, what cannot run.

        Raises:
            ValueError: if operator, prior and images do not fit, or precision or processes are not supported.
        """
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.trainer.precision!r} is not supported; available: {', '.join(PRECISIONS)} "
                "(sampler arithmetic does not survive the others)"
            )
        _check_processes(self.trainer.world_size, self.trainer.num_devices * self.trainer.num_nodes)
        self._refuse(self.operator)
        self.prior.check_shape(self.trainer.datamodule.image_shape)
        if hasattr(self.prior, "autocast_dtype"):
            self.prior.autocast_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None

    def on_predict_start(self) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("set trainer.inference_mode=false: samplers differentiate through the prior")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measures (or takes the given measurement), restores, and records.

        Returns:
            ``x0`` restorations, ``y`` measurements, ``operator`` realised, and ``records``: one dictionary per image
            with seconds, network_evaluations, network_backwards, data_misfit, the hash of the measurement, for latent
            priors the passes of decoder and encoder and, with a regulariser, the equivariance error of the plain
            baseline picture (before) and of the restoration.
        """
        with self._float32():
            indices, draws = batch["index"].tolist(), batch["draw"].tolist()
            operator, y = self.measurement(batch, indices)
            self.evaluations.reset()
            seconds = -_now(self.device)
            x0 = self.best_restoration(y, indices, operator, draws, batch.get("x"))
            seconds += _now(self.device)
            return {"x0": x0, "y": y, "operator": operator, "records": self._records(batch, x0, y, operator, seconds)}

    def best_restoration(
        self, y: Tensor, indices: list[int], operator: Operator, draws: list[int], truth: Tensor | None = None
    ) -> Tensor:
        """``selection.runs`` independent restorations, the best of each image kept (B, C, H, W)."""
        runs, restored = self.selection.runs, []
        for self._run in range(runs):
            restored.append(self(y, indices, operator, [draw * runs + self._run for draw in draws]))
        if runs == 1:
            return restored[0]
        with torch.no_grad():
            cost = torch.stack([self.selection.cost(x0, y, operator, truth) for x0 in restored])
        return torch.stack(restored)[cost.argmin(0), torch.arange(len(y), device=y.device)]

    def measurement(self, batch: dict[str, Any], indices: list[int]) -> tuple[Operator, Tensor]:
        """The operator with this batch's parameters, and y: simulated from ``x``, or given."""
        if "y" in batch:
            operator = self.operator.with_parameters(batch.get("parameters", {}), self.trainer.datamodule.image_shape)
            return operator, batch["y"]
        shape = tuple(batch["x"].shape[1:])
        seeds = [hash_seed(self.seed, Stream.OPERATOR, index) % 2**32 for index in indices]
        operator = self.operator.realize(shape, seeds).to(self.device)
        return operator, operator.measure(batch["x"], SampleNoise(indices, self.seed, Stream.MEASUREMENT))

    @torch.no_grad()
    def _records(
        self, batch: dict[str, Any], x0: Tensor, y: Tensor, operator: Operator, seconds: float
    ) -> list[dict[str, Any]]:
        columns: dict[str, list[Any]] = {
            "seconds": [seconds / len(x0)] * len(x0),
            "network_evaluations": [self.evaluations.forward] * len(x0),
            "network_backwards": [self.evaluations.backward] * len(x0),
            **{name: [count] * len(x0) for name, count in self.evaluations.autoencoder.items()},
            "data_misfit": data_misfit(y, operator(x0), operator.noise_std(y)).tolist(),
            "measurement": [
                self._fingerprint(index, source, operator, row)
                for row, (index, source) in enumerate(zip(batch["index"].tolist(), batch.get("x", y), strict=True))
            ],
        }
        if self.selection.runs > 1:
            columns[f"best_of_{self.selection.criterion}"] = [self.selection.runs] * len(x0)
        if self.penalty is not None:
            columns["equivariance_error"] = self._equivariance_error(x0)
            try:
                before = operator.baseline(y, tuple(x0.shape[1:]))
            except NotImplementedError:  # the operator has no plain picture to measure
                columns["equivariance_error_before"] = [None] * len(x0)
            else:
                columns["equivariance_error_before"] = self._equivariance_error(before)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _equivariance_error(self, x: Tensor) -> list[float]:
        """Of images x, encoded where the regulariser takes latents."""
        return self.penalty.error(x if self.space == "pixel" else self.prior.encode(x)).tolist()

    def _fingerprint(self, index: int, source: Tensor, operator: Operator, row: int) -> str:
        """Hash of what was measured: hashing y itself would differ between devices in the last bits."""
        digest = hashlib.sha256(source.cpu().contiguous().numpy().tobytes())
        digest.update(operator.fingerprint(row).encode())
        digest.update(f"{self.seed},{index}".encode())
        return digest.hexdigest()[:16]

    def _float32(self) -> AbstractContextManager:
        """Sampler arithmetic stays in float32; under bf16-mixed the prior's networks alone are autocast."""
        return torch.autocast(self.device.type, enabled=False)


class EvaluationCounter:
    """Counts forward and backward passes of a prior's network, per image of the batch.

    Attributes:
        forward, backward: of the network.
        autoencoder: of a latent prior's decoder and encoder, by name; empty for other priors.
        images: images in the batch; a decoder that sees each of them in two poses at once counts two passes.
    """

    def __init__(self, prior: nn.Module) -> None:
        self.images = 1
        self._is_paused = False
        parts = ("decode", "encode") if hasattr(prior, "decoder") else ()
        self.autoencoder = {f"{part}{what}": 0 for part in parts for what in ("s", "_backwards")}
        self.reset()
        if hasattr(prior, "network"):
            prior.network.register_forward_hook(self._count)
        for part in parts:
            getattr(prior, f"{part}r").register_forward_hook(partial(self._count_part, part))

    def reset(self) -> None:
        self.forward = 0
        self.backward = 0
        self.autoencoder = dict.fromkeys(self.autoencoder, 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What listeners evaluate is no cost of the sampler."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._is_paused:
            return
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1

    def _count_part(self, part: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._is_paused:
            return
        self._add(f"{part}s", output)
        if output.requires_grad:
            output.register_hook(partial(self._add, f"{part}_backwards"))

    def _add(self, name: str, rows: Tensor) -> None:
        self.autoencoder[name] += len(rows) // self.images


def has_svd(operator: Operator) -> bool:
    """Whether the operator's class offers a singular value decomposition."""
    return isinstance(operator, LinearOperator) and type(operator).svd is not LinearOperator.svd


def norm(residual: Tensor) -> Tensor:
    """||r|| per image (B,), unsquared, over all other axes."""
    return residual.flatten(1).norm(dim=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_processes(world_size: int, wanted: int) -> None:
    """Refuses a process count that would skip part of the data, or do all of it several times, without a word."""
    if world_size != wanted:
        raise ValueError(
            f"{world_size} processes run, devices x num_nodes asks for {wanted}: part of the data would be skipped"
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is None and SLURMEnvironment.detect():
        started = int(os.environ["SLURM_NTASKS"])
    if started is not None and started != world_size:
        raise ValueError(
            f"{started} processes were started, devices x num_nodes asks for {world_size}: they must be equal"
        )
