"""What an inversion minimises: the difference between rendering and photo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from training.config import require

if TYPE_CHECKING:
    from inference.photos import Photo
    from training.perceptual import PerceptualDistance


class ImageLoss:
    """Mean squared error, perceptual distance and silhouette of renderings of one photo.

    With a mask M, m = M + b (1 - M) weighs the pixels: the mean squared error is that of sqrt(m) (image - target), and
    the perceptual distance sees target + m (image - target), so that its gradients are weighed by m while the features
    of the target are computed once. Without a mask m is 1, which is the published loss.
    """

    def __init__(
        self, photo: Photo, distance: PerceptualDistance, background_weight: float, silhouette_weight: float
    ) -> None:
        """Prepare the target.

        Args:
            photo: on the device of the renderings.
            distance: perceptual distance.
            background_weight: b.
            silhouette_weight: 0 measures no silhouette.

        Raises:
            ValueError: a silhouette is wanted of a photo without mask.
        """
        has_mask = photo.mask is not None
        require(
            has_mask or silhouette_weight == 0, "silhouette_weight", "0 for a photo without mask", silhouette_weight
        )
        self._target, self._mask, self._distance = photo.image, photo.mask, distance
        self._has_silhouette = silhouette_weight > 0
        self._weight = None
        if has_mask and background_weight < 1:
            self._weight = photo.mask + background_weight * (1 - photo.mask)
        with torch.no_grad():
            self._features = distance.features(photo.image)

    def __call__(self, rendered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the scalars `mse`, `perceptual` and, if it is wanted, `silhouette`, none of them weighted.

        Args:
            rendered: from `TriPlaneGenerator.render`, of one image.
        """
        image, target, weight = rendered["image"], self._target, self._weight
        squares = (image - target).square()
        if weight is not None:
            squares = squares * weight
            image = target + weight * (image - target)
        terms = {"mse": squares.mean(), "perceptual": self._distance.distance(image, self._features).mean()}
        if self._has_silhouette:
            opacity = rendered["image_mask"]
            mask = F.interpolate(self._mask, opacity.shape[-2:], mode="area")
            terms["silhouette"] = (opacity - mask).square().mean()
        return terms
