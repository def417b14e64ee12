"""What the commands that turn images into shards share, whatever the images are read from."""

import argparse
from pathlib import Path

from senet_transfer.data.images.listing import Images
from senet_transfer.data.shards.verify import verify
from senet_transfer.data.shards.write import convert


def shards_parser(description: str, *, source: str) -> argparse.ArgumentParser:
    """A command line with the arguments that all of them have.

    Args:
        description: what the command does.
        source: what ``--source`` names.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help=source)
    add("--output", type=Path, required=True, help="folder for the shards, one for each split")
    add("--seed", type=int, default=0, help="of the global shuffle")
    add("--workers", type=int, default=2, help="processes")
    add("--shard-mb", type=float, default=200, help="about the size of a shard")
    add("--skip-broken", type=int, default=0, help="leave out and record this many bad images")
    add("--verify", action="store_true", help="read all back and compare, after")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def prepare_shards(images: Images, split: str, args: argparse.Namespace) -> None:
    """Converts images as the arguments of :func:`shards_parser` say, and tells what was made.

    Args:
        images: what to convert.
        split: begins the shards' names.
        args: as parsed.

    Raises:
        UserError: see :func:`~senet_transfer.data.shards.write.convert` and
            :func:`~senet_transfer.data.shards.verify.verify`.
    """
    manifest = convert(
        images,
        args.output,
        split=split,
        seed=args.seed,
        shard_mb=args.shard_mb,
        workers=args.workers,
        skip_broken=args.skip_broken,
        quiet=args.quiet,
    )
    print(f"{args.output}: {manifest.samples} images in {len(manifest.shards)} shards")
    if manifest.skipped:
        print(f"left out {len(manifest.skipped)} bad images; manifest.json names them")
    if args.verify:
        verify(args.output, workers=args.workers, quiet=args.quiet)
