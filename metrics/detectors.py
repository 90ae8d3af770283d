"""Detectors by name, path or URL.

- `view` needs no download: trained on the real images of the data set at hand, see `metrics.view_regressor`.
- `inception` is the published Inception-v3 of 2015-12-05, `vgg16` the published VGG16, `dinov2` a TorchScript file of
  DINOv2 that you make; see `metrics.torchscript_detectors`.
- A path or URL is any TorchScript file `images -> features`. A suffix says how images are prepared for it, such as
  `my.pt?input=imagenet&size=224&resize=bicubic`.
"""

from __future__ import annotations

from metrics.detector_interface import Detector, DetectorContext, DetectorInfo, check_request
from metrics.torchscript_detectors import KNOWN, FileDetector, parse_source
from metrics.view_regressor import load_view_detector
from training.config import require

__all__ = ["VIEW_NAME", "Detector", "DetectorContext", "DetectorInfo", "check_request", "load_detector"]

VIEW_NAME = "view"


def load_detector(name: str, context: DetectorContext) -> Detector:
    """Load a detector; collective, where there are several ranks.

    Args:
        name: see above.
        context: where to put it, and the data set that `view` is trained on.

    Raises:
        ValueError: an unknown name, a file of another kind, or a data set that `view` cannot be trained on.
        OSError: a file that is not there and cannot be fetched; the message says from where to get it and where to put
            it.
    """
    require(bool(name.strip()), "detector", f"{VIEW_NAME}, {', '.join(KNOWN)}, a path or a URL", "nothing")
    if name == VIEW_NAME:
        return load_view_detector(context)
    return FileDetector(parse_source(name), context)
