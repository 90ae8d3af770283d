"""Statistics that metrics ask for: every image made or read once, every feature computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats
from metrics.image_streams import ImageBatch, ahead, generated_images, real_images
from metrics.requests import Cameras, ImageSet, StatsRequest, YawRange
from metrics.stats_cache import StatsCache, data_key
from torch_utils import distributed


def collect_stats(evaluation: Evaluation, requests: Iterable[StatsRequest]) -> dict[StatsRequest, FeatureStats]:
    """Compute statistics; on all ranks together, and all get the same.

    Sets that share images (a smaller number of the same kind; real images of a range of yaws) are read or rendered
    once. Requests that differ in `moments` and `capture` alone share one object, which may hold more than each asked
    for. Statistics of real images come from the cache if they are there.

    Raises:
        ValueError, OSError: an image cannot be read, a detector cannot be loaded, or the network makes NaN.
    """
    merged = _merge(requests)
    unique = list(dict.fromkeys(merged.values()))
    found = _real_stats(evaluation, [request for request in unique if request.images.kind == "real"])
    found |= _generated_stats(evaluation, [request for request in unique if request.images.kind == "generated"])
    return {request: found[whole] for request, whole in merged.items()}


def _merge(requests: Iterable[StatsRequest]) -> dict[StatsRequest, StatsRequest]:
    """Return for each request the one that asks for all that those of the same images and output do."""
    wholes: dict[StatsRequest, StatsRequest] = {}
    requests = list(dict.fromkeys(requests))
    for request in requests:
        key = _without_extent(request)
        other = wholes.get(key, key)
        capture = max((c for c in (request.capture, other.capture) if c is not None), default=None)
        wholes[key] = replace(key, moments=request.moments or other.moments, capture=capture)
    return {request: wholes[_without_extent(request)] for request in requests}


def _without_extent(request: StatsRequest) -> StatsRequest:
    return replace(request, moments=False, capture=None)


# ---- from images to statistics ----


@dataclass
class _Sink:
    """Statistics that are being collected."""

    request: StatsRequest
    stats: FeatureStats
    positions: np.ndarray | None = None
    """int64: the position of an image in the set by what its stream calls it, -1 where it is not in the set; None where
    these are the same and the set is the first of them."""

    @classmethod
    def of(cls, request: StatsRequest, positions: np.ndarray | None = None) -> _Sink:
        """Begin."""
        return cls(request, FeatureStats(moments=request.moments, capture=request.capture), positions)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the positions of images in the set, -1 where they are not in it."""
        if self.positions is not None:
            return self.positions[indices]
        return np.where(indices < self.request.images.num_images, indices, -1)


@torch.no_grad()
def _feed(evaluation: Evaluation, batches: Iterable[ImageBatch], sinks: Sequence[_Sink]) -> None:
    """Compute the features of images that sinks want, add them, and make the sums over ranks."""
    ordered = sorted(sinks, key=_output)
    groups = {output: list(group) for output, group in itertools.groupby(ordered, key=_output)}
    for batch in batches:
        for (name, output), group in groups.items():
            rows = [sink.rows(batch.indices) for sink in group]
            wanted = np.any([row >= 0 for row in rows], axis=0)
            if not wanted.any():
                continue
            # All of a batch, also where a sink wants a part: sums then do not depend on what else is computed.
            features = evaluation.load_detector(name)(batch.images, output)
            for sink, row in zip(group, rows):
                if (kept := row >= 0).any():
                    inside = features if kept.all() else features[torch.from_numpy(kept).to(features.device)]
                    sink.stats.add(inside, row[kept])
    for sink in sinks:
        sink.stats.reduce()


def _output(sink: _Sink) -> tuple[str, str]:
    return sink.request.detector, sink.request.output


# ---- real images ----


def _real_stats(evaluation: Evaluation, requests: Sequence[StatsRequest]) -> dict[StatsRequest, FeatureStats]:
    cache = StatsCache(evaluation.settings.cache_dir)
    keys = _cache_keys(evaluation, requests)
    found: dict[StatsRequest, FeatureStats] = {}
    if distributed.is_main():
        found = {request: stats for request in requests if (stats := cache.load(keys[request])) is not None}
    found = distributed.broadcast_object(found)
    sinks = [_Sink.of(r, _positions(evaluation, r.images)) for r in requests if r not in found]
    if sinks:
        wanted = np.any([sink.positions >= 0 for sink in sinks], axis=0)
        _feed(evaluation, real_images(evaluation, np.flatnonzero(wanted)), sinks)
        for sink in sinks:
            found[sink.request] = sink.stats
            if distributed.is_main():
                with distributed.long_task("keeping statistics"):
                    cache.save(keys[sink.request], sink.stats)
    return found


def _positions(evaluation: Evaluation, images: ImageSet) -> np.ndarray:
    """Return where in a set every item of the data set is, int64 [len]; -1 where it is not."""
    positions = np.full(len(evaluation.dataset), -1)
    items = evaluation.items(images)
    positions[items] = np.arange(len(items))
    return positions


def _cache_keys(evaluation: Evaluation, requests: Sequence[StatsRequest]) -> dict[StatsRequest, str]:
    """Return what determines the statistics of requests."""
    if not requests:
        return {}
    data, seed = data_key(evaluation.dataset), evaluation.settings.seed
    keys = {}
    for request in requests:
        ordered = request.images.num_images is not None or request.capture is not None
        parts = (data, evaluation.load_detector(request.detector).key, replace(request, detector=""))
        keys[request] = "\n".join(map(str, (*parts, seed if ordered else "any order")))
    return keys


# ---- generated images ----


def _generated_stats(evaluation: Evaluation, requests: Sequence[StatsRequest]) -> dict[StatsRequest, FeatureStats]:
    streams: dict[tuple[YawRange | None, Cameras], list[_Sink]] = {}
    for request in requests:
        streams.setdefault((request.images.yaw, request.images.cameras), []).append(_Sink.of(request))
    for sinks in streams.values():
        for sink in sinks:
            evaluation.load_detector(sink.request.detector)  # before a bar shows how far rendering is
        longest = max((sink.request.images for sink in sinks), key=lambda images: images.num_images)
        _feed(evaluation, _rendered(evaluation, longest), sinks)
    return {sink.request: sink.stats for sinks in streams.values() for sink in sinks}


def _rendered(evaluation: Evaluation, images: ImageSet) -> Iterator[ImageBatch]:
    """Return generated images, made ahead of the features where that pays."""
    batches = generated_images(evaluation, images)
    return ahead(batches, evaluation.device) if evaluation.settings.render_ahead else batches
