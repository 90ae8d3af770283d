"""View-image consistency head of the discriminator (ours): does this image show the head from this camera?

The SphereHead paper names a view-image consistency loss and describes no network. Here an embedding of the image, from
the last features of the discriminator's convolutions, is compared with an embedding of the camera by their cosine.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import camera_utils
from training.layers import FullyConnectedLayer

_INITIAL_SCALE = 4.0
_LARGEST_SCALE = 30.0


class ViewHead(nn.Module):
    """Compare image features with camera labels.

    `logit = scale * cos(image embedding, view embedding) + offset`, scale and offset learned.

    * The cosine bounds the logit, so that no side can win by growing: neither the discriminator over time, nor a
      generator that is trained on the logit (its gradient ends where image and camera agree).
    * The offset puts the threshold where matched and mismatched pairs part; views 45 degrees apart may well have
      embeddings with a cosine above 0.
    * Of the label only the rotation of the camera is read, nine numbers without poles or jumps. Its third column is the
      view direction; the other two say how the image is turned. Position and intrinsics are left out: they are constant
      in aligned data, up to the learned camera offset, and a head must not be recognisable by its crop.
    * A flipped image and `camera_utils.mirror_label` of its label belong together like any other pair.

    Args:
        in_channels: C, channels of the features.
        features: width of the embeddings.
    """

    def __init__(self, in_channels: int, features: int) -> None:
        super().__init__()
        self.image_fc0 = FullyConnectedLayer(in_channels * 16, features, activation="lrelu")
        self.image_fc1 = FullyConnectedLayer(features, features)
        self.view_fc0 = FullyConnectedLayer(9, features, activation="lrelu")
        self.view_fc1 = FullyConnectedLayer(features, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_SCALE)))
        self.offset = nn.Parameter(torch.zeros([]))

    def forward(self, trunk: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, 1]` of features `[B, C, 4, 4]` and camera labels `[B, 25]`."""
        cosine = (self.embed_image(trunk) * self.embed_view(c)).sum(dim=1, keepdim=True)
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE) * cosine + self.offset

    def embed_image(self, trunk: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `[B, F]` of features `[B, C, 4, 4]`."""
        flat = trunk.to(self.image_fc0.weight.dtype).flatten(1)
        return F.normalize(self.image_fc1(self.image_fc0(flat)), dim=1)

    def embed_view(self, c: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `[B, F]` of camera labels `[B, 25]`."""
        cam2world, _ = camera_utils.split_label(c.to(self.view_fc0.weight.dtype))
        # The entries of a rotation have a mean square of 1/3; layers expect 1.
        rotation = cam2world[:, :3, :3].flatten(1) * math.sqrt(3)
        return F.normalize(self.view_fc1(self.view_fc0(rotation)), dim=1)
