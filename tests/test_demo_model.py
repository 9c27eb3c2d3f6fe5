"""The demo model: answers, size, loading time, variants in the cache, and the corpus."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest

from flashmoe_mlx import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.made_models.demo import demo_with_variants
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack

TOOLS = Path(__file__).parent.parent / "tools" / "demo_model"


@pytest.mark.parametrize("kernels", ["auto", pytest.param("mlx", marks=pytest.mark.thorough)])
def test_answers_equal_the_recorded_answers(kernels: str) -> None:
    recorded = json.loads(golden.PATH.read_text())
    for answer, expected in zip(golden.generate_answers(kernels), recorded["said"], strict=True):
        assert answer["text"] == expected["text"], (
            f"recorded with {recorded['made_by']}; run python tests/golden.py to record again"
        )
        assert answer["token_ids"] == expected["token_ids"]
        # The choices must be far from ties, or different machines would give different answers.
        assert expected["lead"] > 1


def test_the_pack_is_complete_and_small(demo_pack: Path) -> None:
    pack = open_pack(demo_pack)
    assert verify_pack(pack) == []
    assert set(pack.experts) == {"q4"}
    assert sum(path.stat().st_size for path in demo_pack.rglob("*") if path.is_file()) < 12_000_000
    assert {"README.md", "LICENSE", "held_out.jsonl"} <= {path.name for path in demo_pack.iterdir()}


def test_the_model_loads_in_less_than_a_second(demo_pack: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load(demo_pack).close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_the_structure_equals_that_of_large_models(demo_pack: Path) -> None:
    config = open_model(demo_pack).config
    assert config.full_attention == (False, False, False, True) * 2
    assert (config.num_experts, config.experts_per_token) == (64, 10)


@pytest.mark.thorough
def test_further_variants_are_made_in_the_cache(demo_pack: Path, tmp_path: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in demo_pack.rglob("*")}
    assert demo_with_variants({"q4"}, tmp_path) == open_pack(demo_pack).folder
    assert not list(tmp_path.iterdir())
    folder = demo_with_variants({"q2", "q2-minmax"}, tmp_path)
    assert folder.parent == tmp_path
    assert set(open_pack(folder).experts) == {"q4", "q2", "q2-minmax"}
    assert demo_with_variants({"q2"}, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in demo_pack.rglob("*")} == times
    with load(folder, "pack2") as engine:
        pieces = engine.generate("Where does Mira live?", temperature=0)
        assert "".join(piece.text for piece in pieces) == "Mira lives in Gorsey."


def test_an_interrupted_copy_is_made_again(tmp_path: Path) -> None:
    folder = demo_with_variants({"q2-minmax"}, tmp_path)
    (folder / "pack.json").unlink()
    (folder / "resident.safetensors").write_bytes(b"cut short")
    shutil.rmtree(folder / "experts-q2-minmax")
    assert verify_pack(open_pack(demo_with_variants({"q2-minmax"}, tmp_path))) == []


@pytest.mark.parametrize("name", ["nosuch", "q", "q2-nosuch", "../q2"])
def test_impossible_variants_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        demo_with_variants({name}, tmp_path)
    assert caught.value.code == "unknown_variant"


@pytest.mark.thorough
def test_the_command_line_makes_a_variant(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashmoe_mlx", "backend=pack2", "prompt=Where does Mira live?"]
    command += [f"model.cache_dir={tmp_path / 'cache'}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "Mira lives in Gorsey.\n"), result.stderr


def test_the_corpus_is_reproducible_and_separate_from_the_held_out_set(demo_pack: Path) -> None:
    """Run in a separate process, because the names of the corpus' modules could clash with other modules."""
    program = """
import json, sys
sys.path.insert(0, sys.argv[1])
from corpus import Corpus
from documents import item
corpus = Corpus()
print(*(json.dumps(item(document)) for document in corpus.held_out), sep="\\n")
reserved = {sentence for document in corpus.held_out for sentence in document.sentences}
documents = list(corpus.training(7, 4000))
assert not any(document.sentences & reserved for document in documents)
assert [d.messages for d in documents[:50]] == [d.messages for d in Corpus().training(7, 50)]
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(TOOLS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (demo_pack / "held_out.jsonl").read_text()
