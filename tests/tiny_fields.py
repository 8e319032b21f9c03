"""Tiny priors on fields, and a Trainer run over tiny fields, in seconds."""

import torch

from equireg.priors import EDMPrior

TINY_FIELD_NETWORK = {
    "side": 8,
    "space_to_depth": 2,
    "padding": "circular",
    "config": {
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
}


def tiny_field_prior(pde: str = "helmholtz", noise: str = "exponential") -> EDMPrior:
    """Random weights, of a network that does not answer zero."""
    torch.manual_seed(0)
    prior = EDMPrior("random", pde, "FieldUNet", TINY_FIELD_NETWORK, noise=noise)
    torch.nn.init.normal_(prior.network.unet.conv_out.weight, std=0.1)
    return prior.eval()
