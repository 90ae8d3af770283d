"""Convert a published snapshot to a safetensors file, which holds nothing but tensors and a JSON configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import click

from dnnlib import cli
from dnnlib.sources import resolve_demo
from dnnlib.util import file_sha256, open_url, source_name
from inference.output import prepare_outputs
from legacy import load_network_pkl
from training.network_difference import is_difference, read_difference
from training.snapshots import NETWORK_NAMES, save_networks


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION", type=click.Path(dir_okay=False, path_type=Path))
@cli.option(
    "--networks",
    type=click.Choice(NETWORK_NAMES),
    multiple=True,
    help="Networks to keep; may be repeated. G_ema is enough for images.  [default: all]",
)
@cli.option("--half", is_flag=True, help="Round weights to float16: half the size, nearly the same pictures.")
@cli.option("--overwrite", is_flag=True, help="Replace DESTINATION if it is there already.")
@cli.cli_errors()
def convert(source: str, destination: Path, networks: tuple[str, ...], half: bool, overwrite: bool) -> None:
    """Convert SOURCE (a path, an http(s) URL, hf://org/repo/file or demo) to DESTINATION, a .safetensors file.

    Nothing in SOURCE is executed. A difference from a base network becomes a whole network. Converting does not change
    the licence of the weights.

    \b
    Examples:
        python convert_checkpoint.py spherehead.pkl spherehead.safetensors
        python convert_checkpoint.py spherehead.pkl small.safetensors --networks G_ema --half
    """
    if destination.suffix != ".safetensors":
        raise click.BadParameter(f"expected a name that ends in .safetensors, got {destination}")
    prepare_outputs([destination], overwrite)
    location = resolve_demo(source)
    with open_url(location) as file:
        provenance = _provenance(source, file)
        snapshot = load_network_pkl(file, only=networks or None, location=location)
    found = {name: snapshot[name] for name in networks or NETWORK_NAMES if snapshot[name] is not None}
    missing = [name for name in networks if name not in found]
    if missing or not found:
        raise click.ClickException(f"{source}: expected {', '.join(missing or NETWORK_NAMES)}, but it has none")
    if half:
        provenance["rounded_to"] = "float16"
    save_networks(destination, found, provenance, half=half)
    size_mb = destination.stat().st_size / 1e6
    rounded = ", rounded to float16" if half else ""
    click.echo(f"wrote {', '.join(found)} to {destination} ({size_mb:.1f} MB{rounded})")


def _provenance(source: str, file: BinaryIO) -> dict[str, Any]:
    """Say where weights come from; the file is read, and put back to its start."""
    provenance = {"converted_from": source_name(source), "source_sha256": file_sha256(file)}
    file.seek(0)
    if is_difference(file):
        header = read_difference(file, source).header
        base = {"name": source_name(header.base.source), "fingerprint": header.base.fingerprint}
        provenance |= {"base": base, "difference": header.provenance}
        file.seek(0)
    return provenance


if __name__ == "__main__":
    convert()
