"""Reconstruction of views: the generator as the decoder of a variational autoencoder (ours).

An encoder E sees a view of a head, its mask and its camera, and gives a distribution of latents; the generator renders
a latent drawn from it from the camera of the same view, or of another view of the same identity:

    mu, log sigma^2 = E(x, m, c),  z = mu + sigma n,  n normal
    L = |G(z, c') - x'|^2 + |G_raw - x'_raw|^2 + |G_mask - m'|^2 + PyramidDistance(G(z, c'), x') + 2e-4 KL

with means over pixels, and KL the divergence of N(mu, sigma^2) from N(0, 1) (Kingma and Welling 2014). It needs no
discriminator: within some thousand images, random latents are heads with a face in front and hair behind, from where
adversarial training goes on. After the warm-up, steps of it can go on beside adversarial ones (Larsen et al. 2016).

The published code has nothing like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from camera_utils import LABEL_SIZE
from training import loss
from training.perceptual import PyramidDistance
from training.phase_pass import PhaseResult, density_noise
from training.schedules import ScheduleValues
from training.train_config import TrainConfig, WarmupConfig
from training.triplane import TriPlaneGenerator

ENCODER_SIZE = 64
"""Side of the views that the encoder sees, in pixels; larger ones are averaged down."""
_CHANNELS = (32, 64, 96, 128)  # of layers that halve the side, from 64 to 4 pixels
_HIDDEN = 256
_LOG_VARIANCE = -8.0, 4.0  # limits, so that no latent is exact or without any bound
_SCALE_SIDE = 8  # pixels; see `gradient_scale`
_MAPS = ("image_mask", "image_parsing")


class Views(NamedTuple):
    """Images with their cameras."""

    images: Mapping[str, torch.Tensor]
    """`image` `[B, 3, H, W]` in [-1, 1], and where there are `image_mask` `[B, 1, H, W]` and `image_parsing`
    `[B, classes, H, W]` in [0, 1]."""
    label: torch.Tensor
    """Cameras `[B, 25]`."""


class Encoder(nn.Module):
    """A view, its mask if the data set has masks, and its camera -> mean and log variance of latents.

    Args:
        z_dim: size of latents.
        has_mask: whether it sees masks.
    """

    def __init__(self, z_dim: int, has_mask: bool) -> None:
        super().__init__()
        self.has_mask = has_mask
        layers, num_inputs = [], 3 + has_mask
        for channels in _CHANNELS:
            layers += [nn.Conv2d(num_inputs, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            num_inputs = channels
        self.convs = nn.Sequential(*layers, nn.Flatten())
        side = ENCODER_SIZE >> len(_CHANNELS)
        self.head = nn.Sequential(
            nn.Linear(num_inputs * side * side + LABEL_SIZE, _HIDDEN), nn.LeakyReLU(0.2), nn.Linear(_HIDDEN, 2 * z_dim)
        )

    def forward(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance, each `[B, z_dim]`; the latter is held between -8 and 4."""
        x = views.images["image"]
        if self.has_mask:
            x = torch.cat([x, views.images["image_mask"] * 2 - 1], dim=1)
        features = self.convs(F.interpolate(x, (ENCODER_SIZE, ENCODER_SIZE), mode="area"))
        mean, log_variance = self.head(torch.cat([features, views.label], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCE)


# ---- terms, one value per sample ----


def sample_latent(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Draw `z = mean + sigma n` `[B, z_dim]`, n from the default generator of the device."""
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def latent_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return `KL(N(mean, sigma^2) || N(0, 1)) = 1/2 sum (mean^2 + sigma^2 - 1 - log sigma^2)` `[B]`, in nats.

    Args:
        mean: `[B, z_dim]`.
        log_variance: `log sigma^2` `[B, z_dim]`.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def squared_error(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return means of squared differences `[B]` of images `[B, C, h, w]` to targets `[B, C, H, W]`, resized by area."""
    if target.shape[2:] != image.shape[2:]:
        target = F.interpolate(target, image.shape[2:], mode="area")
    return (image - target).square().mean(dim=(1, 2, 3))


def reconstruction_terms(
    generated: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], config: WarmupConfig
) -> dict[str, torch.Tensor]:
    """Return the weighted terms of the images, by name, each `[B]`.

    Args:
        generated: what the generator renders: `image`, `image_raw`, `image_mask`, and with a semantic head
            `image_parsing`.
        target: as `Views.images`; maps that are on one side alone have no term.
        config: weights; a term of weight 0 is not computed.
    """
    image = target["image"]
    terms = {"image": squared_error(generated["image"], image)}
    if config.raw_weight > 0:
        terms["raw"] = config.raw_weight * squared_error(generated["image_raw"], image)
    for name, weight in zip(_MAPS, (config.mask_weight, config.parsing_weight)):
        if weight > 0 and name in target and name in generated:
            terms[name.removeprefix("image_")] = weight * squared_error(generated[name], target[name])
    if config.perceptual_weight > 0:
        distance = PyramidDistance()
        terms["perceptual"] = config.perceptual_weight * distance.distance(generated["image"], distance.features(image))
    return terms


def gradient_scale(resolution: int) -> float:
    """Return the factor on the loss, `(resolution / 8)^2`, a power of two for powers of two.

    The gradient of a mean over pixels falls with their number, at 512 pixels below what float16 resolves; with the
    factor it is that of an image of 8 x 8. Adam takes it back: its `eps` has the factor too.
    """
    return (resolution / _SCALE_SIDE) ** 2


# ---- the step ----


class Reconstruction:
    """Encoder, the optimiser of encoder and generator, and the pass that gives both their gradients.

    Weights of the encoder come from PyTorch's global generator.

    Args:
        G: generator, in training mode.
        config: of the run.
        has_mask: whether the data set has masks.
    """

    def __init__(self, G: TriPlaneGenerator, config: TrainConfig, has_mask: bool) -> None:
        self.G, self.config = G, config
        device = next(G.parameters()).device
        memory_format = torch.channels_last if config.precision.channels_last else torch.preserve_format
        self.encoder = Encoder(config.generator.z_dim, has_mask).to(device, memory_format=memory_format)
        self._scale = gradient_scale(config.generator.img_resolution)
        warmup = config.warmup
        groups = [
            {"params": list(G.parameters()), "lr": warmup.generator_lr},
            {"params": list(self.encoder.parameters()), "lr": warmup.encoder_lr},
        ]
        eps = config.optimizer.eps * self._scale
        self.optimizer = torch.optim.Adam(groups, betas=warmup.betas, eps=eps, fused=True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        networks = {"": self.G, "encoder.": self.encoder}
        return {prefix + name: p for prefix, network in networks.items() for name, p in network.named_parameters()}

    def run(
        self, source: Views, target: Views, values: ScheduleValues, num_groups: int = 1, weight: float = 1.0
    ) -> PhaseResult:
        """Add the gradients of encoder and generator on a chunk, times `weight` and `gradient_scale`.

        The generator is conditioned as in adversarial training (`loss.swap_conditioning`), without mixing and density
        noise; it learns camera offsets, if it has any. The mean w that is returned is that of normal latents, since
        truncation is about these.

        Args:
            source: views that are encoded.
            target: views that are rendered, row by row of the same identity.
            values: schedules of this iteration.
            num_groups: groups in the chunk, see `training.batch_plan`.
            weight: share of the chunk in the global batch.
        """
        self.G.requires_grad_(True)
        result, config = PhaseResult(), self.config
        mean, log_variance = self.encoder(source)
        z = sample_latent(mean, log_variance)
        with density_noise(self.G, 0.0):
            generated, penalty, result.w_mean = self._generate(z, target.label, values, num_groups)
        terms = reconstruction_terms(generated, target.images, config.warmup)
        divergence = latent_divergence(mean, log_variance)
        total = sum(terms.values()) + config.warmup.kl_weight * divergence
        reported = {**terms, "kl": divergence, "loss": total}
        if penalty is not None:
            reported["offset"] = penalty
            total = total + penalty
        result.stats = {f"Loss/warmup/{name}": value.detach() for name, value in reported.items()}
        result.loss = total.mean().detach()
        (total.mean() * (weight * self._scale)).backward()
        return result

    def _generate(
        self, z: torch.Tensor, label: torch.Tensor, values: ScheduleValues, num_groups: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """Return images, the penalty on camera offsets if there are any, and the mean w `[w_dim]` of normal latents."""
        G = self.G
        conditioning = loss.swap_conditioning(label, values.swap_prob, num_groups)
        camera, penalty = label, None
        if G.config.pose_offset:
            camera, offsets = G.apply_delta_c(z, label)
            penalty = self.config.loss.pose_offset_reg * loss.pose_offset_penalty(offsets, num_groups)
        ws = G.mapping(z, conditioning)
        images = G.synthesis(ws, camera, values.neural_rendering_resolution)
        with torch.no_grad():
            w_mean = G.mapping(torch.randn_like(z), conditioning)[:, 0].mean(dim=0)
        return images, penalty, w_mean
