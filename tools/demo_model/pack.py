"""Make the files of the package from a trained checkpoint: the pack and the held-out set.

    python tools/demo_model/pack.py CHECKPOINT flashmoe_mlx/made_models/demo_model

Only flashmoe_mlx is needed. README.md and LICENSE in the target are kept.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from corpus import Corpus
from documents import item

from flashmoe_mlx.made_models.byte_tokenizer import CHAT_TEMPLATE
from flashmoe_mlx.pack.writer import pack_checkpoint

_KEPT = ("README.md", "LICENSE")
_PUBLISHED = ("*.safetensors", "*.json")


def main() -> None:
    """Write the pack and the held-out set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.target.parent) as scratch:
        checkpoint, pack = Path(scratch) / "flashmoe-demo", Path(scratch) / "pack"
        checkpoint.mkdir()
        for pattern in _PUBLISHED:
            for path in arguments.checkpoint.glob(pattern):
                shutil.copy(path, checkpoint)
        (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        # Not groups of 64: MLX 0.32.4 on CUDA computes wrong results for 64 columns (the down projections) with them.
        pack_checkpoint(checkpoint, pack, (4,), group_size=32, resident_bits=8)
        with (pack / "held_out.jsonl").open("w") as file:
            for document in Corpus(arguments.seed).held_out:
                file.write(json.dumps(item(document)) + "\n")
        for name in _KEPT:
            if (arguments.target / name).exists():
                shutil.copy(arguments.target / name, pack)
        if arguments.target.exists():
            shutil.rmtree(arguments.target)
        pack.rename(arguments.target)


if __name__ == "__main__":
    main()
