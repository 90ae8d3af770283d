"""Detectors by name, path or URL.

| name | what it is |
|---|---|
| `view` | needs no download: trained on the real images of the data set at hand, see `metrics.view_regressor` |
| `inception` | the published Inception-v3 of 2015-12-05 |
| `vgg16` | the published VGG16 |
| `dinov2` | a TorchScript file of DINOv2 that you make, see `metrics.torchscript_detectors` |
| path or URL | any TorchScript file `images -> features`; `my.pt?input=imagenet&size=224&resize=bicubic` says how images are prepared |
"""

from __future__ import annotations

from metrics.detector_interface import Detector, DetectorContext, DetectorInfo, check_request

__all__ = ["Detector", "DetectorContext", "DetectorInfo", "check_request", "load_detector"]

VIEW_NAME = "view"


def load_detector(name: str, context: DetectorContext) -> Detector:
    """Load a detector; collective, where there are several ranks.

    Args:
        name: see the table above.
        context: where to put it, and the data set that `view` is trained on.

    Raises:
        ValueError: an unknown name, a file of another kind, or a data set that `view` cannot be trained on.
        OSError: a file that is not there and cannot be fetched; the message says from where to get it and where to put
            it.
    """
    raise NotImplementedError(name)
