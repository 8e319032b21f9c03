"""Pickles of the EDM family (NVlabs/edm, FunDPS, DiffusionPDE), read without running anything of them.

Such a file is a pickle of a "persistent" class: ordinary loading executes Python source that the file brings along, and
un-pickles every tensor a second time. Here no name of the file resolves to anything but the few that
``RestrictedUnpickler`` allows and inert placeholders, and the bytes of a tensor are decoded only when it is wanted: the
gigabyte of a noise sampler that FunDPS stores beside its network is never read.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

LARGE = 1 << 16
"""Byte strings from this length on stay in the file; pickle writes them outside its frames."""


@dataclass(frozen=True)
class EDMPickle:
    """What a checkpoint holds of its network.

    Attributes:
        state: tensors by name, prefixes like ``model.`` included.
        init_kwargs: arguments of the official constructor.
        attributes: numbers of the preconditioned network, such as sigma_data and sigma_max.
    """

    state: dict[str, Tensor]
    init_kwargs: dict[str, Any]
    attributes: dict[str, bool | int | float | str]


def read_edm_pickle(path: str | Path) -> EDMPickle:
    """The averaged network (``ema``) of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no such checkpoint, or asks for anything that is not allowed; nothing of it
            has been run then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist")
    with open(path, "rb") as file:
        try:
            content = RestrictedUnpickler(file).load()
            network = content["ema"] if isinstance(content, dict) else None
            if not isinstance(network, Persistent):
                raise pickle.UnpicklingError("it holds no network under 'ema'")
            state = dict(tensors_of(network.state, file))
            kwargs, attributes = _plain(network.state.get("_init_kwargs", {})), _plain(network.state)
        except _DAMAGED as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"checkpoint={str(path)!r} is refused: {reason}; nothing of it was run") from error
    if not state:
        raise ValueError(f"checkpoint={str(path)!r} is refused: its network has no tensors; nothing of it was run")
    return EDMPickle(state, kwargs, attributes)


_DAMAGED = (
    pickle.UnpicklingError,
    *(EOFError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError, MemoryError),
)
"""What unpicklers raise on damaged files."""


class Inert:
    """Stands for an object of a class that is not loaded: takes everything, does nothing, keeps its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and state and isinstance(state[0], dict) else state

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class Persistent(Inert):
    """An object of a persistent class: its class is a name, its source is dropped."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise pickle.UnpicklingError("a persistent object without state")
        self.class_name = meta.get("class_name")
        self.state = meta["state"]


@dataclass(frozen=True)
class FileBytes:
    """Bytes that are still in the file."""

    offset: int
    length: int


@dataclass(frozen=True)
class LazyStorage:
    """A saved storage, not decoded."""

    content: bytes | FileBytes


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose storage is not decoded."""

    storage: LazyStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, file: BinaryIO) -> Tensor:
        """The tensor, on the CPU."""
        content = self.storage.content
        if isinstance(content, FileBytes):
            file.seek(content.offset)
            content = file.read(content.length)
        try:
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError("the bytes of a tensor ask for more than numbers") from error
        if not isinstance(storage, torch.storage.TypedStorage | torch.UntypedStorage):
            raise pickle.UnpicklingError(f"a tensor whose storage is a {type(storage).__name__}")
        tensor = torch._utils._rebuild_tensor_v2(storage, self.offset, self.size, self.stride, False, OrderedDict())
        return tensor.clone()  # frees a storage that is larger than what is seen of it


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> LazyTensor:
    if not isinstance(storage, LazyStorage):
        raise pickle.UnpicklingError("a tensor without storage")
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose size is not made of integers")
    return LazyTensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


# The pure Python class: the other one reads byte strings before it can be asked not to.
class RestrictedUnpickler(pickle._Unpickler):
    """Resolves the names of ``ALLOWED``, makes every other one inert, and imports nothing."""

    ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch.storage", "_load_from_bytes"): LazyStorage,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    }
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        return self.ALLOWED.get((module, name)) or type("Inert", (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it refers to this process's extension registry")

    def _load_bytes(self, length: int) -> None:
        frame = self._unframer.current_frame
        if length < LARGE or (frame is not None and frame.tell() < len(frame.getbuffer())):
            self.append(self.read(length))
            return
        start = self.file.tell()
        if self.file.seek(0, io.SEEK_END) < start + length:
            raise EOFError("the file is truncated")
        self.file.seek(start + length)
        self.append(FileBytes(start, length))

    def load_binbytes(self) -> None:
        self._load_bytes(int.from_bytes(self.read(4), "little"))

    def load_binbytes8(self) -> None:
        self._load_bytes(int.from_bytes(self.read(8), "little"))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], OrderedDict):  # whose attributes nobody needs
            raise pickle.UnpicklingError("it sets attributes of what is no object of its own")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8


def tensors_of(module: dict[str, Any], file: BinaryIO, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module's state by their names in ``state_dict``."""
    passing = module.get("_non_persistent_buffers_set") or set()
    for kind in ("_parameters", "_buffers"):
        for name, value in (module.get(kind) or {}).items():
            if value is None or (kind == "_buffers" and name in passing):
                continue
            if not isinstance(value, LazyTensor):
                raise pickle.UnpicklingError(f"{prefix}{name} is no tensor")
            yield prefix + name, value.read(file)
    for name, child in (module.get("_modules") or {}).items():
        if isinstance(child, Inert) and isinstance(child.state, dict):
            yield from tensors_of(child.state, file, f"{prefix}{name}.")


def _plain(values: Any) -> dict[str, Any]:
    """The entries that are numbers, strings and lists of them."""
    if not isinstance(values, dict):
        raise pickle.UnpicklingError("arguments that are not named")
    return {name: value for name, value in values.items() if isinstance(name, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
