"""``python -m flashmoe_mlx``: hand the command line to Hydra, and every error to a person in a line or two."""

import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

_NO_MLX = (
    "MLX has no library for this machine: pip install 'flashmoe_mlx[cpu]', or with an NVIDIA GPU 'flashmoe_mlx[cuda]'"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for a mistake in the request, 1 for a failure, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may say what a terminal's encoding cannot
    try:
        import_module("mlx.core")
    except ImportError as error:
        print(f"flashmoe_mlx: {_NO_MLX} ({error})", file=sys.stderr)
        return 1
    try:
        from flashmoe_mlx.application import run

        return run(arguments)
    except KeyboardInterrupt:
        print("flashmoe_mlx: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
