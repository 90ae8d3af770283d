"""Detectors that are TorchScript files: where they are found, how images are prepared for them, what they return.

TorchScript runs no Python, but it is a program: use files from sources that you trust. The published detectors exist in
another form too, as pickles, which may do anything when they are unpickled; here those are read as data, and used where
a TorchScript archive is in them.

A file may have a suffix that says how it wants its images, such as `my.pt?input=imagenet&size=224&resize=bicubic`:

- `input`: `uint8` (0...255, as float; the default), `unit` (0...1), `symmetric` (-1...1), `imagenet` (0...1, minus the
  mean of ImageNet, over its standard deviation) or `clip` (the same with those of CLIP);
- `size`: side in pixels to which images are resized, or `none`, the default;
- `resize`: the filter, `bicubic` (the default) or `bilinear`, both antialiased, or `area`.

A URL may end in `#sha256=<hex>`, after the suffix.
"""

from __future__ import annotations

import hashlib
import io
import os
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.nn import functional

from dnnlib.sources import file_name, url_scheme, without_credentials
from dnnlib.util import file_sha256, open_url
from metrics.detector_interface import DetectorContext, DetectorInfo, check_request, detection
from metrics.requests import Output
from torch_utils import distributed
from torch_utils.safe_pickle import PickledObject, PickleReadError, read_pickle
from training.config import require
from training.perceptual import last_line, load_script

FOLDER_VARIABLE = "SPHEREHEAD_DETECTORS"
BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / "models" / "detectors"
_PUBLISHED_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
_NUM_ATTEMPTS = 3
_ZIP_START = b"PK\x03\x04"
_INPUTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {  # mean and standard deviation of 0...1
    "bytes": None,  # as they are; the published programs convert them
    "uint8": ((0.0,) * 3, (1 / 255,) * 3),
    "unit": ((0.0,) * 3, (1.0,) * 3),
    "symmetric": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_FILTERS = {"bicubic": "bicubic, antialiased", "bilinear": "bilinear, antialiased", "area": "area average"}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How images are prepared for a network."""

    input: str = "uint8"
    size: int | None = None
    resize: str = "bicubic"

    @property
    def filter_name(self) -> str:
        """What results say about it."""
        return "none" if self.size is None else f"{_FILTERS[self.resize]}, to {self.size}"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 `[B, 3, size, size]` of bytes `[B, 3, H, W]`; the bytes themselves for the input `bytes`."""
        if _INPUTS[self.input] is None:
            return images
        x = images.float()
        if self.size is not None and tuple(x.shape[2:]) != (self.size, self.size):
            size = (self.size, self.size)
            if self.resize == "area":
                x = functional.interpolate(x, size, mode="area")
            else:
                x = functional.interpolate(x, size, mode=self.resize, align_corners=False, antialias=True)
                x = x.clamp(0, 255)  # bicubic overshoots; images do not
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in _INPUTS[self.input])
        return (x / 255 - mean) / std


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """Where a network comes from and how it is used."""

    name: str
    """For results: a known name, or that of the file."""
    files: tuple[str, ...]
    """Paths or URLs to try, in this order; names without a folder are looked for in the folders of detectors."""
    url: str | None = None
    """Fetched where none of the files is there."""
    preparation: Preparation = Preparation()
    resize: str | None = None
    """What results say about resizing; None is what the preparation does."""
    calls: tuple[tuple[Output, tuple[str, ...]], ...] = (("features", ()),)
    """Outputs, with the arguments that are True in the call for each."""
    where_from: str = ""
    """How to get the file; added to the message that it is not there."""


KNOWN = {
    "inception": NetworkSource(
        name="inception",
        files=("inception-2015-12-05.pt", "inception-2015-12-05.pkl"),
        url=_PUBLISHED_URL + "inception-2015-12-05.pt",
        preparation=Preparation(input="bytes"),
        resize="in the network",
        calls=(("features", ("return_features",)), ("probabilities", ("no_output_bias",))),
    ),
    "vgg16": NetworkSource(
        name="vgg16",
        files=("vgg16.pt", "vgg16.pkl"),
        url=_PUBLISHED_URL + "vgg16.pt",
        preparation=Preparation(input="bytes"),
        resize="in the network",
        calls=(("features", ("return_features",)),),
    ),
    "dinov2": NetworkSource(
        name="dinov2",
        files=("dinov2.pt",),
        preparation=Preparation(input="imagenet", size=224),
        where_from=(
            "Make it once, in Python: model = torch.hub.load('facebookresearch/dinov2', 'dinov2_vitl14').eval(); "
            "torch.jit.trace(model, torch.zeros(2, 3, 224, 224)).save('dinov2.pt')"
        ),
    ),
}


class FileNetwork:
    """A TorchScript program with its preparation of images.

    Args:
        source: where it comes from.
        context: its device; the size of the images of its data set.
        kind: what messages call it.

    Raises:
        ValueError: the file is of another kind.
        OSError: it is not there and cannot be fetched.
    """

    def __init__(self, source: NetworkSource, context: DetectorContext, kind: str = "detector") -> None:
        self._source, self._kind, self._context = source, kind, context
        path, self._shown = _find_together(source, kind, context.progress)
        self._sha256 = file_sha256(path)
        self._network = load_script(open_program(path, self._shown), self._shown, context.device)
        parts = (self._sha256, source.preparation, source.calls)
        self.key = hashlib.sha256(repr(parts).encode()).hexdigest()

    def info(self) -> DetectorInfo:
        """Return what results say about it."""
        source = self._source
        return DetectorInfo(
            name=source.name,
            resize=source.resize or source.preparation.filter_name,
            sha256=self._sha256,
            source=self._shown,
        )

    def sample_images(self) -> torch.Tensor:
        """Return two grey images of the size of those of the data set, to see whether the network takes them."""
        size = self._context.dataset.resolution
        return torch.full((2, 3, size, size), 128, dtype=torch.uint8, device=self._context.device)

    def __call__(self, images: torch.Tensor, flags: tuple[str, ...] = ()) -> object:
        """Return what the program returns for bytes `[B, 3, H, W]`, with these arguments True.

        Raises:
            ValueError: it failed; the message has its reason.
        """
        try:
            with torch.jit.optimized_execution(False):  # the profiling executor changes bits after a few calls
                return self._network(self._source.preparation(images), **dict.fromkeys(flags, True))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            arguments = "".join(f", {flag}=True" for flag in flags)
            raise ValueError(
                f"{self._kind} {self._shown}: expected a network that takes (images{arguments}), got an error: "
                f"{last_line(error)}"
            ) from error


class FileDetector:
    """A detector that is a TorchScript file; arguments and errors as for `FileNetwork`."""

    def __init__(self, source: NetworkSource, context: DetectorContext) -> None:
        self._network = FileNetwork(source, context)
        self._calls = dict(source.calls)
        self.outputs: frozenset[Output] = frozenset(self._calls)
        self.key, self.info = self._network.key, self._network.info()
        for output in self._calls:  # an error now, and not after an hour of rendering
            self(self._network.sample_images(), output)

    def __call__(self, images: torch.Tensor, output: Output) -> torch.Tensor:
        """Return the output for each image, see `metrics.detectors.Detector`."""
        check_request(self, images, output)
        with detection():
            rows = self._network(images, self._calls[output])
        fits = isinstance(rows, torch.Tensor) and rows.shape[:1] == images.shape[:1] and rows.ndim >= 2
        fits = fits and rows.numel() == rows.shape[0] * rows.shape[1] and rows.is_floating_point()
        came = list(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        require(fits, f"detector {self.info.source}, {output}", f"floats [{len(images)}, F]", came)
        return rows.flatten(1).float()


def parse_source(spec: str) -> NetworkSource:
    """Return the source that a name, path or URL with its suffix means.

    >>> parse_source("a/my.pt?size=224&input=unit").preparation
    Preparation(input='unit', size=224, resize='bicubic')

    Raises:
        ValueError: an unknown option or value in the suffix.
    """
    if spec in KNOWN:
        return KNOWN[spec]
    options: dict[str, str] = {}
    location, fragment = spec, ""
    if url_scheme(spec) or not os.path.exists(spec):
        location, hash_mark, fragment = spec.partition("#") if url_scheme(spec) else (spec, "", "")
        location, _, query = location.partition("?")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        known = {name: value for name, value in pairs if name in ("input", "size", "resize")}
        others = [pair for pair in pairs if pair[0] not in known]
        if others and not url_scheme(spec):
            raise ValueError(f"{spec}: expected the options input, size and resize, got {others[0][0]!r}")
        location += f"?{urllib.parse.urlencode(others)}" if others else ""
        location += hash_mark + fragment
        options = known
    name = file_name(location.partition("#")[0]) or location
    return NetworkSource(name=name, files=(location,), preparation=_preparation(spec, options))


def _preparation(spec: str, options: dict[str, str]) -> Preparation:
    values = {"input": "uint8", "size": "none", "resize": "bicubic", **options}
    inputs = [name for name in _INPUTS if name != "bytes"]
    require(values["input"] in inputs, f"{spec}, input", f"one of {', '.join(inputs)}", values["input"])
    require(values["resize"] in _FILTERS, f"{spec}, resize", f"one of {', '.join(_FILTERS)}", values["resize"])
    size = values["size"]
    fits = size == "none" or (size.isascii() and size.isdecimal() and 1 <= int(size) <= 4096)
    require(fits, f"{spec}, size", "pixels from 1 to 4096, or none", size)
    return Preparation(input=values["input"], size=None if size == "none" else int(size), resize=values["resize"])


def folders() -> list[Path]:
    """Return where files without a folder are looked for: the one of `SPHEREHEAD_DETECTORS`, `models/detectors`."""
    named = os.environ.get(FOLDER_VARIABLE)
    return ([Path(named).expanduser()] if named else []) + [BUNDLED_FOLDER]


def _find_together(source: NetworkSource, kind: str, verbose: bool) -> tuple[str, str]:
    """Find a file on all ranks; rank 0 comes first, so that only it fetches where ranks share a disk."""
    found = None
    if distributed.is_main():
        with distributed.long_task(f"fetching {kind} {source.name}"):
            found = find_file(source, kind, verbose)
    distributed.barrier()
    return found or find_file(source, kind, verbose=False)


def find_file(source: NetworkSource, kind: str = "detector", verbose: bool = False) -> tuple[str, str]:
    """Return the local path of a network, fetched where needed, and what messages call it.

    Raises:
        OSError: it is not there and cannot be fetched; the message says from where to get it and where to put it.
        ValueError: bytes of another checksum than asked for.
    """
    for file in source.files:
        if url_scheme(file):
            path = open_url(file, num_attempts=_NUM_ATTEMPTS, verbose=verbose, return_filename=True)
            return path, without_credentials(file)
        places = [] if source.name in KNOWN else [Path(file)]
        places += [] if os.path.dirname(file) else [folder / file for folder in folders()]
        for place in places:
            if place.is_file():
                return str(place), str(place)
    if source.url is None:
        raise FileNotFoundError(_absent(source, kind, ""))
    try:
        return open_url(source.url, num_attempts=_NUM_ATTEMPTS, verbose=verbose, return_filename=True), source.url
    except OSError as error:
        raise FileNotFoundError(_absent(source, kind, f", and it cannot be fetched: {error}")) from error


def _absent(source: NetworkSource, kind: str, reason: str) -> str:
    name = source.files[0]
    if source.name not in KNOWN:
        names = f"; known names are view, {', '.join(KNOWN)}" if kind == "detector" else ""
        return f"{kind} {name}: no such file{names}"
    looked = ", ".join(str(folder / file) for folder in folders() for file in source.files)
    get = f" Get {source.url} where there is a network." if source.url else f" {source.where_from}."
    put = f" Put it to {BUNDLED_FOLDER / name}, or into a folder that the variable {FOLDER_VARIABLE} names."
    return f"{kind} {source.name}: none of {looked} is there{reason}.{get}{put}"


def open_program(path: str, shown: str) -> str | BinaryIO:
    """Return a TorchScript file as it is, or the TorchScript archive in a pickle, which is read without executing it.

    Raises:
        ValueError: a pickle without such an archive, or one with classes that are not read.
    """
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":  # how pickles begin
            return path
        file.seek(0)
        try:
            root = read_pickle(file, source=shown)
        except PickleReadError as error:
            raise ValueError(_unreadable(shown, str(error))) from error
    archives = {data for data in _byte_strings(root) if _is_torchscript(data)}
    if len(archives) != 1:
        raise ValueError(_unreadable(shown, f"expected one TorchScript archive in it, came {len(archives)}"))
    return io.BytesIO(archives.pop())


def _unreadable(shown: str, reason: str) -> str:
    stem = Path(file_name(shown.partition("#")[0]) or shown).stem
    return (
        f"{shown}: this pickle cannot be used without executing what is in it ({reason}). Use the TorchScript file "
        f"instead, for the published detectors {_PUBLISHED_URL}{stem}.pt"
    )


def _byte_strings(root: object) -> Iterator[bytes]:
    """Yield all byte strings of what `read_pickle` returned; it may have cycles."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if isinstance(node, bytes | bytearray):
            yield bytes(node)
        elif isinstance(node, torch.Tensor) and node.dtype == torch.uint8:
            yield node.numpy().tobytes()
        elif isinstance(node, dict | list | tuple | set | PickledObject) and id(node) not in seen:
            seen.add(id(node))
            children = node.state if isinstance(node, PickledObject) else node
            pending += children.values() if isinstance(children, dict) else children


def _is_torchscript(data: bytes) -> bool:
    if not data.startswith(_ZIP_START):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
