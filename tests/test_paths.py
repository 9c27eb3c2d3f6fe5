"""Paths of users are expanded and quoted, and errors name their file."""

import errno
import os
import shlex
from pathlib import Path

import pytest

import flashmoe_mlx
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import as_argument, expand_path, name_in_errors
from flashmoe_mlx.research import load_runs
from flashmoe_mlx.tasks.shared.keys import ModelChoice
from flashmoe_mlx.tasks.shared.model import cache_folder, model_folder

NOWHERE = [
    ("~nosuchuser/x", "no_home_folder"),
    ("~nosuchuser", "no_home_folder"),
    ("", "invalid_path"),
    (" ", "invalid_path"),
    ("a\0b", "invalid_path"),
]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME whose ID the system does not know."""
    for name in ("HOME", "XDG_CACHE_HOME", "FLASHMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456)


def test_home_folders_are_found() -> None:
    assert expand_path("~/x") == Path.home() / "x"
    assert expand_path(Path("~/x")) == Path.home() / "x"
    assert [str(expand_path(text)) for text in ("a~b", "./~x", "[v2]", "???")] == ["a~b", "~x", "[v2]", "???"]


@pytest.mark.parametrize(("text", "code"), NOWHERE)
def test_invalid_paths(text: str, code: str) -> None:
    for use in (expand_path, flashmoe_mlx.load, load_runs, lambda path: model_folder(ModelChoice(path=path))):
        with pytest.raises(InputError) as raised:
            use(text)
        assert raised.value.code == code
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder() -> None:
    for use in (lambda: expand_path("~/x"), lambda: cache_folder(ModelChoice())):
        with pytest.raises(InputError) as raised:
            use()
        assert raised.value.code == "no_home_folder"
        assert "set HOME" in str(raised.value)
    assert model_folder(ModelChoice(name="demo", shipped=True), {"variant": "q4"}).is_dir()  # needs no cache folder


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as raised, name_in_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError) as missing, name_in_errors(tmp_path / "x"):
        (tmp_path / "y").read_bytes()
    assert missing.value.filename == str(tmp_path / "y")


@pytest.mark.parametrize("path", ["x" * 300, "é" * 200, "x/" * 3000, "\ud800"])
def test_impossible_file_names(path: str) -> None:
    with pytest.raises(InputError) as raised:
        expand_path(path)
    assert raised.value.code == "invalid_path"
    assert len(str(raised.value)) < 100


@pytest.mark.parametrize("path", ["/a b/it's [v2]", "~x", "null", "-x", "/a\nb", "/$HOME/`x`", "/a=b,c", "/plain"])
def test_arguments_to_copy(path: str) -> None:
    shown = as_argument("model.path", Path(path))
    (argument,) = shlex.split(shown)
    key, _, value = argument.partition("=")
    assert key == "model.path"
    assert expand_path(value) == Path(path)
    assert value != "null"
    assert shown == argument or shown[0] in "'\""
