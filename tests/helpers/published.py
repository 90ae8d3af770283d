"""The deterministic weights, inputs and configurations that the published reference values were computed with."""

from __future__ import annotations

import re
import zlib

import numpy as np
import torch
from torch import nn

import camera_utils
from training.config import DiscriminatorConfig
from training.dual_discriminator import Discriminator
from training.published_kwargs import EG3D_RENDERING
from training.triplane import TriPlaneGenerator

_MODULES = "training.superresolution."
SR_KWARGS = {"channel_base": 32768, "channel_max": 512, "fused_modconv_default": "inference_only"}
REPRESENTATIONS = {"sphere": "dual_spherical", "pano": "tri_grid", "eg3d": "tri_plane"}
FIXTURE_SEED = 123


def fill_weights(module: nn.Module) -> None:
    """Fill a module with numbers that depend on the names of its entries alone."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("resample_filter"):
                continue
            random = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
            tensor.copy_(torch.as_tensor(_scaled(name, random)))


def _scaled(name: str, random: np.ndarray) -> np.ndarray:
    if name.endswith("affine.bias"):
        return 1 + 0.1 * random
    if name.endswith((".bias", "noise_strength", "w_avg")) or name.startswith("t_mapping."):
        return 0.1 * random
    if re.search(r"mapping\.fc\d+\.weight$", name):
        return 100 * random
    return random


def tiny_generator_kwargs(system: str, parsing: bool = True, **rendering) -> dict:
    """Return the published constructor arguments of the tiny generator of 'sphere', 'pano' or 'eg3d'."""
    rendering_kwargs = {
        "superresolution_module": _MODULES + "SuperresolutionHybrid2X",
        "superresolution_noise_mode": "none",
        "sr_antialias": True,
        "image_resolution": 128,
        "disparity_space_sampling": False,
        "clamp_mode": "softplus",
        "c_gen_conditioning_zero": False,
        "c_scale": 1,
        "gpc_reg_prob": 0.8,
        "density_reg": 0,
        "decoder_lr_mul": 1,
        "decoder_activation": "none",
        "use_torgb_raw": True,
        "use_background": True,
        "triplane_size": 32,
        "triplane_depth": 3,
        "trans_reg": 10,
        "depth_resolution": 12,
        "depth_resolution_importance": 12,
        "ray_start": 2.25,
        "ray_end": 3.3,
        "box_warp": 1,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0, 0, 0.2],
        "depth_clamp": "batch",
        "auto_range_of_misses": "nearest",
        "importance_draws": "random",
        **(EG3D_RENDERING if system == "eg3d" else {}),
        **rendering,
    }
    return {
        "z_dim": 64,
        "c_dim": 25,
        "w_dim": 512,
        "img_resolution": 128,
        "img_channels": 3,
        "channel_base": 1024,
        "channel_max": 32,
        "num_fp16_res": 0,
        "conv_clamp": None,
        "architecture": "skip",
        "fused_modconv_default": "inference_only",
        "mapping_kwargs": {"num_layers": 2},
        "sr_num_fp16_res": 4,
        "sr_kwargs": {**SR_KWARGS, "first_rgb_replaces_raw": True},
        "rendering_kwargs": rendering_kwargs,
        "representation": REPRESENTATIONS[system],
        "pose_offset": system != "eg3d",
        "parsing_flag": parsing and system == "sphere",
    }


def tiny_generator(system: str, **rendering) -> TriPlaneGenerator:
    """Build the tiny generator with filled weights, in eval mode, at neural rendering resolution 16."""
    generator = TriPlaneGenerator(**tiny_generator_kwargs(system, **rendering)).eval()
    fill_weights(generator)
    generator.neural_rendering_resolution = 16
    return generator


def fixture_latents() -> torch.Tensor:
    """Return the latents z `[2, 64]` of the reference values."""
    return _float32(np.random.RandomState(1).randn(2, 64))


def fixture_cameras() -> torch.Tensor:
    """Return the labels `[2, 25]` of the reference values: in front and 2 rad to the side, slightly above."""
    poses = [
        camera_utils.LookAtPoseSampler.sample(np.pi / 2 + yaw, np.pi / 2 - 0.2, torch.zeros(3), radius=2.7)
        for yaw in (0, 2.0)
    ]
    intrinsics = camera_utils.FOV_to_intrinsics(18.837).expand(2, 3, 3)
    return camera_utils.camera_label(torch.cat(poses), intrinsics)


def fixture_points() -> torch.Tensor:
    """Return the query points `[2, 50, 3]` of the reference values, some of them outside the box."""
    return _float32(np.random.RandomState(2).uniform(-0.6, 0.6, (2, 50, 3)))


def tiny_discriminator(variant: str, **config) -> Discriminator:
    """Build the tiny discriminator of a variant with filled weights, in eval mode."""
    discriminator = Discriminator(
        DiscriminatorConfig(variant=variant, img_resolution=64, channel_base=1024, channel_max=32, **config)
    ).eval()
    fill_weights(discriminator)
    return discriminator


def fixture_images() -> dict[str, torch.Tensor]:
    """Return the discriminator inputs of the reference values, for 4 samples."""
    parsing = torch.from_numpy(np.random.RandomState(4).randn(4, 20, 16, 16)).softmax(dim=1)
    return {
        "image": _float32(np.random.RandomState(1).randn(4, 3, 64, 64)),
        "image_raw": _float32(np.random.RandomState(2).randn(4, 3, 16, 16)),
        "image_mask": _float32(np.random.RandomState(3).uniform(size=(4, 1, 16, 16))),
        "image_parsing": parsing.float(),
    }


def fixture_labels() -> torch.Tensor:
    """Return the discriminator labels `[4, 25]` of the reference values."""
    return _float32(np.random.RandomState(5).randn(4, 25))


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))
