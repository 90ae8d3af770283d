"""Statistics of features of many images: mean and covariance, and the features of the first images themselves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from torch_utils import distributed
from torch_utils.tensor_file import TensorFile, open_tensor_file, write_tensor_file
from training.config import require

KIND = "spherehead-feature-stats"
_DTYPES = {"mean": torch.float64, "cov": torch.float64, "rows": torch.float32, "row_indices": torch.int64}
# Of captured rows that lie together and travel together. The C library returns blocks of this size to the system at
# once, so that memory does not grow when rows move from the blocks to their final place.
_BLOCK_BYTES = 2**25


class FeatureStats:
    """Gathers features of images in one pass: `add` batches on every rank, `reduce`, and read.

    Moments are those of the published metrics, mean mu = E[x] and population covariance E[x x^T] - mu mu^T in float64.
    Differs from the published code: sums are taken about the mean of the first batch instead of 0, so that nothing
    cancels where means are large compared to deviations; and the features that ranks captured are in the order of
    images instead of ranks, none of them twice.

    Args:
        moments: whether to compute mean and covariance.
        capture: features of images of index 0 to `capture - 1` are kept; None is of none.

    Raises:
        ValueError: `capture` is below 1.
    """

    def __init__(self, *, moments: bool, capture: int | None) -> None:
        require(capture is None or capture >= 1, "capture", "a number of images, or None", capture)
        self.moments = moments
        self.capture = capture
        self.num_items = 0
        """Number of images: of this rank's before `reduce`, of all after it."""
        self.num_features: int | None = None
        """Width of a row; None as long as there is no image."""
        self._is_reduced = False
        self._seen: list[np.ndarray] = []  # indices of all images
        self._sums = None  # a `_Sums` where moments are wanted and something was added
        self._blocks: list[torch.Tensor] = []  # float32 [rows of a block, F] on the CPU, of which the last is not full
        self._num_captured = 0
        self._mean = self._cov = None
        self._rows = np.empty((0, 0), np.float32)
        self._row_indices = np.empty(0, np.int64)

    @torch.no_grad()
    def add(self, features: torch.Tensor, indices: np.ndarray) -> None:
        """Add images of this rank.

        Args:
            features: `[B, F]`, real, on any device, which computes the moments.
            indices: `[B]` integers, those of the images in their set; no image may be added twice, on any rank.

        Raises:
            ValueError: a feature is not finite; the number of features differs from that of earlier ones; indices and
                features do not belong together.
            RuntimeError: after `reduce`.
        """
        if self._is_reduced:
            raise RuntimeError("feature statistics: expected features before reduce, came some after it")
        indices = np.asarray(indices)
        self._check(features, indices)
        if len(indices) == 0:
            return
        self.num_features = features.shape[1]
        self.num_items += len(indices)
        self._seen.append(indices.astype(np.int64))
        if self.moments:
            self._sums = self._sums or _Sums(features)
            self._sums.add(features)
        if self.capture is not None:
            self._append(features[torch.from_numpy(indices < self.capture).to(features.device)].float().cpu())

    def _check(self, features: torch.Tensor, indices: np.ndarray) -> None:
        fits = features.ndim == 2 and features.shape[1] > 0 and indices.shape == features.shape[:1]
        require(fits, "features", f"[{indices.size}, F] for as many images", tuple(features.shape))
        known = self.num_features
        require(known in (None, features.shape[1]), "features", f"{known} per image as before", features.shape[1])
        whole = indices.size == 0 or (np.issubdtype(indices.dtype, np.integer) and indices.min() >= 0)
        require(whole, "indices of images", "integers of at least 0", indices)
        finite = torch.isfinite(features).all(dim=1).cpu().numpy()
        if not finite.all():
            raise ValueError(f"features of image {indices[~finite][0]}: expected finite numbers, got NaN or infinity")

    def _append(self, rows: torch.Tensor) -> None:
        """Store captured rows in the blocks."""
        per_block = _rows_per_block(rows.shape[1])
        while len(rows):
            used = self._num_captured % per_block
            if used == 0:
                self._blocks.append(torch.empty(per_block, rows.shape[1]))
            part, rows = rows[: per_block - used], rows[per_block - used :]
            self._blocks[-1][used : used + len(part)] = part
            self._num_captured += len(part)

    # Over all ranks ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Take the statistics together over all ranks; collective, and nothing when it was done before.

        Afterwards they are the same on all of them, with captured rows in the order of images. A rank may have added
        nothing. Besides the result, a rank holds what it captured itself, less and less of it, and a block of 32 MiB.

        Raises:
            ValueError: ranks have different numbers of features, or an image was added twice.
            torch.cuda.OutOfMemoryError: from the GPU, which moments of several ranks need for a second covariance.
        """
        if self._is_reduced:
            return
        seen = np.concatenate(self._seen) if self._seen else np.empty(0, np.int64)
        of_ranks = _gather((seen, self.num_features))
        widths = {width for _, width in of_ranks if width is not None}
        require(len(widths) <= 1, "features", "as many per image on all ranks", sorted(widths))
        self.num_features = widths.pop() if widths else None
        everything, counts = np.unique(np.concatenate([indices for indices, _ in of_ranks]), return_counts=True)
        require(bool((counts == 1).all()), "images", "every index once", everything[counts > 1][:5].tolist())
        self.num_items = len(everything)
        if self.num_items and self.moments:
            self._mean, self._cov = _merge(self._sums, self.num_items, self.num_features)
        if self.num_items and self.capture is not None:
            self._gather_rows([indices[indices < self.capture] for indices, _ in of_ranks])
        self._sums, self._seen, self._is_reduced = None, [], True

    def _gather_rows(self, indices_of_ranks: list[np.ndarray]) -> None:
        """Bring captured rows of all ranks to their place, and free the blocks one by one."""
        self._row_indices = np.sort(np.concatenate(indices_of_ranks))
        rows = torch.empty(len(self._row_indices), self.num_features)  # memory is taken where it is written
        per_block = _rows_per_block(self.num_features)
        for src, indices in enumerate(indices_of_ranks):
            is_mine = src == distributed.rank()
            for start in range(0, len(indices), per_block):
                part = indices[start : start + per_block]
                block = self._blocks.pop(0)[: len(part)] if is_mine else None
                block = _broadcast(block, (len(part), self.num_features), src)
                rows[torch.from_numpy(np.searchsorted(self._row_indices, part))] = block
                del block
        self._rows = rows.numpy()

    # Results ----------------------------------------------------------------------------------------------------------

    def mean_cov(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean float64 `[F]` and population covariance float64 `[F, F]` over all images.

        Raises:
            ValueError: there are no images, or moments were not wanted.
            RuntimeError: before `reduce`.
        """
        self._require_reduced()
        require(self.moments, "mean and covariance", "statistics with moments", "some without")
        require(self._cov is not None, "mean and covariance", "at least one image", 0)
        return self._mean, self._cov

    def rows(self) -> np.ndarray:
        """Return captured features, float32 `[N, F]`, in the order of images; they are not copied.

        Raises:
            RuntimeError: before `reduce`.
        """
        self._require_reduced()
        return self._rows

    def row_indices(self) -> np.ndarray:
        """Return the images that `rows` belong to, int64 `[N]`, ascending.

        Raises:
            RuntimeError: before `reduce`.
        """
        self._require_reduced()
        return self._row_indices

    def _require_reduced(self) -> None:
        if not self._is_reduced:
            raise RuntimeError("feature statistics: expected reduce first, came a question")

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write reduced statistics to a safetensors file; nothing appears under `path` unless all was written.

        Raises:
            OSError: it cannot be written.
            RuntimeError: before `reduce`.
        """
        self._require_reduced()
        arrays = {"mean": self._mean, "cov": self._cov, "rows": self._rows, "row_indices": self._row_indices}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        names = ("moments", "capture", "num_items", "num_features")
        write_tensor_file(Path(path), KIND, tensors, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStats:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or of another kind; the message names it.
            OSError: it cannot be read.
        """
        try:
            with open_tensor_file(path, KIND) as file:
                return cls._read(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _read(cls, file: TensorFile) -> FeatureStats:
        try:
            stats = cls(moments=file.header["moments"], capture=file.header["capture"])
            stats.num_items, stats.num_features = file.header["num_items"], file.header["num_features"]
        except (KeyError, TypeError):
            raise ValueError("its header is damaged") from None
        num_rows, width = file.specs.get("rows", (None, (0, 0)))[1]
        shapes = {"rows": (num_rows, width), "row_indices": (num_rows,)}
        if stats.moments and stats.num_items:
            shapes |= {"mean": (stats.num_features,), "cov": (stats.num_features, stats.num_features)}
        expected = {name: (_DTYPES[name], shape) for name, shape in shapes.items()}
        require(file.specs == expected, "its tensors", f"{expected}", file.specs)
        require(num_rows == 0 or width == stats.num_features, "its rows", f"{stats.num_features} features", width)
        for name in expected:
            setattr(stats, f"_{name}", file.read(name).numpy())
        stats._is_reduced = True
        return stats


class _Sums:
    """Sums of features and of their products, about a point near their mean, on their device."""

    def __init__(self, features: torch.Tensor) -> None:
        self.point = features.double().mean(dim=0)  # [F]
        self.num_items = 0
        self.first = torch.zeros_like(self.point)  # [F]
        self.second = self.point.new_zeros(len(self.point), len(self.point))  # [F, F]

    def add(self, features: torch.Tensor) -> None:
        """Add `[B, F]`."""
        deviations = features.double() - self.point
        self.num_items += len(features)
        self.first += deviations.sum(dim=0)
        self.second.addmm_(deviations.T, deviations)


def _merge(sums: _Sums | None, num_items: int, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance over all ranks; `sums` may be used up."""
    if sums is None:
        sums = _Sums(torch.zeros(1, num_features, device=_collective_device()))
    mean = sum_of_ranks((sums.point * sums.num_items + sums.first) / num_items)
    # About the common mean m instead of the point p: with f = sum of (x - p) of this rank's n features,
    # sum (x - m)(x - m)^T = sum (x - p)(x - p)^T - f d^T - d f^T + n d d^T, where d = m - p.
    shift = mean - sums.point
    products = sums.second.addr_(sums.first - shift * (sums.num_items / 2), shift, alpha=-1)
    products.addr_(shift, sums.first - shift * (sums.num_items / 2), alpha=-1)
    cov = sum_of_ranks(products.div_(num_items)).cpu().numpy()
    return mean.cpu().numpy(), (cov + cov.T) / 2


def _rows_per_block(num_features: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * num_features))


def _collective_device() -> torch.device:
    """Return where tensors must lie that ranks exchange."""
    on_gpu = distributed.is_active() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _gather(value: tuple) -> list[tuple]:
    """Return the values of all ranks in their order."""
    if not distributed.is_active():
        return [value]
    values: list = [None] * distributed.world_size()
    dist.all_gather_object(values, value)
    return values


def sum_of_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks, which may take the place of the tensor; the same bits on all of them."""
    if not distributed.is_active():
        return tensor
    tensor = tensor.to(_collective_device())
    dist.all_reduce(tensor)
    dist.broadcast(tensor, 0)
    return tensor


def _broadcast(block: torch.Tensor | None, shape: tuple[int, int], src: int) -> torch.Tensor:
    """Return the block, float32 on the CPU, that rank `src` has."""
    if not distributed.is_active():
        return block
    device = _collective_device()
    block = torch.empty(shape, device=device) if block is None else block.to(device)
    dist.broadcast(block, src)
    return block.cpu()
