"""Errors as people and programs see them: a line on stderr, an exit code, and ``failure.json``."""

import contextlib
import logging
import re
import traceback
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from flashmoe_mlx.cli.task_keys import GROUPS
from flashmoe_mlx.console.streams import Notes, one_line, say
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.paths import NO_SPACE
from flashmoe_mlx.tasks.shared.run_directory import FAILURE

_log = logging.getLogger(__name__)


def report(error: Exception, debug: bool, folder: Path | None = None, record: bool = False) -> int:
    """Print a line about ``error`` and return the exit code.

    Args:
        error: the exception to report.
        debug: whether to print the traceback, too.
        folder: the run directory, if it is known.
        record: whether to write ``failure.json`` to ``folder``.
    """
    if isinstance(error, BrokenPipeError):
        return 0  # the reader of stdout has read enough
    text = message(error, folder)
    code = _exit_code(error)
    if record and folder is not None:
        from flashmoe_mlx.formats.files import write_json

        _log.error("%s", text, exc_info=error)
        with contextlib.suppress(OSError):  # perhaps the very error to report: a full disk, for instance
            write_json(folder / FAILURE, {"error": text, "code": _error_code(error), "exit_code": code})
    if debug:
        traceback.print_exception(error, file=Notes())
    say(f"flashmoe_mlx: {one_line(text)}")
    return code


def message(error: Exception, folder: Path | None = None) -> str:
    """Describe ``error`` in a line: the problem, its place, and the remedy."""
    if isinstance(error, FlashMoeError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_error(error)
    if isinstance(error, OSError) and error.strerror:
        return _system_error(error, folder)
    return f"internal error: {type(error).__name__}: {error} (debug=true shows the traceback)"


def _composition_error(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        for known in GROUPS:  # the name may contain slashes
            if error.missing_cfg_file.startswith(f"{known}/"):
                group, name = known, error.missing_cfg_file.removeprefix(f"{known}/")
        if group == "hydra/launcher":
            return f"{group}={name}: no such launcher; ray and submitit need: pip install 'flashmoe_mlx[cluster]'"
        if group == "hydra/sweeper":
            return f"{group}={name}: no such sweeper; optuna needs the extra sweep: pip install 'flashmoe_mlx[sweep]'"
        hint = f"; for a folder: model.path={name}" if group == "model" else ""
        return f"{group}={name}: no such {group}; choose from {', '.join(sorted(error.options))}{hint}"
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        override = error.override.lstrip("+")
        key, _, value = override.partition("=")
        if value.endswith(","):
            return f"{override}: a value is missing after the last comma"
        quoted = "['...',...]" if value.startswith("[") else "{name: '...'}" if value.startswith("{") else "'...'"
        return f'{override}: Hydra cannot read this value; quote it as text: "{key}={quoted}"'
    if isinstance(error, InterpolationKeyError):
        return f"{text} (${{...}} refers to another key)"
    if text.startswith("Error merging override ") and error.__cause__ is not None:
        override = text.removeprefix("Error merging override ").lstrip("+")
        return f"{override}: {(str(error.__cause__).splitlines() or ['the value has the wrong type'])[0]}"
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)' ", text)
    if ambiguous:
        return f"{ambiguous[1]}: several values are a sweep, which needs -m; a list needs [brackets]"
    return text


def _system_error(error: OSError, folder: Path | None) -> str:
    # Without a run directory, stdout is the only output, so an error without a file name is about stdout.
    place = (folder or Path("stdout")) if error.filename is None else Path(str(error.filename))
    remedies = ["free some space there"] if error.errno in NO_SPACE else []
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
