"""From a command line to a finished task: Hydra composes, the task runs in its own directory, errors become lines."""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_method
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.command_line import tidy
from flashmoe_mlx.config import typed
from flashmoe_mlx.engine.telemetry import package_version, write_json
from flashmoe_mlx.errors import FlashMoeError, InputError

log = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code.

    In a sweep every job runs, those that failed are listed at the end, and the worst exit code counts. A job that fails
    leaves ``failure.json`` in its directory.
    """
    # Composing can fail before there is a configuration to ask.
    debug = any(argument.lstrip("+").lower() in ("debug=true", "debug=1") for argument in arguments)
    codes: list[int] = []
    jobs: list[_Job] = []

    @hydra.main(version_base="1.3", config_path="pkg://flashmoe_mlx.configs", config_name="config")
    def job(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        own = not any(folder.glob("*.json"))  # else it is another run's, which will be refused
        done = _Job(folder, [override.lstrip("+") for override in HydraConfig.get().overrides.task])
        jobs.append(done)
        try:
            config = typed(composed)
            get_method(config.task._target_)(config, folder)
        except Exception as error:
            done.failure = _message(error)
            codes.append(_report(error, debug, folder if own else None))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    if "--version" in arguments:
        print(", ".join(f"{name} {package_version(name)}" for name in ("flashmoe_mlx", "mlx")))
        return 0
    program, own = sys.argv[0], sys.argv
    try:
        sys.argv = [program, *_refuse_used_folder(tidy(arguments))]
        job()
    except SystemExit as asked:  # after --help and the like
        codes.append(int(asked.code or 0))
    except Exception as error:
        # Tasks report their own: an error of the system here is about the run's directory.
        if isinstance(error, OSError) and error.filename is not None:
            mend = "hydra.run.dir=<folder> puts the record of the run elsewhere"
            codes.append(_report(FlashMoeError(f"{error.filename}: {error.strerror}; {mend}"), debug))
        else:
            codes.append(_report(error, debug))
    finally:
        sys.argv = own
        for line in _failures(jobs):
            print(line, file=sys.stderr)
    return max(codes, default=0)


@dataclass
class _Job:
    """A run of a sweep, or the only one."""

    folder: Path
    overrides: list[str]
    failure: str | None = None


def _failures(jobs: Sequence[_Job]) -> Iterator[str]:
    """What of a sweep failed, each job by what distinguishes it from others."""
    failed = [job for job in jobs if job.failure is not None]
    if not failed or len(jobs) == 1:
        return
    common = set.intersection(*(set(job.overrides) for job in jobs))
    yield f"flashmoe_mlx: {len(failed)} of {len(jobs)} jobs failed; the records of the others are complete:"
    for job in failed:
        own = " ".join(override for override in job.overrides if override not in common)
        yield f"  {job.folder.name} {own}: {job.failure}"


def _refuse_used_folder(arguments: Sequence[str]) -> Sequence[str]:
    """Hydra would mix the records of two sweeps in one folder."""
    for argument in arguments:
        folder = argument.removeprefix("hydra.sweep.dir=")
        if folder != argument and (Path(folder) / "multirun.yaml").exists():
            raise InputError(f"{folder}: holds an earlier sweep; choose another hydra.sweep.dir")
    return arguments


def _report(error: Exception, debug: bool, folder: Path | None = None) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output has had enough; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    message = _message(error)
    code = _exit_code(error)
    if folder is not None:
        log.error("%s", message, exc_info=error)
        with contextlib.suppress(OSError):  # the error at hand may be that nothing can be written there
            write_json(folder / "failure.json", {"error": message, "exit_code": code})
    if debug:
        traceback.print_exception(error)
    print(f"flashmoe_mlx: {message}", file=sys.stderr)
    return code


def _exit_code(error: Exception) -> int:
    if isinstance(error, HydraException | OmegaConfBaseException):
        return InputError.exit_code
    return error.exit_code if isinstance(error, FlashMoeError) else 1


def _message(error: Exception) -> str:
    if isinstance(error, FlashMoeError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        hint = f"; for a folder: model.path={name}" if group == "model" else ""
        return f"{group}={name}: no such {group}; there are {', '.join(sorted(error.options))}{hint}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = " ".join(str(error).split())
        ambiguous = re.match(r"Ambiguous value for argument '(.*?)' ", text)
        return (
            f"{ambiguous[1]}: several values are a sweep, which needs -m; a list needs [brackets]"
            if ambiguous
            else text
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"internal error: {type(error).__name__}: {error} (debug=true shows where)"
