"""Lets torchvision be imported beside a torch build that its compiled operators do not fit.

torchvision built for CUDA beside a CPU-only torch cannot load its operators; ``import torchvision``, and with it
lightning and diffusers, then fails on two schemas that do not exist. Nothing here or there calls these operators.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library takes its schemas with it when it is collected


def declare_missing_torchvision_operators() -> bool:
    """Declares the schemas when, and only when, torchvision is installed and its operators cannot load.

    Returns:
        Whether the schemas were declared by this call.
    """
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return False
    if _operators_load(Path(spec.submodule_search_locations[0])):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def _operators_load(package: Path) -> bool:
    for extension in sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
