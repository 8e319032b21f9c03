"""Published U-Nets and VQ autoencoders, converted, reproduce recorded outputs and gradients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModelMixin, UNet2DModel, VQModel
from torch import Tensor

from equireg.autoencoder import Autoencoder
from equireg.checkpoints.convert_diffusion import build, convert_torch_file
from equireg.checkpoints.convert_unet import convert_unet
from equireg.checkpoints.convert_vq import convert_vq
from equireg.priors import LatentPrior, VPPrior
from tests.golden import GOLDEN, golden_files, parametrize_golden

TOLERANCES = {"f64": (torch.float64, 1e-10, 1e-10), "f32": (torch.float32, 5e-5, 5e-4)}
"""Of outputs and gradients, absolute; of float32 gradients larger than 10 also 5e-5 of the largest, see below."""

PREFIXES = {"ckpt_adm": "", "ckpt_ldm": "model.diffusion_model.", "ckpt_vq": "first_stage_model."}


def read(golden: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Tensor]]:
    """Arrays, description, and the state without its prefix, exact in float32."""
    data = dict(np.load(golden))
    prefix = "sd/" + next(value for name, value in PREFIXES.items() if golden.stem.startswith(name))
    state = {name.removeprefix(prefix): torch.from_numpy(data[name]) for name in data if name.startswith(prefix)}
    return data, json.loads(str(data["config_json"])), state


def unet(golden: Path) -> UNet2DModel:
    _, described, state = read(golden)
    arch = described["arch"]
    return build(
        UNet2DModel,
        *convert_unet(state, arch["image_size"], arch["num_head_channels"], described["attention_order"]),
    )


@parametrize_golden("ckpt_adm*.npz", "ckpt_ldm_unet*.npz")
def test_golden_unets_reproduce_recorded_outputs(golden: Path) -> None:
    data, _, _ = read(golden)
    for name, (dtype, of_output, of_gradient) in TOLERANCES.items():
        network = unet(golden).to(dtype).eval()
        x = torch.from_numpy(data["x"]).to(dtype).requires_grad_()
        labels = torch.from_numpy(data["y"]) if "y" in data else None
        out = network(x, torch.from_numpy(data["t"]), class_labels=labels).sample
        (gradient,) = torch.autograd.grad(out, x, torch.from_numpy(data["cot"]).to(dtype))
        np.testing.assert_allclose(out.detach(), data[f"out_{name}"], rtol=0, atol=of_output)
        recorded = data[f"grad_x_{name}"]  # one of 29 recorded in float32 is itself 3.4e-4 from that in float64
        bound = of_gradient * max(1, abs(recorded).max() / 10)
        np.testing.assert_allclose(gradient, recorded, rtol=0, atol=bound)


@parametrize_golden("ckpt_vq*.npz")
def test_golden_autoencoders_reproduce_recorded_outputs(golden: Path) -> None:
    data, described, state = read(golden)
    for name, (dtype, of_output, of_gradient) in TOLERANCES.items():
        network = build(VQModel, *convert_vq(state, described["ddconfig"]["resolution"])).to(dtype).eval()

        def check(key: str, value: Tensor, tolerance: float, name: str = name) -> None:
            np.testing.assert_allclose(value.detach(), data[f"{key}_{name}"], rtol=0, atol=tolerance, err_msg=key)

        x = torch.from_numpy(data["x"]).to(dtype).requires_grad_()
        z = network.encode(x).latents
        check("z", z, of_output)
        check("mpe", network.post_quant_conv(z), of_output)
        check("grad_enc", torch.autograd.grad(z.square().sum(), x)[0], of_gradient)
        z = torch.from_numpy(data[f"z_{name}"]).to(dtype).requires_grad_()
        image = network.decode(z).sample
        check("dec_quant", image, of_output)
        check("dec_noquant", network.decode(z, force_not_quantize=True).sample, of_output)
        cotangent = torch.from_numpy(data["cot"]).to(dtype)
        check("grad_dec", torch.autograd.grad(image, z, cotangent)[0], of_gradient)


@parametrize_golden("ckpt_ldm_unet*.npz")
def test_golden_latent_diffusion_gives_raw_and_averaged_weights(golden: Path, tmp_path: Path) -> None:
    """A Lightning checkpoint put together from the files, the averaged weights twice the raw ones."""
    first_stages = golden_files("ckpt_vq*.npz")
    if not first_stages:
        pytest.skip(f"no ckpt_vq*.npz in {GOLDEN}")
    data, described, _ = read(golden)
    first, vq, _ = read(first_stages[0])
    state = {
        name.removeprefix("sd/"): torch.from_numpy(a) for d in (data, first) for name, a in d.items() if "sd/" in name
    }
    raw = [str(name) for name in data["raw_keys"]]
    state |= {str(ema): 2 * state[name] for name, ema in zip(raw, data["ema_keys"], strict=True)}
    state |= {"model_ema.decay": torch.tensor(0.9999), "betas": torch.zeros(1000)}
    source = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "global_step": 1}, source)
    converted = convert_torch_file(
        source, tmp_path / "ldm", vq["ddconfig"]["resolution"], described["arch"]["num_head_channels"]
    )
    assert [network.folder.name for network in converted] == ["unet", "unet_ema", "vqvae"]
    recorded = torch.from_numpy(data["out_f32"])
    x, t = torch.from_numpy(data["x"]), torch.from_numpy(data["t"])
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    for folder, factor in (("unet", 1), ("unet_ema", 2)):
        prior = VPPrior(str(tmp_path / "ldm" / folder), **schedule)
        first_name, first_value = next(iter(unet(golden).state_dict().items()))
        torch.testing.assert_close(prior.network.unet.state_dict()[first_name], factor * first_value)
        if folder == "unet":
            np.testing.assert_allclose(prior.network(x, t).detach(), recorded, rtol=0, atol=5e-5)
    latent = LatentPrior(prior, Autoencoder(str(tmp_path / "ldm/vqvae")))
    assert latent.scale_factor == 1.0
    assert latent.quantize


@parametrize_golden("ckpt_manifests*.json")
def test_golden_names_and_shapes_of_the_full_size_networks_are_diffusers(golden: Path) -> None:
    counts = {"adm_ffhq256": [378], "adm_imagenet256_uncond": [630], "ldm_vq4_ffhq256": [432, 205]}
    for title, shapes in json.loads(golden.read_text()).items():
        name = title.split(" ")[0]
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        parts = [
            {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in list(PREFIXES.values())[1:]
        ]
        if name.startswith("adm"):
            found = [(UNet2DModel, *convert_unet(state, 256, 64))]
        else:
            found = [(UNet2DModel, *convert_unet(parts[0], 64, 32)), (VQModel, *convert_vq(parts[1], 256))]
        for cls, config, converted in found:
            assert shapes_of(cls, config) == {key: value.shape for key, value in converted.items()}
        assert [len(converted) for _, _, converted in found] == counts[name]


def shapes_of(cls: type[ModelMixin], config: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in cls(**config).state_dict().items()}
