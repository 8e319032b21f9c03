"""Published pickles are read without running anything of them; the conversion says what it made."""

import io
import json
import os
import pickle
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

import cli
from equireg.autoencoder import Autoencoder
from equireg.checkpoints import read_edm_pickle
from equireg.checkpoints.convert_diffusion import build
from equireg.checkpoints.convert_unet import convert_unet
from equireg.commands.checkpoint import checkpoint_command
from equireg.priors import EDMPrior, LatentPrior, VPPrior
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


def random_layer(name: str, *shape: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 0.1 * torch.randn(shape), f"{name}.bias": 0.1 * torch.randn(shape[:1])}


def official_unet(width: int = 32) -> dict[str, Tensor]:
    """A network of guided diffusion with one level of one block, by its official names."""

    def residual(name: str, width_in: int) -> dict[str, Tensor]:
        skip = random_layer(f"{name}.skip_connection", width, width_in, 1, 1) if width_in != width else {}
        return (
            random_layer(f"{name}.in_layers.0", width_in)
            | random_layer(f"{name}.in_layers.2", width, width_in, 3, 3)
            | random_layer(f"{name}.emb_layers.1", 2 * width, 4 * width)
            | random_layer(f"{name}.out_layers.0", width)
            | random_layer(f"{name}.out_layers.3", width, width, 3, 3)
            | skip
        )

    return (
        random_layer("time_embed.0", 4 * width, width)
        | random_layer("time_embed.2", 4 * width, 4 * width)
        | random_layer("input_blocks.0.0", width, 1, 3, 3)
        | residual("input_blocks.1.0", width)
        | residual("middle_block.0", width)
        | random_layer("middle_block.1.norm", width)
        | random_layer("middle_block.1.qkv", 3 * width, width, 1)
        | random_layer("middle_block.1.proj_out", width, width, 1)
        | residual("middle_block.2", width)
        | residual("output_blocks.0.0", 2 * width)
        | residual("output_blocks.1.0", 2 * width)
        | random_layer("out.0", width)
        | random_layer("out.2", 2, width, 3, 3)
    )


def official_vq(width: int = 32) -> dict[str, Tensor]:
    """A first stage of latent diffusion with one level, latents of one channel and eight codes."""

    def residual(name: str) -> dict[str, Tensor]:
        norms = random_layer(f"{name}.norm1", width) | random_layer(f"{name}.norm2", width)
        convolutions = (random_layer(f"{name}.conv{i}", width, width, 3, 3) for i in (1, 2))
        return norms | next(convolutions) | next(convolutions)

    def half(name: str, blocks: list[str], channels_in: int, channels_out: int) -> dict[str, Tensor]:
        state = random_layer(f"{name}.conv_in", width, channels_in, 3, 3)
        for block in (*blocks, "mid.block_1", "mid.block_2"):
            state |= residual(f"{name}.{block}")
        for part in ("q", "k", "v", "proj_out"):
            state |= random_layer(f"{name}.mid.attn_1.{part}", width, width, 1, 1)
        state |= random_layer(f"{name}.mid.attn_1.norm", width) | random_layer(f"{name}.norm_out", width)
        return state | random_layer(f"{name}.conv_out", channels_out, width, 3, 3)

    return (
        half("encoder", ["down.0.block.0"], 1, 1)
        | half("decoder", ["up.0.block.0", "up.0.block.1"], 1, 1)
        | random_layer("quant_conv", 1, 1, 1, 1)
        | random_layer("post_quant_conv", 1, 1, 1, 1)
        | {"quantize.embedding.weight": torch.randn(8, 1)}
    )


def convert(tmp_path: Path, content: object, *options: str, name: str = "network.pt") -> Path:
    """What the command makes of a file with this content."""
    torch.save(content, tmp_path / name)
    assert checkpoint_command(["convert", str(tmp_path / name), str(tmp_path / "converted"), *options]) == 0
    return tmp_path / "converted"


def test_a_published_unet_becomes_a_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(tmp_path, official_unet(), "--image-size", "8", "--head-channels", "16")
    assert "UNet2DModel" in capsys.readouterr().out
    prior = VPPrior(str(folder), variance="learned_range")
    assert prior.image_shape == (1, 8, 8)
    assert prior.network(torch.zeros(2, 1, 8, 8), torch.tensor([3, 700])).isfinite().all()
    assert json.loads((folder / "provenance.json").read_text())["source"] == "network.pt"


def test_a_published_latent_diffusion_becomes_a_latent_prior(tmp_path: Path) -> None:
    """Averaged weights are written where all of them are there; a training loss beside the autoencoder is dropped."""
    unet, vq = official_unet(), official_vq() | {"loss.discriminator.weight": torch.ones(1)}
    unet |= random_layer("out.2", 1, 32, 3, 3)
    state = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    state |= {f"model_ema.diffusion_model{k.replace('.', '')}": 2 * v for k, v in unet.items()}
    state |= {f"first_stage_model.{k}": v for k, v in vq.items()} | {"betas": torch.zeros(1000)}
    folder = convert(tmp_path, {"state_dict": state}, "--image-size", "8", "--head-channels", "16", name="model.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["unet", "unet_ema", "vqvae"]
    raw, averaged = (VPPrior(str(folder / name)) for name in ("unet", "unet_ema"))
    for name, value in raw.network.unet.state_dict().items():
        torch.testing.assert_close(averaged.network.unet.state_dict()[name], 2 * value)
    latent = LatentPrior(averaged, Autoencoder(str(folder / "vqvae")))
    assert latent.image_shape == (1, 8, 8)
    assert latent.decode(latent.encode(torch.zeros(1, 1, 8, 8))).isfinite().all()
    alone = tmp_path / "alone"
    assert checkpoint_command(["convert", str(tmp_path / "model.ckpt"), str(alone), "--first-stage"]) == 0
    assert Autoencoder(str(alone)).family == "vq"


@torch.no_grad()
def test_the_order_of_the_attention_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    """The rows of q, k and v put head by head by hand give the network that the other order gives."""
    new = official_unet()
    legacy = dict(new)
    for part in ("weight", "bias"):
        rows = new[f"middle_block.1.qkv.{part}"]
        q, k, v = (heads.chunk(2) for heads in rows.chunk(3))
        legacy[f"middle_block.1.qkv.{part}"] = torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]])
    results = []
    for order, state in (("new", new), ("legacy", legacy), ("legacy", new)):
        config, converted = convert_unet(state, 8, 16, order)
        network = build(UNet2DModel, config, converted)
        results.append(network(torch.ones(1, 1, 8, 8), torch.tensor([5])).sample)
    torch.testing.assert_close(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-4


def test_what_a_trainer_leaves_in_a_checkpoint_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": official_unet(), "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5)}}}
    folder = convert(tmp_path, content, "--image-size", "8", "--head-channels", "16", name="model.ckpt")
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"extra.weight": torch.ones(1)}, [], "1 tensors have no place, 'extra.weight' among them"),
        ({"out.2.weight": None}, [], "the tensor 'out.2.weight' is missing"),
        ({"middle_block.1.transformer_blocks.0.weight": torch.ones(1)}, [], r"it is conditional \(cross-attention\)"),
        ({"time_embed.0.weight": torch.ones(128, 64)}, [], "not as wide as the time embedding"),
        ({}, ["--head-channels", "24"], r"head_channels=24 must divide the widths of the attention, \[32\]"),
        ({}, ["--first-stage"], "it holds no autoencoder"),
        ({}, ["--pde", "helmholtz"], r"--pde helmholtz is for \.pkl files"),
    ],
    ids=str,
)
def test_another_network_is_refused_and_nothing_is_written(
    change: dict[str, Tensor | None], options: list[str], message: str, tmp_path: Path
) -> None:
    state = {name: value for name, value in (official_unet() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, state, "--head-channels", "16", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt"]


def test_a_file_that_asks_for_more_than_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network\.pt' is refused: it asks for \w+\.system; nothing of it was run"):
        convert(tmp_path, {"state_dict": Call(os.system, f"touch {tmp_path}/run")})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no checkpoint", "damaged or no file of torch.save"), (None, "does not exist"), ([1, 2], "no tensors by name")],
    ids=str,
)
def test_a_file_without_tensors_is_refused(content: object, message: str, tmp_path: Path) -> None:
    source = tmp_path / "network.pt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checkpoint_command(["convert", str(source), str(tmp_path / "converted")])


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    with pytest.raises(ValueError, match="exists already; nothing is overwritten"):
        convert(tmp_path, official_unet())


def test_a_pickle_needs_its_equation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--pde is missing"):
        checkpoint_command(["convert", str(tmp_path / "network.pkl"), str(tmp_path / "prior.safetensors")])
