"""``cli.py matrix``: which sampler restores which measurements, and what attaches to it, as the code says it."""

import argparse
import inspect
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import equireg.mpe
import equireg.operators
from equireg.operators import NonlinearDeblur, Operator, Sensors
from equireg.operators.blur_network import BlurNetwork
from equireg.operators.sensors import OBSERVED
from equireg.runs import atomic_write

YES, EXTENSION, NO = "●", "○", "–"
BEGIN, END = "<!-- matrix: made by `python cli.py matrix --write README.md` -->", "<!-- end of matrix -->"
LEGEND = (
    f"{YES} as published or in closed form, {EXTENSION} by an extension that the class's documentation describes, "
    f"{NO} refused in one sentence before the first network call. Equi and EquiCon: the penalties that "
    "`callbacks.EquiReg` attaches. Rows DiffStateGrad: with `callbacks.StateGrad`. σ_y: whether the result depends "
    "on the stated noise level. ∂ prior: whether a step differentiates the network."
)

Sampler = Any
"""A class of lightning_modules; this package imports none of them."""


def matrix_command(args: list[str], samplers: Sequence[Sampler]) -> int:
    """Prints the table of samplers and operators in Markdown, or puts it between the markers of a file."""
    parser = argparse.ArgumentParser(prog="cli.py matrix", description=matrix_command.__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this Markdown file")
    options = parser.parse_args(args)
    text = capability_matrix(samplers)
    if options.write is None:
        print(text)
        return 0
    if not options.write.is_file():
        raise FileNotFoundError(f"write={str(options.write)!r} does not exist")
    atomic_write(options.write, with_matrix(options.write.read_text(encoding="utf-8"), text))
    return 0


def with_matrix(page: str, text: str) -> str:
    """The page with ``text`` between its two markers.

    Raises:
        ValueError: if the page does not hold both markers once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold the line {BEGIN} and after it the line {END}, each once")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{text}\n\n{page[page.index(END) :]}"


def capability_matrix(samplers: Sequence[Sampler]) -> str:
    """The tables for images and for fields, in Markdown."""
    images = {type(operator).__name__: operator for operator in image_operators()}
    fields = {f"Sensors, {task}": Sensors(task) for task in OBSERVED}
    ordered = sorted(samplers, key=lambda sampler: (takes_prior(sampler), sampler.space != "pixel", sampler.__name__))
    tables = [
        table([sampler for sampler in ordered if (sampler.space == "field") == is_field], operators)
        for operators, is_field in ((images, False), (fields, True))
    ]
    return "\n\n".join([*tables, LEGEND])


def table(samplers: Sequence[Sampler], operators: dict[str, Operator]) -> str:
    """One row per sampler, and one more for those that DiffStateGrad projects."""
    header = ["sampler", "space", *operators, "Equi", "EquiCon", "σ_y", "∂ prior"]
    rows = []
    for sampler in samplers:
        cells = [sampler.space if takes_prior(sampler) else NO]
        cells += [support(sampler, operator) for operator in operators.values()]
        cells += [YES if attaches(sampler, to_itself) else NO for to_itself in (False, True)]
        cells += [YES if mark else NO for mark in (sampler.uses_sigma_y, differentiates(sampler))]
        rows.append([f"`{sampler.__name__}`", *cells])
        if sampler.takes_state_grad:
            rows.append([f"DiffStateGrad-`{sampler.__name__}`", *cells])
    lines = [header, ["---"] + [":-:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def support(sampler: Sampler, operator: Operator) -> str:
    """How ``sampler`` treats ``operator``: what its argument's type and its class method ``supports`` say."""
    wanted = typing.get_type_hints(sampler.__init__)["operator"]
    if sampler.supports(operator) is not None or not isinstance(operator, wanted):
        return NO
    return EXTENSION if sampler.is_extension(operator) else YES


def takes_prior(sampler: Sampler) -> bool:
    """Whether it walks along a prior's chain; the baselines do not."""
    return "prior" in inspect.signature(sampler.__init__).parameters


def differentiates(sampler: Sampler) -> bool:
    return takes_prior(sampler) and sampler.differentiates_prior


def attaches(sampler: Sampler, to_itself: bool) -> bool:
    """Whether an MPE function exists for the sampler's space: any for Equi, one that maps to itself for EquiCon."""
    functions = [kind for kind in vars(equireg.mpe).values() if inspect.isclass(kind)]
    return takes_prior(sampler) and any(
        issubclass(kind, equireg.mpe.MPE)
        and not inspect.isabstract(kind)
        and kind.space == sampler.space
        and (kind.maps_to_itself or not to_itself)
        for kind in functions
    )


def image_operators() -> list[Operator]:
    """Every operator on images with its default settings; the blur network with weights of no meaning."""
    kinds = [getattr(equireg.operators, name) for name in equireg.operators.__all__]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Operator)]
    kinds = [kind for kind in kinds if not inspect.isabstract(kind) and kind not in (NonlinearDeblur, Sensors)]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(BlurNetwork(width=1, front_blocks=1, back_blocks=1).state_dict(), Path(folder) / "blur.pth")
        return [*(kind() for kind in kinds), NonlinearDeblur(str(Path(folder) / "blur.pth"))]
