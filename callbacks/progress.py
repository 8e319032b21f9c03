"""Progress of a sampler: how far the run is, and how far the batch."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from equireg.priors import Step


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar over batches, advanced by every sampling step, above a bar over the steps of the batch.

    The time left is right from the first batch on. Where the output is no terminal, a line appears every tenth of the
    run instead. Only rank zero shows anything; trainings get Lightning's bar unchanged.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._steps_bar: Tqdm | None = None
        self._batches_done = 0
        self._tenths_told = 0
        self._started = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._batches_done = 0
        self._tenths_told = 0
        self._started = time.monotonic()
        if self.is_disabled or not hasattr(pl_module, "listeners"):
            return
        if _in_terminal():
            self._steps_bar = Tqdm(
                desc="Steps",
                position=2 * self.process_position + 1,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=self.BAR_FORMAT,
            )
        pl_module.listeners.append(self.on_step)

    def init_predict_tqdm(self) -> Tqdm:
        return Tqdm(
            desc=self.predict_description,
            position=2 * self.process_position,
            disable=self.is_disabled or not _in_terminal(),
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,  # the average rate: steps of one batch take equally long
            miniters=0,  # n advances by fractions
            bar_format="{l_bar}{bar}| {n:.2f}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.predict_progress_bar.set_description(self.predict_description, refresh=False)  # there is one loader

    def on_step(self, sampler: LightningModule, step: Step, x0_hat: Tensor) -> None:
        """Listener of the sampler; reads no number from the device, so it does not wait for it."""
        done = self._batches_done + (step.k + 1) / step.num_steps
        self._tell(done)
        if self._steps_bar is None:
            return
        if step.k == 0:
            self._steps_bar.reset(total=step.num_steps)
        self._steps_bar.update(step.k + 1 - self._steps_bar.n)
        self.predict_progress_bar.update(done - self.predict_progress_bar.n)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._batches_done = batch_idx + 1
        self._tell(self._batches_done)  # samplers without steps tell nothing in between

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(pl_module)
        super().on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(pl_module)
        if self._predict_progress_bar is not None:
            self._predict_progress_bar.close()

    def _close(self, pl_module: LightningModule) -> None:
        if self.on_step in getattr(pl_module, "listeners", []):
            pl_module.listeners.remove(self.on_step)
        if self._steps_bar is not None:
            self._steps_bar.close()
            self._steps_bar = None

    def _tell(self, done: float) -> None:
        """Where there is no bar, prints a line when another tenth of the run is over."""
        if self.is_disabled or _in_terminal():
            return
        total = self.total_predict_batches_current_dataloader
        tenths = int(10 * done / total + 1e-6)
        if tenths > self._tenths_told:
            self._tenths_told = tenths
            elapsed = time.monotonic() - self._started
            left = elapsed * (total - done) / done
            print(
                f"{self.predict_description}: {100 * done / total:.0f} %, {done:.2f} of {total} batches, "
                f"{Tqdm.format_interval(elapsed)} elapsed, {Tqdm.format_interval(left)} left",
                flush=True,
            )


def _in_terminal() -> bool:
    return sys.stdout.isatty()
