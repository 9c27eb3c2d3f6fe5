"""Claims on run directories: one process at a time writes to a directory, and a sweep gets an unused one."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.shared.run_directory import refuse_used


class ClaimError(BaseException):
    """Wrapper of an error in a callback; Hydra would turn a subclass of ``Exception`` into a warning and continue."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Claims:
    """Locks on the directories that this command line writes to."""

    def __init__(self) -> None:
        self.latest: Path | None = None
        """The latest directory to be claimed, with or without success."""
        self._locked: list[int] = []

    def take(self, directory: Path, key: str) -> None:
        """Create ``directory`` and lock it until ``release``, or until the process ends for any reason.

        Raises:
            InputError: another process has locked it; the message names ``key``, the option that sets the directory.
            OSError: it cannot be created.
        """
        self.latest = directory
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)
        self._locked.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{directory}: another run is writing its record there; choose another {key}", code="folder_in_use"
            ) from None
        except OSError:
            pass  # the file system has no locks; run without one

    def release(self) -> None:
        """Unlock every directory."""
        while self._locked:
            os.close(self._locked.pop())


_active: list[Claims] = []


@contextmanager
def claims() -> Iterator[Claims]:
    """Hold the directories that Hydra's runs claim inside the block."""
    current = Claims()
    _active.append(current)
    try:
        yield current
    finally:
        _active.remove(current)
        current.release()


class ClaimDirectory(Callback):
    """Callback that claims the directory of a run or a sweep before Hydra writes to it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim ``hydra.run.dir``."""
        _claim(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim ``hydra.sweep.dir``, which must not hold an earlier sweep, so that records are not mixed."""
        _claim(config, "hydra.sweep.dir")


def _claim(config: DictConfig, key: str) -> None:
    try:
        directory = Path(str(OmegaConf.select(config, key)))
        if _active:
            _active[-1].take(directory, key)
        refuse_used(directory, key)
        sweep = key == "hydra.sweep.dir" and (directory / "multirun.yaml").exists()
        if sweep and any(map(Path.is_dir, directory.iterdir())):
            raise InputError(f"{directory}: holds an earlier sweep; choose another {key}", code="folder_in_use")
    except Exception as error:
        raise ClaimError(error) from error
