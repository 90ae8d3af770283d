"""Convert a published snapshot to a safetensors file, which holds nothing but tensors and a JSON configuration."""

from __future__ import annotations

from pathlib import Path

import click

from dnnlib import cli
from dnnlib.util import file_sha256, open_url, source_name
from inference.output import prepare_outputs
from legacy import load_network_pkl
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
@cli.option("--overwrite", is_flag=True, help="Replace DESTINATION if it is there already.")
@cli.cli_errors()
def convert(source: str, destination: Path, networks: tuple[str, ...], overwrite: bool) -> None:
    """Convert SOURCE (a path, an http(s) URL or hf://org/repo/file) to DESTINATION, a .safetensors file.

    Nothing in SOURCE is executed. Converting does not change the licence of the weights.

    \b
    Examples:
        python convert_checkpoint.py spherehead.pkl spherehead.safetensors
        python convert_checkpoint.py spherehead.pkl small.safetensors --networks G_ema
    """
    if destination.suffix != ".safetensors":
        raise click.BadParameter(f"expected a name that ends in .safetensors, got {destination}")
    prepare_outputs([destination], overwrite)
    with open_url(source) as file:
        sha256 = file_sha256(file)
        file.seek(0)
        snapshot = load_network_pkl(file, only=networks or None)
    found = {name: snapshot[name] for name in networks or NETWORK_NAMES if snapshot[name] is not None}
    missing = [name for name in networks if name not in found]
    if missing or not found:
        raise click.ClickException(f"{source}: expected {', '.join(missing or NETWORK_NAMES)}, but it has none")
    save_networks(destination, found, {"converted_from": source_name(source), "source_sha256": sha256})
    size_mb = destination.stat().st_size / 1e6
    click.echo(f"wrote {', '.join(found)} to {destination} ({size_mb:.1f} MB)")


if __name__ == "__main__":
    convert()
