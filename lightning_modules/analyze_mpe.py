"""Is an operator manifold-preferential equivariant? Its equivariance error on data, and away from them."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import CatMetric

from equireg.fno import FNO
from equireg.groups import get_group
from equireg.noise import SampleNoise, Stream
from equireg.pde.equations import SIGMA_DATA
from equireg.pde.random_fields import PeriodicField
from equireg.runs import atomic_write

COLUMNS = ("input", "sigma", "group", "element", "relative_error", "standard_error", "mean_square", "n")


class MPEAnalysis(LightningModule):
    """Equivariance error of an FNO for every group element, on fields of the data and on others (EquiReg, Fig. 4b).

    The inputs are the test fields; the same with white noise of growing strength; with half of their points set to 0;
    three times as large; and fields of another law, a rougher Gaussian random field of the same standard deviation.
    ``test`` writes ``mpe.csv`` (a row per input and element: mean relative error ||S f(x) - f(T x)|| / ||f(x)|| over
    the fields, its standard error, and the mean square of S f(x) - f(T x) in normalised units) and ``mpe.png`` into
    the run's folder.

    Args:
        fno: the operator.
        groups: names of the groups; all their elements are taken but the identity.
        sigmas: standard deviations of the white noise, on normalised fields (of standard deviation 0.5).
        roughness: alpha of the other law, which is 2.5 and 2 for the equations' own inputs.

    Raises:
        ValueError: if a group is unknown; in ``setup`` if data, FNO and groups do not fit each other.
    """

    def __init__(
        self,
        fno: FNO,
        groups: Sequence[str] = ("flip",),
        sigmas: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5),
        roughness: float = 1.5,
    ) -> None:
        super().__init__()
        self.fno = fno.eval().requires_grad_(False)
        self.groups = [get_group(name) for name in groups]
        self.elements = [(group, number) for group in self.groups for number in range(1, len(group.elements))]
        self.sigmas = tuple(sigmas)
        self.rough_field = PeriodicField(alpha=roughness)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if getattr(data, "pde", None) != self.fno.pde:
            raise ValueError(
                f"the FNO was trained on {self.fno.pde}, the data are of {getattr(data, 'pde', 'no fields')}"
            )
        self.fno.check_shape(data.image_shape)
        for group in self.groups:
            group.check_shape(data.image_shape)
        self.values = CatMetric()

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """Relative error and mean square of every input and element, (B, inputs, elements, 2)."""
        x = self.fno.normalizer.normalize(batch["x"])[:, self.fno.source, None]
        noise = SampleNoise(batch["index"].tolist(), 0, Stream.GROUP)
        self.values.update(torch.stack([self._errors(make(x, noise)) for _, _, make in self._inputs()], dim=1))

    def on_test_epoch_end(self) -> None:
        values = self.values.compute().double().cpu()
        rows = self._rows(values.view(-1, len(self._inputs()), len(self.elements), 2))
        for row in rows:
            if row["input"] in ("clean", "noise 0.1"):
                self.log(f"{row['group']}/{row['element']}/{row['input'].replace(' ', '_')}", row["relative_error"])
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(folder / "mpe.csv", buffer.getvalue())
        plot(rows, folder / "mpe.png", title=self.fno.pde)
        print(f"{folder / 'mpe.csv'}: {len(rows)} rows over {len(values)} fields")

    def _inputs(self) -> list[tuple[str, float, Callable[[Tensor, SampleNoise], Tensor]]]:
        """Name, noise level and maker of every input; the makers draw, so their order matters."""

        def with_noise(sigma: float) -> Callable[[Tensor, SampleNoise], Tensor]:
            return lambda x, noise: x + sigma * noise.randn(tuple(x.shape[1:]), like=x)

        def half_zeroed(x: Tensor, noise: SampleNoise) -> Tensor:
            return torch.where(noise.randn(tuple(x.shape[1:]), like=x) > 0, x, 0)

        def rough(x: Tensor, noise: SampleNoise) -> Tensor:
            fields = self.rough_field.draw(noise, tuple(x.shape[2:]), like=x)[:, None]
            return fields * SIGMA_DATA / fields.std(dim=(2, 3), keepdim=True)

        return [
            ("clean", 0.0, lambda x, noise: x),
            *((f"noise {sigma:g}", sigma, with_noise(sigma)) for sigma in self.sigmas),
            ("half of the points zeroed", math.nan, half_zeroed),
            ("three times as large", math.nan, lambda x, noise: 3 * x),
            ("another law: rougher fields", math.nan, rough),
        ]

    @torch.no_grad()
    def _errors(self, x: Tensor) -> Tensor:
        """(B, elements, 2)."""
        f_x = self.fno(x)
        size = f_x.flatten(1).norm(dim=1).clamp_min(torch.finfo(f_x.dtype).tiny)
        columns = []
        for group, number in self.elements:
            g = torch.full((len(x),), number, device=x.device)
            d = (group.transform_features(f_x, g) - self.fno(group.transform(x, g))).flatten(1)
            columns.append(torch.stack([d.norm(dim=1) / size, d.square().mean(1)], dim=1))
        return torch.stack(columns, dim=1)

    def _rows(self, values: Tensor) -> list[dict[str, str | float | int]]:
        count = len(values)
        means, errors = values.mean(0), values.std(0) / math.sqrt(count)
        return [
            {
                "input": name,
                "sigma": "" if math.isnan(sigma) else sigma,
                "group": group.name,
                "element": group.elements[number].name,
                "relative_error": means[i, j, 0].item(),
                "standard_error": errors[i, j, 0].item(),
                "mean_square": means[i, j, 1].item(),
                "n": count,
            }
            for i, (name, sigma, _) in enumerate(self._inputs())
            for j, (group, number) in enumerate(self.elements)
        ]


def plot(rows: Sequence[dict[str, str | float | int]], path: Path, title: str) -> None:
    """Relative error over the noise level, and on the other inputs beside it, one line per element.

    Without matplotlib (extra ``demo``) there is a warning in place of the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_warn("matplotlib is not installed (pip install equireg[demo]): there is no plot")
        return
    others = list(dict.fromkeys(row["input"] for row in rows if row["sigma"] == ""))
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for group, element in dict.fromkeys((row["group"], row["element"]) for row in rows):
        own = [row for row in rows if (row["group"], row["element"]) == (group, element)]
        noisy = [row for row in own if row["sigma"] != ""]
        style = {"marker": "o", "markersize": 4, "capsize": 2, "label": f"{group}: {element}"}
        line, *_ = left.errorbar(
            [row["sigma"] for row in noisy],
            [row["relative_error"] for row in noisy],
            [row["standard_error"] for row in noisy],
            **style,
        )
        apart = {row["input"]: row for row in own if row["sigma"] == ""}
        right.plot([apart[name]["relative_error"] for name in others], "o", markersize=5, color=line.get_color())
    left.set_xscale("symlog", linthresh=0.02)
    left.set_xlabel("standard deviation of the noise on normalised test fields")
    left.set_ylabel("relative equivariance error")
    left.set_title(title.replace("_", "-"))
    right.set_xticks(range(len(others)), [name.replace(": ", ":\n") for name in others], rotation=20)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    right.margins(x=0.2)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    atomic_write(path, buffer.getvalue())
