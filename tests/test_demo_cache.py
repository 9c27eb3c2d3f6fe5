"""The copy of the demo model in the user's cache is complete or made again, by one process at a time."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.folders import lock_folder
from flashmoe_mlx.made_models.demo import demo_with_variants
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.tasks.shared import model
from flashmoe_mlx.tasks.shared.keys import ModelChoice
from flashmoe_mlx.tasks.shared.model import model_folder

Q2 = {"q2-minmax"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_with_variants(Q2, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(("name", "kept"), [("pack.json", 0), ("pack.json", 2000), ("resident.safetensors", 100)])
@pytest.mark.sampled(1)
def test_an_incomplete_copy_is_made_again(name: str, kept: int, made: Path, tmp_path: Path) -> None:
    """Older versions did not write the manifest atomically: after a kill, every later start failed."""
    folder = tmp_path / made.name
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes((made / name).read_bytes()[:kept])
    (folder / "experts-q4").unlink()  # the files of a variant are links; writing through them would change the package
    (folder / "experts-q2-minmax").unlink()
    if name != "pack.json":
        (folder / "pack.json").unlink()
    assert demo_with_variants(Q2, tmp_path) == folder
    assert verify_pack(open_pack(folder)) == []


KILLED = """
import os, sys
from pathlib import Path
from flashmoe_mlx.made_models import demo
replace, left = Path.replace, int(sys.argv[2])

def replaced(self, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return replace(self, target)

Path.replace = replaced
demo.demo_with_variants({"q2-minmax"}, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("files", [0, 5])
@pytest.mark.sampled(1)
def test_a_killed_first_use_can_be_repeated(files: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 9, result.stderr
    assert verify_pack(open_pack(demo_with_variants(Q2, tmp_path))) == []


def test_a_second_process_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "_INTERVAL", 0.01)
    choice = ModelChoice(name="demo", shipped=True, cache_dir=str(tmp_path))
    folder = demo_with_variants(Q2, tmp_path)
    with lock_folder(folder):
        found: list[Path] = []
        waiting = threading.Thread(target=lambda: found.append(model_folder(choice, {"variant": "q3"})))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert not found
    waiting.join(60)
    assert found == [folder]
    assert "q3" in open_pack(folder).experts
    assert capsys.readouterr().err.count("another process that is making this model") == 1


def test_waiting_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_INTERVAL", 0.01)
    monkeypatch.setattr(model, "_TIMEOUT", 0.1)
    choice = ModelChoice(name="demo", shipped=True, cache_dir=str(tmp_path))
    folder = demo_with_variants(Q2, tmp_path)
    with lock_folder(folder), pytest.raises(PackError) as raised:
        model_folder(choice, {"variant": "q3"})
    assert raised.value.code == "pack_in_use"


def test_no_waiting_for_an_impossible_variant(tmp_path: Path) -> None:
    choice = ModelChoice(name="demo", shipped=True, cache_dir=str(tmp_path))
    for name in ("nosuch", "q3-minmax"):
        with pytest.raises(InputError) as caught:
            model_folder(choice, {"variant": name})
        assert caught.value.code == "unknown_variant"
