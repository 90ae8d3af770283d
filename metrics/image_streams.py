"""Images for detectors, as 8-bit pictures on the device: real ones, and generated ones."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dnnlib.workers import map_ordered
from metrics.evaluation import Evaluation
from metrics.requests import ImageSet
from training.triplane import TriPlaneGenerator

_REAL, _GENERATED = "real images", "generated images"
_MAX_REAL_IMAGES, _MAX_REAL_PIXELS = 64, 2**22  # of a batch of real images, which is read and not rendered


class ImageBatch(NamedTuple):
    """Images, and which ones of their set they are."""

    indices: np.ndarray
    """int64 [B]: positions in the set; of real images, items of the data set."""
    images: torch.Tensor
    """uint8 [B, 3, H, W] on the device."""


def real_images(evaluation: Evaluation, items: np.ndarray) -> Iterator[ImageBatch]:
    """Yield this rank's share of items of the data set; worker processes read ahead.

    Raises:
        ValueError: an image cannot be read.
    """
    dataset = evaluation.dataset
    size = max(1, min(_MAX_REAL_IMAGES, _MAX_REAL_PIXELS // dataset.resolution**2))
    own: list[np.ndarray] = []

    def tasks() -> Iterator[list[tuple[int, bool]]]:
        for positions in evaluation.batches(len(items), _REAL, size):
            own.append(items[positions])
            yield [dataset.locate(item) for item in own[-1].tolist()]

    with contextlib.closing(map_ordered(dataset.reader, tasks(), evaluation.settings.workers)) as results:
        for number, layers in enumerate(results):
            images = torch.from_numpy(np.ascontiguousarray(layers[:, :3]))
            yield ImageBatch(own[number], images.to(evaluation.device))


def generated_images(evaluation: Evaluation, images: ImageSet) -> Iterator[ImageBatch]:
    """Yield this rank's share of a set of generated images.

    Layer noise and ray jitter are random, as in training and in the published metrics, and seeded for each batch. All
    batches are whole, so that an image does not depend on where its set ends; what is beyond the end is not yielded.

    Raises:
        ValueError: the network makes values that are not finite.
    """
    size = evaluation.settings.batch_size
    num_whole = -(-images.num_images // size) * size
    conditions, cameras = evaluation.cameras(dataclasses.replace(images, num_images=num_whole))
    seed = _stream_number(images)
    for indices in evaluation.batches(images.num_images, f"{_GENERATED}, {_describe(images)}"):
        whole = indices[0] + np.arange(size)
        label, condition = (torch.from_numpy(c[whole].copy()).to(evaluation.device) for c in (cameras, conditions))
        picture = generate(
            evaluation,
            evaluation.latents(whole),
            condition,
            label,
            offset=images.cameras != "frontal",
            noise=evaluation.noise_generator(seed, int(indices[0])),
        )[: len(indices)]
        evaluation.require_finite(picture, indices)
        yield ImageBatch(indices, to_bytes(picture))


@torch.no_grad()
def generate(
    evaluation: Evaluation,
    z: torch.Tensor,
    condition: torch.Tensor,
    label: torch.Tensor,
    *,
    offset: bool,
    noise: torch.Generator,
) -> torch.Tensor:
    """Render latents `[B, z_dim]`, conditioned on one camera `[B, 25]`, from another one: `[B, 3, H, W]`.

    With equal cameras that is `G(z, c)`.
    """
    G: TriPlaneGenerator = evaluation.generator
    psi, cutoff = evaluation.settings.truncation_psi, evaluation.settings.truncation_cutoff
    ws = G.mapping(z, condition, truncation_psi=psi, truncation_cutoff=cutoff)
    if offset and G.config.pose_offset:
        # As in training, the offset belongs to the camera that renders.
        label, _ = G.apply_delta_c(z, label, truncation_psi=psi, truncation_cutoff=cutoff)
    return G.synthesis(ws, label, noise_mode="random", generator=noise)["image"]


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8, as the published metrics do: `127.5 x + 128`, clamped, cut off."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _stream_number(images: ImageSet) -> int:
    """Return a number for the kind of a set, for seeds."""
    return ("matched", "random", "frontal").index(images.cameras)


def _describe(images: ImageSet) -> str:
    yaw = "" if images.yaw is None else f", yaw {images.yaw.low_deg:g} to {images.yaw.high_deg:g}"
    return f"{images.cameras} cameras{yaw}"


# ---- rendering ahead ----


class _Failure(NamedTuple):
    error: BaseException


_END = object()


def ahead(batches: Iterator[ImageBatch], device: torch.device, depth: int = 1) -> Iterator[ImageBatch]:
    """Yield the same, made by a thread that is up to `depth` batches ahead, on a GPU in a stream of its own.

    What one batch waits for (launching kernels, reading numbers back) is hidden behind the work on another.
    """
    items: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # for what was made before, such as weights

    def put(item: object) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for batch in batches:
                    done = None if stream is None else stream.record_event()
                    if not put((batch, done)):
                        return
            put(_END)
        except BaseException as error:  # raised where it is waited for
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="rendering ahead", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            batch, done = item
            if done is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(done)
                batch.images.record_stream(current)
            yield batch
    finally:
        stopped.set()
        thread.join()
