"""Several restorations of every measurement, of which the best is kept."""

from lightning.pytorch import Callback, LightningModule, Trainer

from equireg.selection import Criterion, Selection


class BestOf(Callback):
    """Restores every measurement several times and keeps the best restoration of each image.

    A(x) of phase retrieval does not tell an image from itself turned by 180 degrees or shifted, and chains end in
    different ones; published tables take the best of four. What is selected by stands in the column ``best_of_misfit``
    or ``best_of_oracle_psnr`` of the run's metrics, with the number of runs; seconds and evaluations are of all runs.

    Args:
        runs: independent restorations per measurement.
        criterion: ``misfit``: the smallest ||y - A x_hat||; ``oracle_psnr``: the highest PSNR, which takes the truth.

    Raises:
        ValueError: if ``runs`` is below one, the module is no sampler, or the oracle has no truth to look at.
    """

    def __init__(self, runs: int = 4, criterion: Criterion = "misfit") -> None:
        self.selection = Selection(runs, criterion)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "selection"):
            raise ValueError(f"BestOf selects restorations; {type(pl_module).__name__} makes none")
        if self.selection.criterion == "oracle_psnr" and "x" not in trainer.datamodule.samples()[0]:
            raise ValueError("criterion='oracle_psnr' needs the true images; given measurements have none")
        pl_module.selection = self.selection

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(pl_module, "selection"):
            pl_module.selection = Selection(runs=1)
