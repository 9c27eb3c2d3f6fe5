"""Folders of runs: one run at a time writes its record into one, and a sweep into one of its own."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from flashmoe_mlx.errors import InputError

_HYDRA = ".hydra"
FAILURE = "failure.json"
_RECORDS = ("metrics.json", "bench.json", "bench_io.json", "evaluate.json", "routing.moetrace")
"""Measurements, which no later run may replace or be mixed with."""
_OWN_FILES = (_HYDRA, "flashmoe_mlx.log", "multirun.yaml", FAILURE)


class Refused(BaseException):
    """An error of a callback; Hydra turns what derives from ``Exception`` into a warning and goes on."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Claims:
    """The folders that this command line writes to, held against other processes."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """The latest folder, whether it could be claimed or not."""
        self._held: list[int] = []

    def take(self, folder: Path, key: str) -> None:
        """Make ``folder`` and hold it until ``release``, or until the process ends in whatever way.

        Raises:
            InputError: another process holds it; ``key`` is the option that names another.
            OSError: it cannot be made.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
        self._held.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another run is writing its record there; choose another {key}", code="folder_in_use"
            ) from None
        except OSError:
            pass  # a filesystem without locks: such as it is

    def release(self) -> None:
        """Let go of every folder."""
        while self._held:
            os.close(self._held.pop())


_active: list[Claims] = []


@contextmanager
def claims() -> Iterator[Claims]:
    """Hold the folders that Hydra's runs claim inside the block."""
    taken = Claims()
    _active.append(taken)
    try:
        yield taken
    finally:
        _active.remove(taken)
        taken.release()


class ClaimFolder(Callback):
    """Claims the folder of a run or a sweep before Hydra writes anything there."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim ``hydra.run.dir``."""
        _claim(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim ``hydra.sweep.dir``, which must not hold another sweep: the records of both would be mixed."""
        _claim(config, "hydra.sweep.dir")


def _claim(config: DictConfig, key: str) -> None:
    try:
        folder = Path(str(OmegaConf.select(config, key)))
        if _active:
            _active[-1].take(folder, key)
        refuse_used(folder, key)
        if key == "hydra.sweep.dir" and (folder / "multirun.yaml").exists() and any(map(Path.is_dir, folder.iterdir())):
            raise InputError(f"{folder}: holds an earlier sweep; choose another {key}", code="folder_in_use")
    except Exception as error:
        raise Refused(error) from error


def holds_measurements(folder: Path) -> bool:
    """Return whether an earlier run left its measurements in ``folder``."""
    return any((folder / name).exists() for name in _RECORDS)


def refuse_used(folder: Path, key: str) -> None:
    """Raise InputError if ``folder`` holds the measurements of an earlier run; ``key`` is the option that names it."""
    if holds_measurements(folder):
        raise InputError(f"{folder}: holds the record of another run; choose another {key}", code="folder_in_use")


def holds_only_records(path: Path) -> bool:
    """Whether ``path`` is a part of the record of a run, or a folder with nothing but such records in it."""
    if path.name in _OWN_FILES and (path.parent / _HYDRA).is_dir():
        return True
    if not path.is_dir() or path.is_symlink():
        return False
    if (path / _HYDRA).is_dir():
        return True
    inside = list(path.iterdir())
    return bool(inside) and all(map(holds_only_records, inside))
