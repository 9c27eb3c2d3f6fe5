"""From a command line to a finished task: Hydra composes, the task runs in its own directory, errors become lines."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.cli.command_line import parse, tidy
from flashmoe_mlx.cli.composition import typed
from flashmoe_mlx.cli.error_reports import Job, failed_jobs, message, report
from flashmoe_mlx.cli.usage import help_text
from flashmoe_mlx.console.run_folder import FAILURE, Refused, claims, holds_measurements, refuse_used
from flashmoe_mlx.console.streams import drop_answer, print_answer, say
from flashmoe_mlx.errors import FlashMoeError, InputError

_NO_MLX = (
    "MLX has no library for this machine: pip install 'flashmoe_mlx[cpu]', or with an NVIDIA GPU 'flashmoe_mlx[cuda]'"
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code.

    In a sweep every job runs, those that failed are listed at the end, and the worst exit code counts. A job that fails
    leaves ``failure.json`` in its directory.
    """
    # Composing can fail before there is a configuration to ask.
    debug = any(argument.lstrip("+").lower() in ("debug=true", "debug=1") for argument in arguments)
    with claims() as taken:
        try:
            _check_working_folder()
            line = parse(arguments)
            if "--help" in line.flags:
                print_answer(help_text(line))
                return 0
            if "--version" in line.flags:
                print_answer(
                    ", ".join(f"{name} {_installed(name) or '(not installed)'}" for name in ("flashmoe_mlx", "mlx"))
                )
                return 0
            tidied = tidy(arguments)
            _check_mlx()
            return _run_hydra(tidied, debug, line.runs)
        except Refused as refused:
            return report(refused.error, debug, taken.folder)
        except Exception as error:
            return report(error, debug, taken.folder)


def _run_hydra(arguments: Sequence[str], debug: bool, runs: bool) -> int:
    codes: list[int] = []
    jobs: list[Job] = []

    @hydra.main(version_base="1.3", config_path="pkg://flashmoe_mlx.configs", config_name="config")
    def job(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        own = not holds_measurements(folder)
        done = Job(folder, _overrides())
        jobs.append(done)
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                refuse_used(folder, "hydra.sweep.subdir")
            (folder / FAILURE).unlink(missing_ok=True)  # of an earlier try
            config = typed(composed)
            import_module(f"flashmoe_mlx.tasks.{config.task.name}").run(config, folder)
        except Exception as error:
            done.failure = message(error, folder)
            codes.append(report(error, debug, folder, record=own))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing and exiting
    program, log_errors = sys.argv, logging.raiseExceptions
    sys.argv = [program[0], *arguments]
    logging.raiseExceptions = False  # a log that cannot be written must not fill the terminal with tracebacks
    try:
        try:
            job()
        except SystemExit as asked:  # after --hydra-help and the like
            codes.append(InputError.exit_code if asked.code else 0)
        print_answer("", end="")  # Hydra leaves what --cfg shows in the buffer
        if runs and not jobs:
            raise InputError("nothing ran: a range or pattern on the command line is empty", code="empty_sweep")
    except OSError as error:
        if not jobs and error.filename is None:  # Hydra could not print
            drop_answer()
        raise
    except (FlashMoeError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        raise InputError(
            f"Hydra refuses the command line: {' '.join(str(error).split())} (debug=true shows where)"
        ) from error
    finally:
        sys.argv, logging.raiseExceptions = program, log_errors
        for line in failed_jobs(jobs):
            say(line)
    return max(codes, default=0)


def _overrides() -> list[str]:
    """Return the overrides of the job at hand as they were written."""
    listed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(listed, list)
    return [str(override).lstrip("+") for override in listed]


def _check_working_folder() -> None:
    """Refuse folders in which Hydra cannot start."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        raise InputError(
            "the working folder no longer exists; change to another one", code="no_working_folder"
        ) from None
    if "${" in str(folder):
        raise InputError(
            f"{folder}: Hydra takes ${{...}} in the name of the working folder for a reference; change to another one",
            code="no_working_folder",
        )


def _check_mlx() -> None:
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise FlashMoeError(f"{_NO_MLX} ({error})", code="no_mlx") from error


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that runs as it is
        return None
