"""Perceptual path length: how smoothly pictures change along straight lines between latents, seen from one camera."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from metrics.registry import MetricValues, RendersOnItsOwn, register
from metrics.requests import StatsRequest
from training.config import require
from training.networks_stylegan2 import SynthesisOptions
from training.perceptual import PerceptualDistance, load_perceptual_distance

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

Place = Literal["end", "full"]

EPSILON = 1e-4
"""Length of a step, as a part of the way."""
LOW_PERCENTILE, HIGH_PERCENTILE = 1, 99
"""Distances outside are left out, as published with StyleGAN2: a few jumps would be most of the mean."""
PUBLISHED_SAMPLES = 50_000


@dataclass(frozen=True, kw_only=True)
class PerceptualPathLength(RendersOnItsOwn):
    """Mean perceptual distance per step along lines in W: `pplN_wend` and `pplN_wfull` over N pairs of latents.

    Karras et al. 2019, "A style-based generator architecture for generative adversarial networks", section 4.1:

        E[ d(G(lerp(w1, w2; t)), G(lerp(w1, w2; t + eps))) / eps^2 ],  eps = 1e-4

    with t = 0 (`wend`) or uniform in [0, 1] (`wfull`), without the smallest and the largest 1 % of the values
    (StyleGAN2). Both ends of a pair are conditioned on one camera, that of the sample, and pictures are rendered from
    it, with constant layer noise and equal ray jitter.

    d is LPIPS if the evaluation names a file of its network, otherwise the distance that needs none,
    `training.perceptual.PyramidDistance`; the two have different scales, and the details say which it was.

    Differs from the published code, whose `ppl2_wend` (here 50 000 pairs) renders without a camera and fails.
    """

    name: str
    num_images: int
    place: Place = "end"

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Render the steps and measure them; collective.

        Raises:
            ValueError: the network makes values that are not finite, or the file of the distance cannot be used.
        """
        distance = load_perceptual_distance(evaluation.settings.vgg, evaluation.device)
        _, labels = evaluation.cameras(evaluation.generated(self.num_images))
        indices, rows = [np.empty(0, np.int64)], [np.empty((0, 1), np.float32)]
        for batch in evaluation.batches(self.num_images, "steps between latents"):
            indices.append(batch)
            pairs = np.stack([batch, batch + self.num_images])
            rows.append(step_lengths(evaluation, distance, pairs, labels[batch], self.place)[:, None])
        lengths = evaluation.gather(np.concatenate(indices), np.concatenate(rows))[:, 0].astype(np.float64)
        return MetricValues(
            values={self.name: trimmed_mean(lengths), "median": float(np.median(lengths))},
            details={"num_pairs": len(lengths), "distance": distance.name, "epsilon": EPSILON, "place": self.place},
            notes=(f"distance of pictures for path lengths: {distance.name}",),
        )


@register(
    r"ppl(?!2_wend)(?P<num>\d+k?)_w(?P<place>end|full)?",
    "pplN_w[end|full]",
    "perceptual path length in W from fixed cameras",
)
def make_path_length(name: str, num_images: int, place: Place | None) -> PerceptualPathLength:
    """Make the metric of a name; `_w` alone is `_wend`."""
    return PerceptualPathLength(name=name if place else f"{name}end", num_images=num_images, place=place or "end")


@register(r"ppl2_wend", "ppl2_wend", "the published name of ppl50k_wend")
def make_published_path_length(name: str) -> PerceptualPathLength:
    """Make the metric of the published name."""
    return PerceptualPathLength(name=name, num_images=PUBLISHED_SAMPLES)


@torch.no_grad()
def step_lengths(
    evaluation: Evaluation, distance: PerceptualDistance, pairs: np.ndarray, labels: np.ndarray, place: Place
) -> np.ndarray:
    """Measure one step between the latents of each pair.

    Args:
        evaluation: with a generator.
        distance: between pictures.
        pairs: numbers of latents, int64 [2, B].
        labels: of the cameras to condition on and to render from, float32 [B, 25].
        place: where on the way the step lies.

    Returns:
        float32 [B]: distance / eps^2.

    Raises:
        ValueError: a picture, or a distance, is not finite.
    """
    G, settings = evaluation.generator, evaluation.settings
    cameras = torch.from_numpy(labels.copy()).to(evaluation.device)
    truncation = {"truncation_psi": settings.truncation_psi, "truncation_cutoff": settings.truncation_cutoff}
    first, second = (G.mapping(evaluation.latents(numbers), cameras, **truncation) for numbers in pairs)  # [B, L, 512]
    noise = evaluation.noise_generator(int(pairs[0, 0]))
    t = torch.rand(len(cameras), 1, 1, generator=noise, device=evaluation.device) if place == "full" else 0.0
    options = SynthesisOptions(noise_mode="const", generator=noise)
    state = noise.get_state()
    images = []
    for step in (0.0, EPSILON):
        noise.set_state(state)
        ws = first + (second - first) * (t + step)
        images.append(G.render(G.radiance_field(ws, options=options), cameras)["image"])
    lengths = distance.distance(images[1], distance.features(images[0])) / EPSILON**2
    numbers = pairs[0][~lengths.isfinite().cpu().numpy()]
    require(len(numbers) == 0, "network", "finite steps between pictures", f"NaN or infinity in samples {numbers[:5]}")
    return lengths.float().cpu().numpy()


def trimmed_mean(lengths: np.ndarray) -> float:
    """Return the mean of what lies between the 1st and the 99th percentile.

    As published: the limits are values of the sample, the lower neighbour of the 1st percentile and the upper one of
    the 99th, and belong to what is kept. Below 100 values, that is all of them.
    """
    low = np.percentile(lengths, LOW_PERCENTILE, method="lower")
    high = np.percentile(lengths, HIGH_PERCENTILE, method="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())
