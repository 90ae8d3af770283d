"""Background swap: whether a head stays the same before the background of another one (published calc_mbs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from metrics.evaluation import frontal_label
from metrics.image_streams import to_bytes
from metrics.registry import MetricValues, NotApplicable, RendersOnItsOwn, register
from metrics.requests import StatsRequest
from metrics.segmenter import Segmenter, load_segmenter
from training.networks_stylegan2 import SynthesisOptions

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

TRUNCATION_PSI = 0.7
"""As published, of all w-layers; the truncation of the evaluation has no part in it."""


@dataclass(frozen=True, kw_only=True)
class BackgroundSwap(RendersOnItsOwn):
    """Difference of the masks of a head before two backgrounds: `background_swapN` over N pairs; published 64.

    A pair is two latents, conditioned on the frontal camera and truncated with psi = 0.7. The first is rendered from
    the frontal camera before its own background and before that of the other; a segmentation network finds the head in
    both pictures, and `mean (mask - mask')^2` over all pixels is the number. Where the volume is as solid as the head
    it shows, the masks agree; where hair or clothes are painted onto the background, they change with it.

    How far the segmentation itself is led astray by backgrounds is part of the number: exactly traced synthetic heads
    of 64 pixels, which cannot change, get 0.003 with a network trained on their masks.

    Values: the number; `mask_share`, the mean of the masks: a segmentation that finds nothing cannot see a difference.

    Differs from the published code: latents depend on the seed; layer noise is constant and ray jitter the same for
    both pictures, which here differ in nothing but the background; and the segmentation is what the evaluation names,
    by default a network trained on the masks of the data set. Numbers of different segmentations cannot be compared.
    """

    name: str
    num_images: int

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Render the pairs and compare their masks; collective.

        Raises:
            NotApplicable: the network has no background of its own, or there is nothing to find heads with.
        """
        if not evaluation.generator.config.background:
            raise NotApplicable(f"{self.name}: the network has no background network")
        if evaluation.settings.segmenter is None and not evaluation.dataset.has_masks:
            raise NotApplicable(f"{self.name}: the data have no masks to learn from, and no segmenter is given")
        segmenter = load_segmenter(evaluation.settings.segmenter, evaluation.detector_context)
        indices, rows = [np.empty(0, np.int64)], [np.empty((0, 2), np.float32)]
        for batch in evaluation.batches(self.num_images, "swapping backgrounds"):
            indices.append(batch)
            rows.append(swap_backgrounds(evaluation, segmenter, batch, batch + self.num_images))
        difference, share = evaluation.gather(np.concatenate(indices), np.concatenate(rows)).astype(np.float64).T
        return MetricValues(
            values={self.name: float(difference.mean()), "mask_share": float(share.mean())},
            details={
                "num_pairs": len(difference),
                "truncation_psi": TRUNCATION_PSI,
                "segmenter": segmenter.info.to_json(),
            },
            notes=(f"segmenter {segmenter.info.name}; resize: {segmenter.info.resize}",),
        )


@register(
    r"background_swap(?P<num>\d+k?)",
    "background_swapN",
    "change of the mask of a head when its background is swapped; published calc_mbs is background_swap64",
)
def make_background_swap(name: str, num_images: int) -> BackgroundSwap:
    """Make the metric of a name."""
    return BackgroundSwap(name=name, num_images=num_images)


@torch.no_grad()
def swap_backgrounds(evaluation: Evaluation, segmenter: Segmenter, heads: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compare the masks of heads before their own background and before that of others.

    Args:
        evaluation: with a generator that has a background network.
        segmenter: finds heads in pictures.
        heads: numbers of latents, int64 [B].
        others: numbers of the latents that give the second background, int64 [B].

    Returns:
        float32 [B, 2]: mean squared difference of the masks, and the mean of the first mask.

    Raises:
        ValueError: the network makes values that are not finite.
    """
    G = evaluation.generator
    label = frontal_label().to(evaluation.device).expand(len(heads), -1)
    ws, ws_others = (G.mapping(evaluation.latents(i), label, truncation_psi=TRUNCATION_PSI) for i in (heads, others))
    noise = evaluation.noise_generator(int(heads[0]))
    options = SynthesisOptions(noise_mode="const", generator=noise)
    state = noise.get_state()
    masks = []
    for ws_background in (ws, ws_others):
        noise.set_state(state)
        image = G.render(G.radiance_field(ws, ws_background, options), label)["image"]
        evaluation.require_finite(image, heads)
        masks.append(segmenter(to_bytes(image)))  # [B, 1, H, W]
    first, second = masks
    difference = (first - second).square().mean(dim=(1, 2, 3))
    return torch.stack([difference, first.mean(dim=(1, 2, 3))], dim=1).float().cpu().numpy()
