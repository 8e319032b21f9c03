"""Published .pt and .ckpt files, read as tensors by name and nothing else."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

HARMLESS = re.compile(
    r"([\w.]+\.)?callbacks\.model_checkpoint\.ModelCheckpoint"
    r"|numpy\.(_core|core)\.multiarray\.scalar|numpy\.dtype|numpy\.dtypes\.\w+"
)
"""Names that the state of a trainer brings along; they stand for nothing here."""


class Ignored:
    """In place of an object beside the tensors: takes everything, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dictionary, or of the one under "state_dict" in a Lightning checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, asks for anything but tensors and what is ``HARMLESS``, or holds none; nothing of
            it has been run then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist")
    refused = f"checkpoint={str(path)!r} is refused:"
    try:
        content = _load(path, refused)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{refused} it is damaged or no file of torch.save ({reason}); nothing of it was run"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{refused} it holds no tensors by name")
    return tensors


def _load(path: Path, refused: str) -> object:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6, whose names cannot be listed: none but tensors are loaded
        return torch.load(path, map_location="cpu", weights_only=True)
    alien = sorted(name for name in names if not HARMLESS.fullmatch(name))
    if alien:
        raise ValueError(f"{refused} it asks for {', '.join(alien)}; nothing of it was run")
    with torch.serialization.safe_globals([(Ignored, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
