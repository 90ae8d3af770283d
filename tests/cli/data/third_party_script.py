"""A script of the kind that people write for EG3D-family code, as it would lie in the repository's root.

It renders three views of a seed with a rebuilt generator, looks at the density in several ways, and writes pictures,
a surface and numbers. It knows nothing of this project beyond the names that the published repositories have, too.
"""

import argparse
import os

import numpy as np
import PIL.Image
import torch

import dnnlib
import legacy
from camera_utils import (
    FOV_to_intrinsics,
    GaussianCameraPoseSampler,
    LookAtPoseSampler,
    UniformCameraPoseSampler,
    create_cam2world_matrix,
)
from shape_utils import convert_sdf_samples_to_ply
from torch_utils import misc
from training.triplane import TriPlaneGenerator


def save_image(tensor, path):
    """Write an image [1, C, H, W] in [-1, 1] as a PNG file."""
    pixels = (tensor.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    PIL.Image.fromarray(pixels[0].cpu().numpy()).save(path)


def grid_points(resolution, cube_length, device):
    """Return the points [1, N^3, 3] of a grid in a cube around the origin, z fastest."""
    axis = torch.linspace(-cube_length / 2, cube_length / 2, resolution, device=device)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(1, -1, 3)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", required=True)
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape-res", type=int, default=16)
    parser.add_argument("--nrr", type=int, default=None)
    parser.add_argument("--sample-mult", type=float, default=2)
    opts = dnnlib.EasyDict(vars(parser.parse_args()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.makedirs(opts.outdir, exist_ok=True)

    with dnnlib.util.open_url(opts.network) as f:
        G = legacy.load_network_pkl(f)["G_ema"].to(device)

    for key in ("depth_resolution", "depth_resolution_importance"):
        G.rendering_kwargs[key] = int(G.rendering_kwargs[key] * opts.sample_mult)

    # Rebuild the generator with the code of this tree.
    G_new = TriPlaneGenerator(*G.init_args, **G.init_kwargs).eval().requires_grad_(False).to(device)
    misc.copy_params_and_buffers(G, G_new, require_all=True)
    G_new.neural_rendering_resolution = G.neural_rendering_resolution
    G_new.rendering_kwargs = G.rendering_kwargs
    if opts.nrr is not None:
        G.neural_rendering_resolution = G_new.neural_rendering_resolution = opts.nrr

    # Cameras.
    intrinsics = FOV_to_intrinsics(18.837, device=device)
    cam_pivot = torch.tensor(G.rendering_kwargs.get("avg_camera_pivot", [0, 0, 0]), device=device)
    cam_radius = G.rendering_kwargs.get("avg_camera_radius", 2.7)
    front = LookAtPoseSampler.sample(np.pi / 2, np.pi / 2, cam_pivot, radius=cam_radius, device=device)
    conditioning_params = torch.cat([front.reshape(-1, 16), intrinsics.reshape(-1, 9)], 1)
    cameras = []
    for angle_y, angle_p in [(0.4, -0.2), (0, -0.2), (-0.4, -0.2)]:
        pose = LookAtPoseSampler.sample(
            np.pi / 2 + angle_y, np.pi / 2 + angle_p, cam_pivot, radius=cam_radius, device=device
        )
        cameras.append(torch.cat([pose.reshape(-1, 16), intrinsics.reshape(-1, 9)], 1))
    torch.manual_seed(opts.seed)
    random_poses = [
        GaussianCameraPoseSampler.sample(
            np.pi / 2,
            np.pi / 2,
            horizontal_stddev=0.3,
            vertical_stddev=0.1,
            radius=cam_radius,
            batch_size=2,
            device=device,
        ),
        UniformCameraPoseSampler.sample(
            np.pi / 2,
            np.pi / 2,
            horizontal_stddev=0.3,
            vertical_stddev=0.1,
            radius=cam_radius,
            batch_size=2,
            device=device,
        ),
    ]
    forward = torch.tensor([[0.0, 0.0, -1.0]], device=device)
    by_hand = create_cam2world_matrix(forward, torch.tensor([[0.0, 0.0, cam_radius]], device=device))

    # Pictures, from both generators with the same random numbers.
    z = torch.from_numpy(np.random.RandomState(opts.seed).randn(1, G.z_dim)).to(device)
    ws = {}
    for name, generator in (("loaded", G), ("rebuilt", G_new)):
        torch.manual_seed(opts.seed)
        ws[name] = generator.mapping(z, conditioning_params, truncation_psi=0.7, truncation_cutoff=14)
        images = [generator.synthesis(ws[name], camera_params)["image"] for camera_params in cameras]
        save_image(torch.cat(images, dim=3), os.path.join(opts.outdir, f"{name}.png"))
    assert images[0].shape == (1, G.img_channels, G.img_resolution, G.img_resolution)
    assert conditioning_params.shape[1] == G.c_dim
    assert ws["loaded"].shape == (1, G.backbone.mapping.num_ws, G.w_dim)

    # The same view with kept planes, with the background of another head, and in one call.
    other_z = torch.from_numpy(np.random.RandomState(opts.seed + 1).randn(1, G.z_dim)).to(device)
    other_ws = G.mapping(other_z, conditioning_params, truncation_psi=0.7, truncation_cutoff=14)
    results = {}
    for name, options in {
        "fresh": {},
        "keeping": {"cache_backbone": True},
        "kept": {"use_cached_backbone": True},
        "other_background": {"ws_bcg": other_ws},
        "half_resolution": {"neural_rendering_resolution": G.neural_rendering_resolution // 2},
    }.items():
        torch.manual_seed(opts.seed)
        results[name] = G.synthesis(ws["loaded"], cameras[1], noise_mode="const", **options)
    torch.manual_seed(opts.seed)
    results["called"] = G(z, cameras[1], truncation_psi=0.7, truncation_cutoff=14, noise_mode="const")
    for name in ("image_raw", "image_depth"):
        assert 2 * results["half_resolution"][name].shape[-1] == results["fresh"][name].shape[-1]

    # Density, from z as scripts for shapes do it, and from ws.
    coords = grid_points(opts.shape_res, G.rendering_kwargs["box_warp"], device)
    directions = torch.zeros_like(coords)
    directions[..., -1] = -1
    sigmas = G.sample(
        coords, directions, z, conditioning_params, truncation_psi=0.7, truncation_cutoff=14, noise_mode="const"
    )["sigma"]
    sigmas_of_ws = G.sample_mixed(
        coords, directions, ws["loaded"], truncation_psi=1, truncation_cutoff=None, noise_mode="const"
    )["sigma"]
    volume = sigmas.reshape((opts.shape_res,) * 3).cpu().numpy()
    volume = np.flip(volume, 0)
    border = int(30 * opts.shape_res / 256)
    padded = np.full_like(volume, volume.min() - 1)
    inner = (slice(border, -border),) * 3
    padded[inner] = volume[inner]
    level = float(np.median(volume))
    path = os.path.join(opts.outdir, "shape.ply")
    convert_sdf_samples_to_ply(np.transpose(padded, (2, 1, 0)), [0, 0, 0], 1, path, level=level)

    # What projectors do with the layer noise.
    noise_bufs = {name: buf for name, buf in G.backbone.synthesis.named_buffers() if "noise_const" in name}
    for buf in noise_bufs.values():
        buf[:] = torch.randn_like(buf)
        buf.requires_grad = True
    other_noise = G.synthesis(ws["loaded"].detach(), cameras[1], noise_mode="const")["image"]
    other_noise.square().mean().backward()

    np.savez(
        os.path.join(opts.outdir, "numbers.npz"),
        **{f"{name}_image": result["image"].cpu().numpy() for name, result in results.items()},
        sigmas=sigmas.cpu().numpy(),
        sigmas_of_ws=sigmas_of_ws.cpu().numpy(),
        poses=torch.cat([front, *random_poses, by_hand]).cpu().numpy(),
        depth_resolutions=[g.rendering_kwargs["depth_resolution"] for g in (G, G_new)],
        noise_shapes=[buf.shape[0] for buf in noise_bufs.values()],
        noise_gradients=[buf.grad is not None for buf in noise_bufs.values()],
    )


if __name__ == "__main__":
    main()
