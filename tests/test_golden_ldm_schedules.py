"""The tables of latent diffusion's DDIM sampler are those of the official code."""

from pathlib import Path

import numpy as np

from equireg.priors import ddim_steps, make_betas
from tests.golden import parametrize_golden

BETAS = {"ldm": (0.0015, 0.0195), "sd": (0.00085, 0.012)}


@parametrize_golden("ldm_schedules*.npz")
def test_golden_ldm_schedules(golden: Path) -> None:
    data = dict(np.load(golden))
    for model, betas in BETAS.items():
        alpha_bar = np.cumprod(1 - make_betas("scaled_linear", 1000, *betas))
        np.testing.assert_allclose(alpha_bar, data[f"{model}_alphas_cumprod"], rtol=1e-6)  # stored in float32
        counts = [int(name.split("_")[1]) for name in data if name.startswith(model) and name.endswith("_timesteps")]
        assert counts
        for count in counts:
            steps = ddim_steps(alpha_bar, count, eta=1.0)[::-1]
            assert [step.t for step in steps] == data[f"{model}_{count}_timesteps"].tolist()
            for ours, recorded in (("alpha_bar", "alpha"), ("alpha_bar_prev", "alpha_prev"), ("sigma", "sigma_eta1")):
                values = [getattr(step, ours) for step in steps]
                # a difference of two numbers rounded to float32 in the record
                tolerance = 1e-5 if recorded == "sigma_eta1" else 1e-6
                np.testing.assert_allclose(
                    values, data[f"{model}_{count}_{recorded}"], atol=tolerance, err_msg=f"{model}_{count}_{recorded}"
                )
