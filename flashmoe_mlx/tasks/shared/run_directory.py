"""Files of a run directory: the measurements that no later run may replace."""

from pathlib import Path

from flashmoe_mlx.errors import InputError

FAILURE = "failure.json"
"""Record of the error that ended a run."""
_HYDRA = ".hydra"
_MEASUREMENTS = ("metrics.json", "bench.json", "bench_io.json", "evaluate.json", "routing.moetrace")
_RECORD_FILES = (_HYDRA, "flashmoe_mlx.log", "multirun.yaml", FAILURE)


def holds_measurements(directory: Path) -> bool:
    """Return whether an earlier run left its measurements in ``directory``."""
    return any((directory / name).exists() for name in _MEASUREMENTS)


def refuse_used(directory: Path, key: str) -> None:
    """Check that ``directory`` holds no measurements of an earlier run; ``key`` is the option that sets it.

    Raises:
        InputError: the directory holds measurements.
    """
    if holds_measurements(directory):
        raise InputError(f"{directory}: holds the record of another run; choose another {key}", code="folder_in_use")


def holds_only_records(path: Path) -> bool:
    """Return whether ``path`` is part of a run's record, or a directory that contains nothing but run records."""
    if path.name in _RECORD_FILES and (path.parent / _HYDRA).is_dir():
        return True
    if not path.is_dir() or path.is_symlink():
        return False
    if (path / _HYDRA).is_dir():
        return True
    entries = list(path.iterdir())
    return bool(entries) and all(map(holds_only_records, entries))
