"""Weight files: safetensors that describe themselves, so a path is all a config needs."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

RANDOM = "random"
"""The name that asks for untrained weights; nothing else yields them."""


def save_weights(path: str | Path, state: dict[str, Tensor], description: dict[str, Any], half: bool = True) -> None:
    """Writes ``state`` with its architecture as one safetensors file, atomically.

    Args:
        path: the file, ending in .safetensors.
        state: tensors by name.
        description: what ``load_weights`` returns beside them; JSON values, with a ``kind``.
        half: store floating point tensors as float16 (relative error 1e-3 of a network's output, half the size);
            complex ones by their real and imaginary parts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    complex_names = sorted(name for name, value in state.items() if value.is_complex())
    real = {name: torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for name, v in state.items()}
    tensors = {
        name: (value.half() if half and value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in real.items()
    }
    partial = path.with_name(f".{path.name}.tmp")
    metadata = {"equireg": json.dumps(description, sort_keys=True)}
    if complex_names:
        metadata["complex"] = json.dumps(complex_names)
    save_file(tensors, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors makes files that others cannot read
    os.replace(partial, path)


def load_weights(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a file of ``save_weights``: its description and its tensors, floating point ones as float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not safetensors, is truncated, has no description or holds another kind of weights.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ""):
        raise ValueError(
            f"weights={str(path)!r} must be a .safetensors file; pickles can run code and are never loaded, "
            "`cli.py checkpoint convert` reads published ones without that"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r} does not exist; train them with `fit`, convert published ones with "
            "`cli.py checkpoint convert`, or ask for 'random' by name"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except SafetensorError as error:
        raise ValueError(f"weights={str(path)!r} is truncated or not a safetensors file ({error})") from error
    if "equireg" not in metadata:
        raise ValueError(
            f"weights={str(path)!r} does not describe its architecture; it was not written by this library"
        )
    description = json.loads(metadata["equireg"])
    if description.get("kind") != kind:
        raise ValueError(f"weights={str(path)!r} holds a {description.get('kind')}, not a {kind}")
    state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    state |= {name: torch.view_as_complex(state[name]) for name in json.loads(metadata.get("complex", "[]"))}
    return description, state


def settle(asked: dict[str, Any], described: dict[str, Any], weights: str) -> dict[str, Any]:
    """The arguments of a network: those left at None take the value that the weights were made with.

    Raises:
        ValueError: if an argument contradicts the weights.
    """
    for name, value in asked.items():
        if value is not None and name in described and value != described[name]:
            raise ValueError(f"{name}={value!r} contradicts weights={weights!r}, made with {described[name]!r}")
    return {name: described.get(name) if value is None else value for name, value in asked.items()}


def read_diffusers_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a diffusers folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(folder)!r} is a folder without config.json; a diffusers folder has one")
    return json.loads(path.read_text())


def load_state(module: torch.nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Strict ``load_state_dict`` with a one-sentence error.

    Raises:
        ValueError: if names or shapes differ.
    """
    own = module.state_dict()
    wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"weights={str(path)!r} belong to another architecture: {len(wrong)} of {len(own)} tensors differ, "
            f"{sorted(wrong)[0]!r} among them"
        )
    module.load_state_dict(state)
