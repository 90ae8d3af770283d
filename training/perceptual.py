"""Compare images the way people do, as a loss: LPIPS with a given network, or a formula that needs no download."""

from __future__ import annotations

import functools
import os
import urllib.parse
import warnings
from typing import BinaryIO, Protocol

import torch
from torch.nn import functional

from dnnlib.util import open_url
from training.config import require
from training.image_metrics import structure_error

_WORKING_SIZE = 256
_MIN_SIZE = 16

# Constants of the pyramid distance; see its docstring.
_MAX_LEVELS = 6
_COARSEST_SIZE = 8
_STRUCTURE_WEIGHT = 0.65
_EDGE_WEIGHT = 0.2
_CHROMA_WEIGHT = 0.25
_COLOR_WEIGHT = 0.4
_STRUCTURE_C2 = (0.06 * 2) ** 2  # K2 = 0.06 of the range 2
_EDGE_C = 2e-4  # two diagonal differences of 0.01 each, squared and added: about 1.3 grey levels a pixel
_COLOR_EPS = 0.05
_LUMA = (0.299, 0.587, 0.114)


class PerceptualDistance(Protocol):
    """A distance of images that can be minimised; what it needs of the target is computed once."""

    name: str
    """For reports: which distance it is."""

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a distance to an image `[B, 3, H, W]` in [-1, 1] needs of it."""

    def distance(self, image: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return distances `[B]` of images to what `features` gave; differentiable in the image."""


def load_perceptual_distance(vgg: str | None, device: torch.device | str = "cpu") -> PerceptualDistance:
    """Return the published distance with a given network, or the one that needs none.

    Args:
        vgg: path or URL of a TorchScript file, see `VggDistance`; None is `PyramidDistance`.
        device: where the images will be.

    Raises:
        ValueError, OSError: as `VggDistance`.
    """
    return PyramidDistance() if vgg is None else VggDistance(vgg, device)


class VggDistance:
    """LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric") by a file.

    The file is a TorchScript program `model(x, resize_images, return_lpips)` that takes `[B, 3, H, W]` in 0...255 and
    returns features `[B, F]`, normalised and weighted so that their squared distance is LPIPS. Published inversions
    use a VGG16 in this form. Images larger than 256 are averaged down to 256 x 256 first, as published:
    `distance = sum_f (f(x)_f - f(target)_f)^2`.

    TorchScript runs no Python, but is a program: use files from sources that you trust.
    """

    def __init__(self, source: str | os.PathLike, device: torch.device | str = "cpu") -> None:
        """Load a network.

        Args:
            source: path, `http(s)://`, `hf://`; see `dnnlib.util.open_url`.
            device: where to put it.

        Raises:
            ValueError: the file is no TorchScript, or does not give such features.
            OSError: it cannot be read.
        """
        self._source = os.fspath(source)
        require(bool(self._source.strip()), "vgg", "the path or URL of a TorchScript file", "nothing")
        self.name = f"vgg16 ({_file_name(self._source)})"
        self._model = load_script(open_url(self._source, return_filename=True), self._source, device)
        try:
            with torch.no_grad():
                self._run(torch.zeros(2, 3, 64, 64, device=device))
        except (RuntimeError, torch.jit.Error) as error:
            raise ValueError(
                f"{self._source}: expected a network that takes (x, resize_images, return_lpips), got an error: "
                f"{last_line(error)}"
            ) from error

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the features `([B, F],)` of images.

        Args:
            image: `[B, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: another shape, or features that are not finite.
        """
        features = self._run((limit_size(_checked(image)) + 1) * (255 / 2))
        require(bool(torch.isfinite(features).all()), f"{self._source}, features", "finite numbers", "NaN or infinity")
        return (features,)

    def distance(self, image: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return LPIPS of images to a target.

        Args:
            image: `[B, 3, H, W]` in [-1, 1]. NaN passes through: looking for it would wait for a GPU at each step.
            target: of `features`, for B images or one.

        Returns:
            `[B]`, at least 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        features = self._run((limit_size(_checked(image)) + 1) * (255 / 2))
        require(
            features.shape[1] == target[0].shape[1],
            "image",
            f"a size that gives {target[0].shape[1]} features, as the target",
            f"{list(image.shape)} with {features.shape[1]}",
        )
        _require_batch(features, target[0])
        return (features - target[0]).square().sum(1)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        # Without the profiling executor: it compiles during the first calls, and a run that is resumed is to have the
        # same bits as one that was not interrupted.
        with torch.jit.optimized_execution(False):
            features = self._model(x, resize_images=False, return_lpips=True)
        fits = isinstance(features, torch.Tensor) and features.ndim == 2 and features.is_floating_point()
        came = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        require(fits and len(features) == len(x), self._source, f"features [{len(x)}, F] of {len(x)} images", came)
        return features


class PyramidDistance:
    """A perceptual distance by a formula, with nothing to download. It is **not** LPIPS, nor an estimate of it.

    Both images are averaged down to 256 x 256 if larger, as for `VggDistance`, and turned into luma and two chroma
    channels (BT.601). Level 0 of a Gaussian pyramid (Burt and Adelson 1983) is the luma; from level 1 on it has the
    chroma too. Each level is W of the one before; W is a window with the taps 1 1 2 2 1 1 in both directions, at every
    second pixel: its standard deviation of 1.5 is that of SSIM's window. The last level is the last one of at least
    8 pixels; there are at most six. With x, y the levels of the two images:

        D = 0.65 S + 0.2 E + 0.25 H + 0.4 K,  each the mean over its levels and over their pixels

    - S, structure: `var(x - y) / (var x + var y + 0.12^2)` of the luma, with the variances in W. This is 1 minus the
      contrast-structure term of multi-scale SSIM (Wang et al. 2003, 2004), added over scales instead of multiplied.
    - E, edges: `|T_x - T_y|^2 / (|T_x|^2 + |T_y|^2 + c^2)`, where T = W(g g^T) is the structure tensor (Foerstner and
      Guelch 1987; Bigun and Granlund 1987) of the diagonal differences g (Roberts 1965) of the luma. T has strength
      and direction of edges within a window, but not where exactly, and so sees a match through small shifts.
    - H, chroma structure: S of the chroma, from level 1 on.
    - K, colour: `sqrt(|x - y|^2 + 0.05^2) - 0.05` over the three channels (Charbonnier et al. 1994), from level 1 on;
      the only term that sees a constant offset.

    W repeats the outermost pair of rows and columns; an odd last one is left out. All terms are smooth, symmetric,
    0 for equal images, and bounded but for K. Levels have equal weights on purpose: with finer ones counted more,
    photos that lie far apart stop attracting each other. More of E widens the range from which an optimisation finds
    back, and costs detail at its end.

    In a loss `0.1 MSE + D + w_norm` it stands where LPIPS does and is scaled alike: 0 for equal images, and 0.62 on
    average for portraits of different people, so that it outweighs `0.1 MSE`, 0.035 for these, as LPIPS does. For
    small damage it is not known to agree with LPIPS. docs/inversion.md has the values for blur, shifts and noise. A
    value with its gradient takes about 20 ms of one CPU core at 512 pixels, and 17 ms at 256.
    """

    name = "pyramid"

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the levels, means, variances and structure tensors of images, four tensors per level.

        Args:
            image: `[B, 3, H, W]` in [-1, 1], at least 16 pixels high and wide.

        Raises:
            ValueError: another shape.
        """
        level, chroma = _luma_chroma(limit_size(_checked(image)))
        features: list[torch.Tensor] = []
        for number in range(_num_levels(level)):
            level = torch.cat([level, chroma], 1) if number == 1 else level
            mean, square = _reduce(torch.cat([level, level * level], 1)).chunk(2, 1)
            features += [level, mean, square - mean * mean, _structure_tensor(level[:, :1])]
            level = mean
        return tuple(features)

    def distance(self, image: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return distances of images to a target.

        Args:
            image: `[B, 3, H, W]` in [-1, 1]; as large as the target was, unless both are at least 256. NaN passes
                through.
            target: of `features`, for B images or one.

        Returns:
            `[B]`, at least 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        level, chroma = _luma_chroma(limit_size(_checked(image)))
        size, expected = list(level.shape[2:]), list(target[0].shape[2:])
        require(size == expected, "image", f"the size {expected} of the target", size)
        _require_batch(level, target[0])
        structure, edges, chroma_structure, color = [], [], [], []
        for number in range(len(target) // 4):
            level = torch.cat([level, chroma], 1) if number == 1 else level
            other, *moments, other_tensor = target[4 * number : 4 * number + 4]
            if number:
                color.append(_charbonnier(level - other))
            edges.append(_tensor_error(_structure_tensor(level[:, :1]), other_tensor))
            level, error = _next_level(level, other, *moments)
            structure.append(error[:, 0])
            if number:
                chroma_structure.append(error[:, 1:].mean(1))
        return (
            _STRUCTURE_WEIGHT * _mean(structure)
            + _EDGE_WEIGHT * _mean(edges)
            + _CHROMA_WEIGHT * _mean(chroma_structure)
            + _COLOR_WEIGHT * _mean(color)
        )


def limit_size(image: torch.Tensor) -> torch.Tensor:
    """Average an image `[B, C, H, W]` down to 256 x 256 if a side is larger.

    Differs from the published code in the last bits for powers of two: these are halved, which takes half the time and,
    unlike the gradient of an adaptive pooling on a GPU, gives the same bits each time.
    """
    while max(image.shape[2:]) > _WORKING_SIZE and all(
        side % 2 == 0 and side >= 2 * _WORKING_SIZE for side in image.shape[2:]
    ):
        rows = image[..., 0::2, :] + image[..., 1::2, :]
        image = (rows[..., 0::2] + rows[..., 1::2]) * 0.25
    if max(image.shape[2:]) > _WORKING_SIZE:
        image = functional.interpolate(image, size=(_WORKING_SIZE, _WORKING_SIZE), mode="area")
    return image


def _checked(image: torch.Tensor) -> torch.Tensor:
    """Return an image as at least float32."""
    require(image.ndim == 4 and image.shape[1] == 3, "image", "[B, 3, H, W]", list(image.shape))
    require(image.is_floating_point(), "image", "floating point in [-1, 1]", image.dtype)
    require(min(image.shape[2:]) >= _MIN_SIZE, "image", f"at least {_MIN_SIZE} pixels a side", list(image.shape))
    return image.float() if image.dtype in (torch.float16, torch.bfloat16) else image


def _require_batch(image: torch.Tensor, target: torch.Tensor) -> None:
    require(len(target) in (1, len(image)), "image", f"as many as targets, {len(target)}", len(image))


def _num_levels(luma: torch.Tensor) -> int:
    return min(_MAX_LEVELS, (min(luma.shape[2:]) // _COARSEST_SIZE).bit_length())


def _luma_chroma(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return luma `[B, 1, H, W]` and level 1 of the chroma `[B, 2, H // 2, W // 2]`."""
    channels = _luma_chroma_matrix(image.dtype, image.device) @ image.flatten(2)
    channels = channels.unflatten(2, image.shape[2:])
    return channels[:, :1], _reduce(channels[:, 1:])


def _reduce(x: torch.Tensor) -> torch.Tensor:
    """Return means in the window W, `[B, C, H, W]` -> `[B, C, H // 2, W // 2]`; the border is repeated outwards.

    Rows are added as slices, columns by a product with a matrix: three times as fast on a CPU as pooling, and as
    a convolution with strides.
    """
    num_rows = x.shape[2] // 2
    pairs = x[:, :, 0 : 2 * num_rows : 2] + x[:, :, 1 : 2 * num_rows : 2]
    pairs = pairs @ _column_window(x.shape[3], x.dtype, x.device)  # [B, C, H // 2, W // 2]
    above = torch.cat([pairs[:, :, :1], pairs[:, :, :-1]], 2)
    below = torch.cat([pairs[:, :, 1:], pairs[:, :, -1:]], 2)
    return (above + below) * 0.125 + pairs * 0.25


def _next_level(
    level: torch.Tensor, other: torch.Tensor, other_mean: torch.Tensor, other_var: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next level `[B, C, H // 2, W // 2]` and the structure errors `[B, C]` of this one."""
    difference = level - other
    stacked = _reduce(torch.cat([level, level * level, difference * difference], 1))
    mean, square, squared_difference = stacked.chunk(3, 1)
    var_difference = squared_difference - (mean - other_mean) ** 2
    error = structure_error(square - mean * mean, other_var, var_difference, _STRUCTURE_C2)
    return mean, error.mean((2, 3))


def _structure_tensor(luma: torch.Tensor) -> torch.Tensor:
    """Return the three entries of the structure tensor: `[B, 1, H, W]` -> `[B, 3, (H - 1) // 2, (W - 1) // 2]`."""
    falling = luma[..., 1:, 1:] - luma[..., :-1, :-1]
    rising = luma[..., :-1, 1:] - luma[..., 1:, :-1]
    return _reduce(torch.cat([falling * falling, rising * rising, falling * rising], 1))


def _tensor_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return mean relative differences `[B]` of structure tensors by their Frobenius norms."""

    def norm(tensor: torch.Tensor) -> torch.Tensor:
        square = tensor * tensor
        return square[:, 0] + square[:, 1] + 2 * square[:, 2]  # the entry off the diagonal is there twice

    return (norm(x - y) / (norm(x) + norm(y) + _EDGE_C**2)).mean((1, 2))


def _charbonnier(difference: torch.Tensor) -> torch.Tensor:
    """Return the mean of `sqrt(d^2 + eps^2) - eps` `[B]`, in a form that is exactly 0 at 0."""
    square = difference.square().sum(1)
    return (square / ((square + _COLOR_EPS**2).sqrt() + _COLOR_EPS)).mean((1, 2))


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return sum(values) / len(values)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept here is used in training too
def _column_window(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the matrix `[W, W // 2]` that takes a row to its means in the window W."""
    cells = torch.arange(width // 2)
    window = torch.zeros(width, width // 2, dtype=dtype)
    for step, weight in ((-1, 0.125), (0, 0.25), (1, 0.125)):
        source = (cells + step).clamp(0, width // 2 - 1)
        for column in (2 * source, 2 * source + 1):
            window.index_put_((column, cells), torch.tensor(weight, dtype=dtype), accumulate=True)
    return window.to(device)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _luma_chroma_matrix(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return BT.601's Y, Cb, Cr of R, G, B: `[3, 3]`."""
    luma = torch.tensor(_LUMA, dtype=torch.float64)
    blue, red = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    rows = [luma, (blue - luma) / (2 * (1 - luma[2])), (red - luma) / (2 * (1 - luma[0]))]
    return torch.stack(rows).to(device, dtype)


def load_script(file: str | BinaryIO, source: str, device: torch.device | str) -> torch.jit.ScriptModule:
    """Load a TorchScript program for use without gradients of its weights.

    Args:
        file: path, or an open file.
        source: what messages call it.
        device: where to put it.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch >= 2.9 deprecates the format; the published network is in it.
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.jit.load(file, map_location=device)
    except RuntimeError as error:
        reason = last_line(error).partition(". ")[0]  # what comes then is about bugs in PyTorch
        raise ValueError(f"{source}: expected a TorchScript file, got another one: {reason}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _file_name(source: str) -> str:
    """Return the last part of a path, or of the path of a URL."""
    if "://" in source:
        source = urllib.parse.unquote(urllib.parse.urlsplit(source).path)
    return os.path.basename(source)


def last_line(error: BaseException) -> str:
    """Return the line of a long message of TorchScript that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
