"""Published pickles are read without running anything of them; the conversion says what it made."""

import io
import os
import pickle
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cli
from equireg.checkpoints import read_edm_pickle
from equireg.priors import EDMPrior
from equireg.priors.edm_networks import SongUNet

KWARGS = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 0,
    "use_fp16": False,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}

SOURCE = "raise SystemExit('the source of the file was run')"


class PersistentObject:
    """Pickled as the published classes are: a call with the class's source and its state."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Kernel:
    """Stands for the noise sampler beside the network, with its matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix


class Call:
    """Pickled as a call of ``function`` with these arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that the published pickles name; running it would end the test."""

    def run(meta: dict) -> None:
        raise SystemExit(meta["module_src"])

    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    run.__module__, run.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = run
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def network_state(module: nn.Module) -> dict[str, Any]:
    """What a pickled module's state holds, for a tree of modules whose classes are other people's."""
    return {
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": {name: PersistentObject("Module", network_state(child)) for name, child in module._modules.items()},
    }


def write_checkpoint(path: Path, kwargs: dict[str, Any] = KWARGS, **others: Any) -> SongUNet:
    """A checkpoint like the published ones, and the network in it."""
    torch.manual_seed(0)
    network = SongUNet(**{k: v for k, v in KWARGS.items() if k != "model_type"})
    ema = PersistentObject("EDMPrecond", network_state(nn.ModuleDict({"model": network})))
    ema.meta["state"] |= {"_init_kwargs": kwargs, "sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}
    path.write_bytes(pickle.dumps({"ema": ema, "augment_pipe": None, "dataset_kwargs": {}} | others))
    return network


def test_every_tensor_and_argument_is_read(tmp_path: Path, official: None) -> None:
    network = write_checkpoint(tmp_path / "net.pkl", loss_fn=Kernel(torch.ones(4, 4)))
    checkpoint = read_edm_pickle(tmp_path / "net.pkl")
    expected = {f"model.{name}": value for name, value in network.state_dict().items()}
    assert checkpoint.state.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state[name], value) for name, value in expected.items())
    assert checkpoint.init_kwargs == KWARGS
    assert checkpoint.attributes["sigma_data"] == 0.5


def test_a_converted_checkpoint_is_a_prior_that_says_where_it_comes_from(
    tmp_path: Path, official: None, capsys: pytest.CaptureFixture
) -> None:
    network = write_checkpoint(tmp_path / "net.pkl")
    output = tmp_path / "prior.safetensors"
    code = cli.main(["checkpoint", "convert", str(tmp_path / "net.pkl"), str(output), "--pde", "helmholtz"])
    assert code == 0
    assert "SongUNet of helmholtz" in capsys.readouterr().out
    prior = EDMPrior(str(output))
    for name, value in network.state_dict().items():
        assert torch.equal(prior.network.state_dict()[name], value)
    # DiffusionPDE: white noise, fields divided by 2.15 and 0.028
    x = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(prior.denormalize(x)[0, :, 0, 0], torch.tensor([2.15, 0.028]))
    assert prior.description["noise"] == "white"
    assert prior.image_shape == (2, 8, 8)


def test_the_noise_samplers_matrix_stays_in_the_file(tmp_path: Path, official: None) -> None:
    """32 MB beside a network of 0.2 MB: reading must not hold them, neither as bytes nor decoded."""
    write_checkpoint(tmp_path / "net.pkl", loss_fn=Kernel(torch.ones(8 * 2**20)))
    assert (tmp_path / "net.pkl").stat().st_size > 32 * 2**20
    tracemalloc.start()
    read_edm_pickle(tmp_path / "net.pkl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_large_tensors_of_the_network_are_read_from_the_file(tmp_path: Path, official: None) -> None:
    values = torch.arange(10**5).float()
    ema = PersistentObject("Net", {"_parameters": {"w": values}, "_buffers": {}, "_modules": {}})
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": ema}))
    assert torch.equal(read_edm_pickle(tmp_path / "net.pkl").state["w"], values)


class Trap:
    """Leaves a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


def nested_trap(path: Path) -> Call:
    """A tensor whose storage bytes are themselves a pickle that runs a command."""
    content = io.BytesIO()
    torch.save(Trap(path), content, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, content.getvalue())
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})


MALICIOUS: dict[str, Callable[[Path], Any]] = {
    "a command beside the network": lambda path: {"ema": None, "x": Trap(path)},
    "a command in place of the network": lambda path: {"ema": Trap(path)},
    "a command in place of a tensor": lambda path: ema_with(Trap(path)),
    "a command in the bytes of a tensor": lambda path: ema_with(nested_trap(path)),
    "eval": lambda path: {"ema": Call(eval, f"open({str(path)!r}, 'w')")},
}


def ema_with(value: Any) -> dict[str, Any]:
    return {"ema": PersistentObject("Net", {"_parameters": {"w": value}, "_buffers": {}, "_modules": {}})}


@pytest.mark.parametrize("make", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_malicious_pickle_is_refused_and_nothing_is_run(
    make: Callable[[Path], Any], tmp_path: Path, official: None
) -> None:
    trap = tmp_path / "executed"
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(make(trap)))
    with pytest.raises(ValueError, match=r"is refused: .*; nothing of it was run"):
        read_edm_pickle(tmp_path / "net.pkl")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # GLOBAL Persistent, then BUILD with a slot state: would set attributes of our own class
        (b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(N}X\x01\x00\x00\x00aNstb.", "it sets attributes of"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "it refers to objects outside the file"),
        (b"\x80\x02\x82\x01.", "it refers to this process's extension registry"),
        (b"\x80\x02}.", "'ema'"),
        (b"\x80\x02]", "EOFError|Ran out of input"),
        (b"not a pickle", "refused"),
        (b"", "refused"),
    ],
    ids=["attributes of a class", "persistent id", "extension", "no network", "truncated", "text", "empty"],
)
def test_what_is_no_such_checkpoint_is_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_edm_pickle(tmp_path / "net.pkl")


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(tmp_path: Path, official: None) -> None:
    write_checkpoint(tmp_path / "net.pkl", loss_fn=Kernel(torch.ones(10**5)))
    content = (tmp_path / "net.pkl").read_bytes()
    for length in (100, len(content) // 2, len(content) - 10**5, len(content) - 1):
        (tmp_path / "short.pkl").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is refused"):
            read_edm_pickle(tmp_path / "short.pkl")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_type": "DhariwalUNet"}, "model_type='DhariwalUNet' is not supported; allowed: SongUNO, SongUNet"),
        ({"encoder_type": "residual"}, "encoder_type='residual' is not supported; allowed: 'standard'"),
        ({"channel_mult": [1, 3]}, "belong to another architecture"),
    ],
)
def test_another_network_is_refused(
    kwargs: dict[str, Any], message: str, tmp_path: Path, official: None, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(tmp_path / "net.pkl", KWARGS | kwargs)
    output = tmp_path / "prior.safetensors"
    code = cli.main(["checkpoint", "convert", str(tmp_path / "net.pkl"), str(output), "--pde", "helmholtz"])
    assert code == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_missing_checkpoint_or_a_wrong_name_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    missing = ["checkpoint", "convert", str(tmp_path / "no.pkl")]
    assert cli.main([*missing, str(tmp_path / "out.safetensors"), "--pde", "helmholtz"]) == 1
    assert "no.pkl' does not exist" in capsys.readouterr().err
    assert cli.main([*missing, str(tmp_path / "out.pt"), "--pde", "helmholtz"]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err
