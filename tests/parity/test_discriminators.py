"""Every discriminator variant gives the published logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.parity import assert_parity, strip_prefix
from tests.helpers.published import fixture_images, fixture_labels, tiny_discriminator
from tests.helpers.vectors import read_vectors
from torch_utils.ops.upfirdn2d import setup_filter
from training.dual_discriminator import VARIANTS, filtered_resizing
from training.layers import RESAMPLE_TAPS
from training.published_kwargs import discriminator_config_from_kwargs

VECTORS = read_vectors("discriminators")
LABEL_NOISE = 0.5
LABEL_NOISE_SEED = 3


def config_fields(name: str) -> dict[str, Any]:
    """Return the fields of `DiscriminatorConfig` for the published arguments of a reference value."""
    extra = dict(VECTORS.meta["variants"][name]["extra"])
    extra.pop("parsing_resolution", None)  # published, without effect
    return {**extra, "disc_c_noise": LABEL_NOISE if "disc_c_noise" in name else 0.0}


def test_reference_values_cover_every_variant():
    assert {name.split("_")[0] for name in VECTORS.meta["variants"]} == set(VARIANTS)


@torch.no_grad()
@pytest.mark.parametrize("name", VECTORS.meta["variants"])
def test_logits_equal_published(name):
    # The published class fades the raw image before every call, which ours does in training mode only.
    discriminator = tiny_discriminator(name.split("_")[0], **config_fields(name)).train()
    torch.manual_seed(LABEL_NOISE_SEED)
    logits = discriminator(fixture_images(), fixture_labels())
    assert_parity({"logits": logits.flatten()}, {"logits": torch.from_numpy(VECTORS.arrays[f"logits/{name}"])})


@pytest.mark.parametrize("name", [n for n, entry in VECTORS.meta["variants"].items() if entry["n_params"]])
def test_parameter_count_equals_published(name):
    discriminator = tiny_discriminator(name.split("_")[0], **config_fields(name))
    count = sum(parameter.numel() for parameter in discriminator.parameters())
    assert count == VECTORS.meta["variants"][name]["n_params"]


@pytest.mark.parametrize("name", VECTORS.meta["variants"])
def test_published_arguments_give_the_same_configuration(name):
    variant, fields = name.split("_")[0], config_fields(name)
    published = discriminator_config_from_kwargs(
        variant,
        c_dim=25,
        img_resolution=64,
        img_channels=3,
        channel_base=1024,
        channel_max=32,
        num_fp16_res=4,
        conv_clamp=256,
        epilogue_kwargs={"mbstd_group_size": 4},
        disc_c_noise=fields["disc_c_noise"],
        **VECTORS.meta["variants"][name]["extra"],
    )
    assert published == tiny_discriminator(variant, **fields).config


@pytest.mark.parametrize("name", VECTORS.meta["resized"])
def test_filtered_resizing_equals_published(name):
    mode, size = name.split("->")
    mode = float(mode) if mode[0].isdigit() else mode
    x = torch.from_numpy(np.random.RandomState(8).randn(1, 1, 12, 12).astype(np.float32))
    resized = filtered_resizing(x, int(size), setup_filter(RESAMPLE_TAPS), mode)
    assert resized.shape == (1, 1, int(size), int(size))
    reference = strip_prefix("resized/", VECTORS.arrays)
    assert_parity({name: resized.flatten()}, {name: torch.from_numpy(reference[name])})
