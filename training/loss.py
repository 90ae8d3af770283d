"""Terms of the losses, one pure function each, and the mixing of samples that belongs to them.

Terms return one value per sample where they are means over samples, so that the mean over the global batch does not
depend on how the batch is split. What mixes samples does so within groups: a batch `[B, ...]` with `num_groups` groups
is laid out member by member (`training.batch_plan`), row `i * num_groups + j` being member i of group j.

Random numbers come from the default generator of the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from torch_utils.ops.upfirdn2d import filter2d

_TV_EPS = 1e-12  # under the root of the total variation: its gradient is finite where the field is flat

# Logistic GAN terms (Goodfellow et al. 2014, non-saturating) ----------------------------------------------------------


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return `softplus(-D(G(z)))`, of the shape of the logits."""
    return F.softplus(-fake_logits)


def discriminator_fake_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return `softplus(D(G(z)))`, of the shape of the logits."""
    return F.softplus(fake_logits)


def discriminator_real_loss(real_logits: torch.Tensor) -> torch.Tensor:
    """Return `softplus(-D(x))`, of the shape of the logits."""
    return F.softplus(-real_logits)


def r1_penalties(real_logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the squared gradients of the logits with respect to each input (R1, Mescheder et al. 2018).

    `R1(x)_b = sum over channels and pixels of (d sum(logits) / d x_b)^2`.

    Args:
        real_logits: `[B, 1]`, with a graph that leads back to the inputs.
        inputs: images `[B, C, H, W]` that require gradients.

    Returns:
        name of the input -> `[B]`, differentiable.
    """
    gradients = torch.autograd.grad(real_logits.sum(), list(inputs.values()), create_graph=True)
    return {name: g.square().sum(dim=(1, 2, 3)) for name, g in zip(inputs, gradients)}


# Regularisers of the generator ----------------------------------------------------------------------------------------


def pose_offset_penalty(offsets: torch.Tensor, num_groups: int = 1) -> torch.Tensor:
    """Return the squared mean of the learned camera offsets of a group (PanoHead, camera self-adaptation).

    `sum over axes k of (mean over the group of offset_k)^2`, averaged over groups: single heads may move their camera,
    their mean may not.

    Args:
        offsets: `[B, 3]`, in world units.
        num_groups: groups in the batch.

    Differs from the published code in taking means over groups, not over whatever one GPU computes at a time.
    """
    return offsets.unflatten(0, (-1, num_groups)).mean(dim=0).square().sum(dim=1).mean()


def density_l1(sigma: torch.Tensor, sigma_near: torch.Tensor) -> torch.Tensor:
    """Return `mean |sigma(X) - sigma(X')|` over pairs of close points (EG3D, section 5), from densities `[B, M]`."""
    return (sigma - sigma_near).abs().mean()


def density_monotonic(sigma: torch.Tensor, sigma_behind: torch.Tensor, detach: bool) -> torch.Tensor:
    """Return `mean relu(sigma(X) - sigma(X - h z))`: density should not fall from the front of the head inwards.

    Args:
        sigma: raw density `[B, M]` at points.
        sigma_behind: raw density `[B, M]` a step further from a camera in front.
        detach: let the gradient only raise what is behind, and not lower what is in front.
    """
    return F.relu((sigma.detach() if detach else sigma) - sigma_behind).mean()


def density_total_variation(stencil: torch.Tensor) -> torch.Tensor:
    """Return `mean over points of |grad sigma| h`, the total variation of the density field per step (ours).

    The gradient is taken by forward differences along the three axes. In contrast to `density_l1`, whose pairs differ
    by one random vector, it sees all of the gradient at every point: a surface costs its area times its height whatever
    its direction.

    Args:
        stencil: raw density `[B, M, 4]` at a point and one step h along x, y, z from it.

    Differs from the published code, which accepts the name `total-variation` and does nothing.
    """
    differences = stencil[..., 1:] - stencil[..., :1]  # [B, M, 3]
    return (differences.square().sum(dim=-1) + _TV_EPS).sqrt().mean()


def uniform_points(batch: int, count: int, half_side: float, device: torch.device) -> torch.Tensor:
    """Draw points `[B, M, 3]` in a cube around the origin, from `-half_side` to `half_side`, in world units."""
    return (torch.rand((batch, count, 3), device=device) * 2 - 1) * half_side


def near_pairs(batch: int, count: int, perturbation: float, device: torch.device) -> torch.Tensor:
    """Draw points and neighbours `[B, 2 M, 3]` for `density_l1`.

    Points fill the cube [-1, 1]^3, as published, although the box of the planes has a side of 1 in the published
    settings: seven of eight pairs lie outside of it, where the field has little or nothing to smooth.

    Args:
        batch: B.
        count: M.
        perturbation: standard deviation of the distance along each axis, in world units.
        device: where to draw.
    """
    points = uniform_points(batch, count, 1.0, device)
    return torch.cat([points, points + torch.randn_like(points) * perturbation], dim=1)


def behind_pairs(batch: int, count: int, step: float, device: torch.device) -> torch.Tensor:
    """Draw points in [-1, 1]^3 and those a step behind, towards -z: `[B, 2 M, 3]` for `density_monotonic`."""
    points = uniform_points(batch, count, 1.0, device)
    behind = torch.cat([points[..., :2], points[..., 2:] - step], dim=-1)
    return torch.cat([points, behind], dim=1)


def stencil_points(batch: int, count: int, box_warp: float, step: float, device: torch.device) -> torch.Tensor:
    """Draw points in the box of the planes with their neighbours: `[B, 4 M, 3]` for `density_total_variation`.

    Entry `4 m` is a point, `4 m + 1` to `4 m + 3` lie a step along x, y and z from it.
    """
    points = uniform_points(batch, count, box_warp / 2, device)
    offsets = torch.cat([points.new_zeros(1, 3), torch.eye(3, dtype=points.dtype, device=device) * step])
    return (points.unsqueeze(2) + offsets).flatten(1, 2)


# Blur of what the discriminator sees ----------------------------------------------------------------------------------


def blur_taps(sigma: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the taps `2^-(i / sigma)^2`, i from -b to b with b = floor(3 sigma), normalised to unit sum.

    The base is 2, not e, as published: the standard deviation is `sigma / sqrt(2 ln 2)` = 0.85 `sigma`.
    """
    radius = math.floor(3 * sigma)
    taps = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32).div(sigma).square().neg().exp2()
    return taps / taps.sum()


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images `[B, C, H, W]` over `sigma` pixels, with zeros outside; below 1/3 nothing is done."""
    if math.floor(3 * sigma) < 1:
        return images
    return filter2d(images, blur_taps(sigma, images.device))


# Mixing of samples ----------------------------------------------------------------------------------------------------


def roll_within_groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Give every row of `[B, ...]` the value of the member before it in its group, the first that of the last."""
    return x.roll(num_groups, dims=0)


def swap_conditioning(labels: torch.Tensor, prob: float | None, num_groups: int = 1) -> torch.Tensor:
    """Give each sample, with a probability, the camera of another one to be conditioned on (EG3D, section 4.4).

    Args:
        labels: `[B, 25]`.
        prob: None gives zeros, and draws nothing.
        num_groups: groups in the batch.
    """
    if prob is None:
        return torch.zeros_like(labels)
    swapped = torch.rand((len(labels), 1), device=labels.device) < prob
    return torch.where(swapped, roll_within_groups(labels, num_groups), labels)


def swap_conditioning_of_groups(labels: torch.Tensor, prob: float | None, num_groups: int = 1) -> torch.Tensor:
    """Do as `swap_conditioning` with one draw for each whole group: the form of the density regularisers."""
    if prob is None:
        return torch.zeros_like(labels)
    swapped = torch.rand(num_groups, device=labels.device) < prob
    rolled, labels = (x.unflatten(0, (-1, num_groups)) for x in (roll_within_groups(labels, num_groups), labels))
    return torch.where(swapped[:, None], rolled, labels).flatten(0, 1)


def swap_backgrounds(ws: torch.Tensor, prob: float, num_groups: int = 1) -> torch.Tensor | None:
    """Return w-layers for the background, of another sample with a probability (PanoHead, foreground awareness).

    Args:
        ws: w-layers `[B, L, w_dim]`.
        prob: 0 returns None, which is the sample's own background, and draws nothing.
        num_groups: groups in the batch.
    """
    if prob == 0:
        return None
    swapped = torch.rand((len(ws), 1, 1), device=ws.device) < prob
    return torch.where(swapped, roll_within_groups(ws, num_groups), ws)


def draw_mixing_cutoffs(num_ws: int, prob: float, num_groups: int, device: torch.device) -> torch.Tensor:
    """Draw, for each group, the first layer `[num_groups]` that takes its style from another latent.

    Uniform in 1 ... `num_ws` - 1 with probability `prob`, else `num_ws`, which mixes nothing (StyleGAN).
    """
    cutoffs = torch.randint(1, num_ws, (num_groups,), device=device)
    mixes = torch.rand(num_groups, device=device) < prob
    return torch.where(mixes, cutoffs, num_ws)


def mix_styles(ws: torch.Tensor, other: torch.Tensor, cutoffs: torch.Tensor) -> torch.Tensor:
    """Replace the layers from the cutoff of the group on by those of another latent.

    Args:
        ws: w-layers `[B, L, w_dim]`.
        other: w-layers of other latents, of the same shape.
        cutoffs: `[num_groups]`.
    """
    layers = torch.arange(ws.shape[1], device=ws.device)
    replaced = layers >= cutoffs[:, None]  # [num_groups, L]
    return torch.where(replaced.repeat(len(ws) // len(cutoffs), 1)[:, :, None], other, ws)
