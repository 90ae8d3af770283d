"""View-image consistency (ViCo): the discriminator must notice when an image and its camera do not belong together.

The SphereHead paper introduces the loss: a camera-conditioned discriminator judges quality first and lets a face pass
at the back of the head, so real images are shown to it with mismatched cameras as additional negatives. How those are
chosen and weighted is not known, and there is no published training code. **All of this module is our design.**

Which cameras
    A mismatched label is that of another sample of the data set, whose view direction is at least `min_angle_deg` away
    from the image's own: labels as they really occur, so that the label alone gives nothing away; near views, which are
    no clear negatives, are left out. A share of them is taken opposite in yaw at a similar pitch (the face as
    seen from behind): the mistake that the loss is there for. Labels and images are mirrored together before, by the
    data set. A sample for which no candidate is far enough away (frontal sets) takes no part: its `valid` is 0.

Mode `label`: `weight * softplus(D(x, c'))`
    The discriminator's own logit learns to reject c'. The optimal discriminator then compares real pairs with generated
    *and* with mismatched ones, so that the generator is told about views by its usual loss alone. Only the label
    projection is computed again: features of the image do not depend on the label.

Mode `head`: `weight * (softplus(-S(x, c)) + softplus(S(x, c')))`
    A separate logit S (`training.view_head`) learns whether image and camera belong together, and leaves the
    adversarial logit to its game. Positives and negatives are equally many (an invalid sample is left out of both), so
    that S cannot gain by preferring one answer. The generator's loss gets `generator_weight softplus(-S(G(z, c), c))`.

Gradients reach the trunk
    Nothing is detached in the discriminator: its convolutions are to find features that tell views apart, which the
    adversarial logit then reads as well. In the generator's phase the discriminator is frozen, and the term ends in the
    image. The generator's pose is never pulled from the label: the label is the given quantity.

Generated images (`source` fake or both)
    In mode `label` a generated image with a mismatched camera is one more negative. In mode `head` its pairs enter like
    real ones, with the *requested* camera as match. While the generator shows a face at the back, that teaches S to
    call it consistent, and S and the generator may agree on a code of their own: the default is `real`, where S learns
    from true pairs only and the generator has to meet them.

R1 is measured on matched real pairs only: mismatched logits are a classifier's, not a critic's at the data.

Augmentation: an image that the pipe flips is shown with mirrored labels, both its own and the mismatched one. In the
published code labels stay, which would teach wrong views here. Rotations in the image plane leave labels alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import camera_utils
from training.config import require
from training.dual_discriminator import Discriminator, DiscriminatorFeatures
from training.train_config import VicoConfig

NUM_CANDIDATES = 256
YAW_BINS_DEG = (0, 30, 60, 90, 120, 150, 180)
"""Edges of the bins in which margins are logged."""


class MismatchedLabels(NamedTuple):
    """Cameras that do not belong to the images of a batch."""

    labels: torch.Tensor
    """`[B, 25]`; the image's own label where there is no other."""
    valid: torch.Tensor
    """`[B]`, 1 where the camera is far enough away, else 0."""
    yaw_gap_deg: torch.Tensor
    """`[B]`, between the yaw angles of the two cameras, 0 to 180."""


class WeightedValues(NamedTuple):
    """Values of which each counts as often as its weight says."""

    values: torch.Tensor
    weights: torch.Tensor


class VicoTerm(NamedTuple):
    """Terms of one batch of images."""

    loss: torch.Tensor
    """`[B, 1]`, weighted; invalid samples have 0."""
    stats: dict[str, torch.Tensor]
    """Statistics by name."""
    weighted_stats: dict[str, WeightedValues]
    """Margins between matched and mismatched logits by yaw gap, name -> `[B]`."""


class LabelPool:
    """The labels of a data set, from which mismatched ones are drawn.

    Args:
        labels: `[M, 25]`, mirrored copies included.
        device: where to draw.

    Raises:
        ValueError: for another shape or no label.
    """

    def __init__(self, labels: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> None:
        labels = torch.as_tensor(labels)
        shape = tuple(labels.shape)
        require(len(shape) == 2 and shape[1] == camera_utils.LABEL_SIZE and shape[0] > 0, "labels", "[M, 25]", shape)
        self._labels = labels.to(device, torch.float32)
        self._directions = view_directions(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def draw(self, labels: torch.Tensor, config: VicoConfig) -> MismatchedLabels:
        """Draw a mismatched label for each of `[B, 25]` from the default generator, without waiting for the device.

        For each one, 256 labels of the pool are drawn. Of those at least `min_angle_deg` away, the first is taken; for
        a share `hard_share` of the samples the one nearest to the own direction turned by half a circle of yaw. With
        none among them, which is likely only where less than 1 in 100 labels is far enough, `valid` is 0.
        """
        own = view_directions(labels)
        device = own.device
        candidates = torch.randint(len(self), (len(labels), NUM_CANDIDATES), device=device)
        is_hard = torch.rand((len(labels), 1), device=device) < config.hard_share
        directions = self._directions[candidates]  # [B, K, 3]
        is_far = (directions * own[:, None]).sum(dim=-1) <= math.cos(math.radians(config.min_angle_deg))
        opposite = torch.stack([-own[:, 0], own[:, 1], -own[:, 2]], dim=-1)
        first = -torch.arange(NUM_CANDIDATES, device=device, dtype=own.dtype)
        score = torch.where(is_hard, (directions * opposite[:, None]).sum(dim=-1), first)
        choice = score.masked_fill(~is_far, -math.inf).argmax(dim=1, keepdim=True)
        valid = is_far.any(dim=1)
        drawn = self._labels[candidates.gather(1, choice).squeeze(1)].to(labels.dtype)
        drawn = torch.where(valid[:, None], drawn, labels)
        return MismatchedLabels(drawn, valid.to(labels.dtype), yaw_gap_deg(labels, drawn))


def draw_mismatched(
    pool: LabelPool, config: VicoConfig, real_labels: torch.Tensor, fake_labels: torch.Tensor
) -> dict[str, MismatchedLabels]:
    """Draw what a chunk needs, as fields of `training.phases.Chunk`: nothing where the loss is off.

    Args:
        pool: labels of the data set.
        config: mode and source.
        real_labels: of the real images `[B, 25]`.
        fake_labels: of those to generate `[B, 25]`.
    """
    if config.mode == "none":
        return {}
    drawn = {}
    if config.source in ("real", "both"):
        drawn["mismatched"] = pool.draw(real_labels, config)
    if config.source in ("fake", "both"):
        drawn["mismatched_fake"] = pool.draw(fake_labels, config)
    return drawn


def view_directions(labels: torch.Tensor) -> torch.Tensor:
    """Return unit vectors `[B, 3]` from the head towards the cameras of labels `[B, 25]`: minus the forward column."""
    cam2world, _ = camera_utils.split_label(labels)
    return F.normalize(-cam2world[:, :3, 2], dim=1)


def yaw_gap_deg(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the angles `[B]`, 0 to 180 degrees, between the yaws of two sets of labels `[B, 25]`."""
    gap = camera_utils.yaw_pitch_roll_deg(labels)[:, 0] - camera_utils.yaw_pitch_roll_deg(others)[:, 0]
    return ((gap + 180) % 360 - 180).abs()


def discriminator_term(
    discriminator: Discriminator,
    features: DiscriminatorFeatures,
    matched_logits: torch.Tensor,
    labels: torch.Tensor,
    mismatched: MismatchedLabels,
    config: VicoConfig,
) -> VicoTerm:
    """Compute the discriminator's terms for one batch of images.

    Args:
        discriminator: with a head, where the mode has one.
        features: of the images.
        matched_logits: adversarial logits `[B, 1]` with their own labels.
        labels: their own labels `[B, 25]`.
        mismatched: labels that do not belong to them.
        config: mode and weight.
    """
    valid = mismatched.valid[:, None]
    loss, stats, margins = torch.zeros_like(valid), {"valid": mismatched.valid}, {}
    if config.uses_labels:
        logits = discriminator.logits(features, mismatched.labels)
        term = F.softplus(logits)
        loss = loss + term * valid
        stats["label"] = (term * valid).detach()
        margins["margin_label"] = matched_logits - logits
    if config.uses_head:
        matched = discriminator.consistency(features, labels)
        logits = discriminator.consistency(features, mismatched.labels)
        term = F.softplus(-matched) + F.softplus(logits)
        loss = loss + term * valid
        stats["head"] = (term * valid).detach()
        margins["margin_head"] = matched - logits
    weighted = {}
    for name, margin in margins.items():
        weighted |= _binned(name, margin.detach().squeeze(1), mismatched)
    return VicoTerm(loss * config.weight, stats, weighted)


def generator_term(consistency_logits: torch.Tensor, config: VicoConfig) -> torch.Tensor:
    """Return the generator's term `[B, 1]`: `generator_weight * softplus(-S(G(z, c), c))`."""
    return F.softplus(-consistency_logits) * config.generator_weight


def _binned(name: str, margin: torch.Tensor, mismatched: MismatchedLabels) -> dict[str, WeightedValues]:
    """Return the margins `[B]` once for each bin of yaw gap, with weight 1 in their own bin and 0 elsewhere."""
    gap, binned = mismatched.yaw_gap_deg, {}
    for low, high in zip(YAW_BINS_DEG, YAW_BINS_DEG[1:]):
        inside = (gap >= low) & ((gap < high) | (high == YAW_BINS_DEG[-1]))
        binned[f"{name}/yaw{low:03d}-{high:03d}"] = WeightedValues(margin, inside * mismatched.valid)
    return binned
