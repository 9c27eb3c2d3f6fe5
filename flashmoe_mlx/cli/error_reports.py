"""Errors as a person and a program get them: a line on stderr, an exit code, and ``failure.json``."""

import contextlib
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from flashmoe_mlx.cli.composition import GROUPS
from flashmoe_mlx.console.streams import Notes, one_line, say
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.paths import NO_SPACE

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A run of a sweep, or the only one; ``failure`` is the message of its error."""

    folder: Path
    overrides: list[str]
    failure: str | None = None


def report(error: Exception, debug: bool, folder: Path | None = None, record: bool = False) -> int:
    """Say what went wrong; returns the exit code.

    Args:
        error: the exception to report.
        debug: whether to show the traceback as well.
        folder: where the record of the run goes, if that is known.
        record: whether to leave ``failure.json`` there.
    """
    if isinstance(error, BrokenPipeError):
        return 0  # the reader of the answer has had enough
    said = message(error, folder)
    code = _exit_code(error)
    if record and folder is not None:
        from flashmoe_mlx.formats.files import write_json

        log.error("%s", said, exc_info=error)
        with contextlib.suppress(OSError):  # the error at hand may be that nothing can be written there
            write_json(folder / "failure.json", {"error": said, "code": _error_code(error), "exit_code": code})
    if debug:
        traceback.print_exception(error, file=Notes())
    say(f"flashmoe_mlx: {one_line(said)}")
    return code


def failed_jobs(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield one line for each failed job of a sweep, identified by its distinguishing overrides."""
    failed = [job for job in jobs if job.failure is not None]
    if not failed or len(jobs) == 1:
        return
    common = set.intersection(*(set(job.overrides) for job in jobs))
    yield f"flashmoe_mlx: {len(failed)} of {len(jobs)} jobs failed; the records of the others are complete:"
    for job in failed:
        own = [override for override in job.overrides if override not in common]
        yield one_line(f"  {' '.join([job.folder.name, *own])}: {job.failure}")


def message(error: Exception, folder: Path | None = None) -> str:
    """Describe ``error`` in a line: what is wrong, where, and what to do."""
    if isinstance(error, FlashMoeError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_error(error)
    if isinstance(error, OSError) and error.strerror:
        return _system_error(error, folder)
    return f"internal error: {type(error).__name__}: {error} (debug=true shows where)"


def _composition_error(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        for ours in GROUPS:  # the name may be a path
            if error.missing_cfg_file.startswith(f"{ours}/"):
                group, name = ours, error.missing_cfg_file.removeprefix(f"{ours}/")
        hint = f"; for a folder: model.path={name}" if group == "model" else ""
        return f"{group}={name}: no such {group}; there are {', '.join(sorted(error.options))}{hint}"
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0].lstrip("+")
        value = error.override.partition("=")[2]
        shape = "['...',...]" if value.startswith("[") else "{name: '...'}" if value.startswith("{") else "'...'"
        return f'{error.override.lstrip("+")}: this value cannot be read; quotes make it a text: "{key}={shape}"'
    if isinstance(error, InterpolationKeyError):
        return f"{text} (${{...}} refers to another key)"
    if text.startswith("Error merging override ") and error.__cause__ is not None:
        override = text.removeprefix("Error merging override ").lstrip("+")
        return f"{override}: {(str(error.__cause__).splitlines() or ['not a value of this kind'])[0]}"
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)' ", text)
    if ambiguous:
        return f"{ambiguous[1]}: several values are a sweep, which needs -m; a list needs [brackets]"
    return text


def _system_error(error: OSError, folder: Path | None) -> str:
    # Before there is a folder for the record, a stream is all that is written to.
    place = (folder or Path("stdout")) if error.filename is None else Path(str(error.filename))
    remedies = ["make room there"] if error.errno in NO_SPACE else []
    if folder is not None and place.absolute().is_relative_to(folder.absolute()):
        remedies.append("hydra.run.dir=<folder> puts the record of the run elsewhere")
    return f"{place}: {'; '.join([str(error.strerror), *remedies])}"


def _exit_code(error: Exception) -> int:
    if isinstance(error, HydraException | OmegaConfBaseException):
        return InputError.exit_code
    return error.exit_code if isinstance(error, FlashMoeError) else 1


def _error_code(error: Exception) -> str:
    if isinstance(error, FlashMoeError):
        return error.code
    if isinstance(error, HydraException | OmegaConfBaseException):
        return InputError.default_code
    return "system_error" if isinstance(error, OSError) else "internal_error"
