"""Write a pack and a trace in the present format versions, for ``tests/test_format_versions.py``.

Run ``python tests/format_versions/record.py`` after the version of a format has changed. Existing files stay: they
prove that files of released versions can still be opened.
"""

import json
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tiny_checkpoints import GEOMETRIES, write_checkpoint  # noqa: E402  # a module of the tests

import flashmoe_mlx  # noqa: E402
from flashmoe_mlx.formats.trace import RoutingTrace  # noqa: E402
from flashmoe_mlx.pack.writer import pack_checkpoint  # noqa: E402

TOKENS = [5, 17, 3, 5, 60, 41]
SMALL = replace(
    GEOMETRIES["tied"],
    layer_types="LF",
    hidden_size=64,
    vocab_size=64,
    heads=2,
    key_heads=1,
    value_heads=1,
    head_dim=32,
    value_dim=32,
    experts=4,
    expert_size=64,
    group_size=32,
)
BITS: list[list[Any]] = [[4, 2], [{"gate": 3, "up": 3, "down": 4, "0": 8}]]


def main() -> None:
    """Write the files that do not exist yet."""
    expected = {}
    with tempfile.TemporaryDirectory() as temporary:
        source = write_checkpoint(Path(temporary) / "source", SMALL, 0, "fused", dtype="BF16")
        for bits in BITS:
            folder = pack_checkpoint(source, Path(temporary) / f"pack-{len(bits)}", bits).folder
            name = f"pack-{json.loads((folder / 'pack.json').read_text())['format_version']}"
            archive = HERE / f"{name}.tar.xz"
            if archive.exists():
                continue
            with tarfile.open(archive, "w:xz") as file:
                file.add(folder, name)
            with flashmoe_mlx.load(folder, kernels="reference") as engine:
                expected[name] = np.round(engine.logits(TOKENS)[-1].astype(float), 5).tolist()
    choices = np.array([[[3, 1], [0, 2]], [[2, 0], [1, 3]], [[1, 0], [3, 2]]], np.uint16)
    written = HERE / "written.moetrace"
    RoutingTrace(choices, num_experts=4, prompt_tokens=2, model="tiny", prompt_xxh3="0" * 16).save(written)
    path = HERE / f"trace-{written.read_bytes()[8]}.moetrace"  # the version follows eight bytes of magic
    if path.exists():
        written.unlink()
    else:
        written.rename(path)
        expected[path.stem] = choices.tolist()
    known = HERE / "expected.json"
    earlier = json.loads(known.read_text()) if known.exists() else {}
    known.write_text(json.dumps({**earlier, **expected}) + "\n")


if __name__ == "__main__":
    main()
