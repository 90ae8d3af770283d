"""Training states: everything that a run needs to go on as if it had not been interrupted, in one file.

There is no state of random number generators: a run draws from generators that are seeded anew for every step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from torch_utils.tensor_file import TensorFile, check_tensor_file, open_tensor_file, write_tensor_file

KIND = "spherehead-training-state"
_STATE_NAME = re.compile(r"state-(\d{9,})\.safetensors")
_TEMP_NAME = re.compile(r"\.state-\d{9,}\.(\d+)-[0-9a-f]+\.tmp\.safetensors")
_SEPARATOR = "/"  # between object, parameter and entry; names of parameters have dots
_PARAMETERS = "parameters"  # of an optimiser, in order
_FIRST_MOMENT = "exp_avg"  # of Adam


@runtime_checkable
class Stateful(Protocol):
    """An object with a state of tensors and JSON data; `load_state_dict` must copy tensors that it keeps."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return tensors and JSON data by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over such a state."""


Objects = Mapping[str, nn.Module | torch.optim.Optimizer | Stateful | dict[str, Any]]


# ---- files of a run -------------------------------------------------------------------------------------------------


def state_path(run_dir: str | Path, cur_nimg: int) -> Path:
    """Return the file of the state after `cur_nimg` images."""
    return Path(run_dir) / f"state-{cur_nimg:09d}.safetensors"


def list_states(run_dir: str | Path) -> list[Path]:
    """Return the states of a run, the one with the most images first; they may be damaged."""
    run_dir = Path(run_dir)
    paths = [path for path in run_dir.iterdir() if is_state(path)] if run_dir.is_dir() else []
    return sorted(paths, key=state_nimg, reverse=True)


def is_state(path: str | Path) -> bool:
    """Return whether a file has the name of a training state."""
    return _STATE_NAME.fullmatch(Path(path).name) is not None


def state_nimg(path: str | Path) -> int:
    """Return how many images a state was written after, by its name.

    Raises:
        ValueError: this is not the name of a state.
    """
    match = _STATE_NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path}: expected a training state, state-<images>.safetensors")
    return int(match[1])


def newest_state(run_dir: str | Path, report: Callable[[str], Any] = print) -> Path | None:
    """Return the whole state with the most images; None where there is none.

    Damaged files are passed over. Left-overs of interrupted saves are removed.

    Args:
        run_dir: folder of the run.
        report: takes one line for each file that is passed over, with the reason.
    """
    remove_stale_temps(run_dir)
    for path in list_states(run_dir):
        try:
            check_tensor_file(path, KIND)
        except (ValueError, OSError) as error:
            report(f"{path}: not used: {error}")
        else:
            return path
    return None


def prune_states(run_dir: str | Path, keep: int) -> list[Path]:
    """Remove all but the `keep` states that were written last; returns what was removed.

    The time of writing decides, not the number of images: a run that went on from an older state must not lose what it
    writes to a newer, damaged one. Files with a damaged header or of a wrong length do not count, and stay.
    """
    if keep < 1:
        raise ValueError(f"states to keep: expected at least 1, got {keep}")
    whole = []
    for path in list_states(run_dir):
        with contextlib.suppress(ValueError, OSError):
            check_tensor_file(path, KIND, checksum=False)
            whole.append((path.stat().st_mtime_ns, path.name, path))
    removed = [path for _, _, path in sorted(whole, reverse=True)[keep:]]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def remove_stale_temps(run_dir: str | Path) -> list[Path]:
    """Remove temporary files of saves whose process is gone, or is this one (which is not saving); returns them."""
    run_dir = Path(run_dir)
    removed = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        match = _TEMP_NAME.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# ---- saving and loading ---------------------------------------------------------------------------------------------


def save_state(run_dir: str | Path, cur_nimg: int, objects: Objects, header: Mapping[str, Any] | None = None) -> Path:
    """Write the state of a run to one file, which appears whole or not at all.

    Besides the objects themselves, one tensor at a time is held in memory. Only one process of a run calls it.

    Args:
        run_dir: folder of the run.
        cur_nimg: images so far.
        objects: by name: modules, optimisers (all of whose parameters are in these modules), objects with `state_dict`
            and `load_state_dict` (such as `Collector`), and dicts of JSON data (counters).
        header: JSON data, which `load_state` returns.

    Returns:
        the file, `state-<cur_nimg, nine digits>.safetensors`.

    Raises:
        ValueError: something cannot be saved.
        OSError: the file cannot be written, for example because the disk is full; older states stay as they are.
    """
    if cur_nimg < 0:
        raise ValueError(f"cur_nimg: expected 0 or more images, got {cur_nimg}")
    path = state_path(run_dir, cur_nimg)
    remove_stale_temps(run_dir)
    tensors: dict[str, torch.Tensor] = {}
    described = {}
    parameter_names = _parameter_names(objects)
    for name, thing in objects.items():
        if _SEPARATOR in name:
            raise ValueError(f"object '{name}': expected a name without '{_SEPARATOR}'")
        own, data = _take_apart(name, thing, parameter_names)
        _require_json(name, data)
        tensors.update({name + _SEPARATOR + key: tensor for key, tensor in own.items()})
        described[name] = {"kind": _kind(thing), "data": data}
    contents = {"cur_nimg": int(cur_nimg), "header": dict(header or {}), "objects": described}
    _require_json("header", contents["header"])
    try:
        write_tensor_file(path, KIND, tensors, contents)
    except OSError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OSError(error.errno, _why_not_written(path, size, error)) from error
    return path


def _why_not_written(path: Path, size: int, error: OSError) -> str:
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free / 1e6:,.0f} MB"
    return (
        f"{path}: the training state of {size / 1e6:,.0f} MB could not be written ({error.strerror or error}; free "
        f"space: {free}); older states are as they were"
    )


def load_state(path: str | Path, objects: Objects) -> dict[str, Any]:
    """Fill objects from a file of `save_state`, bit for bit; nothing is changed unless everything fits.

    Hyperparameters of optimisers (learning rates, betas) are not part of a state: they stay as the optimisers have
    them, from the configuration.

    Args:
        path: of the file.
        objects: of the same names and kinds as were saved. Modules must have exactly the tensors of the file, with the
            same shapes and dtypes; they keep their devices and memory layouts.

    Returns:
        the header, with `cur_nimg` added.

    Raises:
        ValueError: the file is damaged, or does not belong to these objects; the message names the difference.
        OSError: it cannot be read.
    """
    try:
        with open_tensor_file(path, KIND) as file:
            described = file.header["objects"]
            kinds = {name: _kind(thing) for name, thing in objects.items()}
            _require_equal("objects", kinds, {name: entry["kind"] for name, entry in described.items()})
            parameter_names = _parameter_names(objects)
            # Objects that check their states themselves come first, while nothing else has changed.
            fills = [
                _plan_fill(file, name, thing, described[name]["data"], parameter_names)
                for name, thing in sorted(objects.items(), key=lambda item: kinds[item[0]] != "stateful")
            ]
            for fill in fills:
                fill()
            return {**file.header["header"], "cur_nimg": file.header["cur_nimg"]}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _kind(thing: Any) -> str:
    if isinstance(thing, nn.Module):
        return "module"
    if isinstance(thing, torch.optim.Optimizer):
        return "optimizer"
    return "json" if isinstance(thing, dict) else "stateful"


def _parameter_names(objects: Objects) -> dict[int, str]:
    """Return identity of a parameter -> object and name, for example 'G.decoder.net.0.weight'."""
    modules = {name: thing for name, thing in objects.items() if isinstance(thing, nn.Module)}
    return {id(p): f"{name}.{key}" for name, module in modules.items() for key, p in module.named_parameters()}


def _take_apart(name: str, thing: Any, parameter_names: dict[int, str]) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors and the JSON data of an object."""
    kind = _kind(thing)
    if kind == "json":
        return {}, thing
    state, data = {}, {}
    if kind == "optimizer":
        named = _named_parameters(name, thing, parameter_names)
        data[_PARAMETERS] = list(named)
        forgetful = _without_first_moment(thing)
        for key, parameter in named.items():
            entries = thing.state.get(parameter, {})
            left_out = {_FIRST_MOMENT} if id(parameter) in forgetful else set()
            state.update(
                {f"{key}{_SEPARATOR}{entry}": value for entry, value in entries.items() if entry not in left_out}
            )
    else:
        state = thing.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    data.update({key: value for key, value in state.items() if key not in tensors})
    if kind == "module" and data:
        raise ValueError(f"module '{name}': expected tensors alone in its state, got '{next(iter(data))}'")
    return tensors, data


def _require_json(name: str, data: Any) -> None:
    try:
        exact = json.loads(json.dumps(data, allow_nan=False)) == data
    except (TypeError, ValueError, RecursionError):
        exact = False
    if not exact:
        raise ValueError(f"'{name}': expected finite JSON data (no tuples, keys that are strings), got {data!r:.200}")


def _named_parameters(
    name: str, optimizer: torch.optim.Optimizer, parameter_names: dict[int, str]
) -> dict[str, nn.Parameter]:
    named = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in parameter_names:
                raise ValueError(
                    f"optimiser '{name}': expected parameters of the modules that are saved with it, got one of shape "
                    f"{tuple(parameter.shape)} of another module"
                )
            named[parameter_names[id(parameter)]] = parameter
    return named


# ---- filling, in two passes: first everything is checked, then everything is copied ---------------------------------


def _plan_fill(
    file: TensorFile, name: str, thing: Any, data: dict[str, Any], parameter_names: dict[int, str]
) -> Callable[[], None]:
    """Check that a part of the file fits an object; return what fills the object."""
    keys = [key.partition(_SEPARATOR)[2] for key in file.specs if key.partition(_SEPARATOR)[0] == name]
    if isinstance(thing, nn.Module):
        return _plan_module(file, name, thing, keys)
    if isinstance(thing, torch.optim.Optimizer):
        return _plan_optimizer(file, name, thing, keys, data, parameter_names)
    if isinstance(thing, dict):
        return lambda: (thing.clear(), thing.update(data))
    return lambda: thing.load_state_dict({**data, **{key: file.read(name + _SEPARATOR + key) for key in keys}})


def _plan_module(file: TensorFile, name: str, module: nn.Module, keys: list[str]) -> Callable[[], None]:
    targets = module.state_dict()
    specs = {key: file.specs[name + _SEPARATOR + key] for key in keys}
    _require_equal(name, {key: (t.dtype, tuple(t.shape)) for key, t in targets.items()}, specs)

    @torch.no_grad()
    def fill() -> None:
        for key, target in targets.items():
            target.copy_(file.read(name + _SEPARATOR + key))

    return fill


def _plan_optimizer(
    file: TensorFile,
    name: str,
    optimizer: torch.optim.Optimizer,
    keys: list[str],
    data: dict[str, Any],
    parameter_names: dict[int, str],
) -> Callable[[], None]:
    named = _named_parameters(name, optimizer, parameter_names)
    saved = data.pop(_PARAMETERS)
    _require_equal(name, dict.fromkeys(named, "a parameter"), dict.fromkeys(saved, "a parameter"))
    for key in keys:
        parameter = named[key.partition(_SEPARATOR)[0]]
        shape = file.specs[name + _SEPARATOR + key][1]
        if shape not in ((), tuple(parameter.shape)):
            raise ValueError(f"{name}: '{key}': expected shape {tuple(parameter.shape)}, got {shape}")

    def fill() -> None:
        on_device = _counters_on_device(optimizer)
        optimizer.state.clear()
        for key in keys:
            parameter_name, _, entry = key.partition(_SEPARATOR)
            parameter = named[parameter_name]
            value = file.read(name + _SEPARATOR + key)
            if entry == "step" or value.shape != parameter.shape:
                value = value.to(parameter.device if id(parameter) in on_device else "cpu", copy=True)
            else:  # where and how the optimiser would have made it: channels-last like its parameter
                value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            optimizer.state[parameter][entry] = value
        for key, value in data.items():
            parameter_name, _, entry = key.partition(_SEPARATOR)
            optimizer.state[named[parameter_name]][entry] = value
        forgetful = _without_first_moment(optimizer)
        for parameter, entries in optimizer.state.items():
            if id(parameter) in forgetful:
                entries.setdefault(_FIRST_MOMENT, torch.zeros_like(parameter, requires_grad=False))

    return fill


def _without_first_moment(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of the parameters of Adam whose first moment is overwritten by every step (beta1 = 0)."""
    if not isinstance(optimizer, torch.optim.Adam):
        return set()
    groups = [group for group in optimizer.param_groups if group["betas"][0] == 0]
    return {id(parameter) for group in groups for parameter in group["params"]}


def _counters_on_device(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of the parameters whose step counters are on their devices, as fused Adam wants them."""
    groups = [group for group in optimizer.param_groups if group.get("capturable") or group.get("fused")]
    return {id(parameter) for group in groups for parameter in group["params"]}


def _require_equal(what: str, expected: Mapping[str, Any], came: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first entry by which two mappings differ."""
    for key in [*expected, *came]:
        if expected.get(key) != came.get(key):
            here, there = (str(side[key]) if key in side else "nothing" for side in (expected, came))
            raise ValueError(f"{what}: '{key}': expected {here}, got {there}")
