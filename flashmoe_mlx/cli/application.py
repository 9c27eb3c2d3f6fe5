"""Application: Hydra composes the configuration, the task runs in its own directory, and errors become lines."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.cli.arguments import parse
from flashmoe_mlx.cli.claims import ClaimError, claims
from flashmoe_mlx.cli.composition import build_config
from flashmoe_mlx.cli.error_reports import message, report
from flashmoe_mlx.cli.normalization import normalize_argv
from flashmoe_mlx.cli.remote_jobs import RemoteJob, collecting, outcome, take_home
from flashmoe_mlx.cli.sweeps import Job, summarize
from flashmoe_mlx.cli.usage import help_text
from flashmoe_mlx.console.streams import drop_answer, print_answer
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.tasks.shared.run_directory import FAILURE, holds_measurements, refuse_used

_NO_MLX = (
    "MLX is not installed or cannot run on this machine: pip install 'flashmoe_mlx[cpu]', or with an NVIDIA GPU "
    "'flashmoe_mlx[cuda]'"
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    A sweep runs every job, prints a table of its jobs, lists the failed ones, and returns the highest exit code. A job
    that fails leaves ``failure.json`` in its directory.
    """
    # Composition can fail, so there may be no configuration to read this key from.
    debug = any(argument.lstrip("+").lower() in ("debug=true", "debug=1") for argument in arguments)
    with claims() as claimed:
        try:
            _check_working_folder()
            line = parse(arguments)
            if "--help" in line.flags:
                print_answer(help_text(line))
                return 0
            if "--version" in line.flags:
                packages = ("flashmoe_mlx", "mlx")
                print_answer(", ".join(f"{name} {_installed_version(name) or '(not installed)'}" for name in packages))
                return 0
            normalized = normalize_argv(arguments)
            _check_mlx()
            return _run_hydra(normalized, debug, line.runs)
        except ClaimError as claim:
            return report(claim.error, debug, claimed.latest)
        except Exception as error:
            return report(error, debug, claimed.latest)


def _run_hydra(arguments: Sequence[str], debug: bool, runs: bool) -> int:
    """Run Hydra with normalized arguments and return the highest exit code of its jobs.

    Args:
        arguments: overrides and options as ``normalize_argv`` returns them.
        debug: whether to show tracebacks of errors.
        runs: whether tasks run, so that a command line without any job is a mistake.
    """
    codes: list[int] = []
    jobs: list[Job] = []
    returned: list[JobReturn] = []
    own_process = os.getpid()

    @hydra.main(version_base="1.3", config_path="pkg://flashmoe_mlx.configs", config_name="config")
    def run_job(composed: DictConfig) -> float | RemoteJob | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        unused = not holds_measurements(folder)
        job = Job(folder, _overrides())
        jobs.append(job)
        code, metric = 0, None
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                refuse_used(folder, "hydra.sweep.subdir")
            (folder / FAILURE).unlink(missing_ok=True)  # from an earlier attempt
            config = build_config(composed)
            metric = import_module(f"flashmoe_mlx.tasks.{config.task.name}").run(config, folder)
        except Exception as error:
            job.failure = message(error, folder)
            code = report(error, debug, folder, record=unused)
            codes.append(code)
        if os.getpid() != own_process:  # the lists are copies
            return outcome(job, code, metric)
        return metric  # for sweepers that optimize

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them and exiting
    program, log_errors = sys.argv, logging.raiseExceptions
    sys.argv = [program[0], *arguments]
    logging.raiseExceptions = False  # a log that cannot be written must not fill the terminal with tracebacks
    try:
        try:
            with collecting(returned):
                run_job()
        except SystemExit as ended:  # after --hydra-help and similar options
            codes.append(InputError.exit_code if ended.code else 0)
        for remote in take_home(returned):
            jobs.append(remote.job)
            codes.append(remote.code)
        print_answer("", end="")  # Hydra does not flush what --cfg prints
        if runs and not jobs:
            raise InputError("nothing ran: a range or pattern on the command line has no values", code="empty_sweep")
    except (FlashMoeError, HydraException, OmegaConfBaseException):  # some errors of Hydra are an OSError, too
        raise
    except OSError as error:
        if not jobs and error.filename is None:  # Hydra could not print
            drop_answer()
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package in ("ray", "submitit"):
            raise FlashMoeError(
                f"{package}: {' '.join(str(error).split())[:500]}; the records of finished jobs are on their machines",
                code="cluster_failed",
            ) from error
        raise InputError(
            f"Hydra rejects the command line: {' '.join(str(error).split())} (debug=true shows the traceback)"
        ) from error
    finally:
        sys.argv, logging.raiseExceptions = program, log_errors
        summarize(jobs)
    return max(codes, default=0)


def _overrides() -> list[str]:
    """Return the overrides of the current job, without "+" signs."""
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override).lstrip("+") for override in overrides]


def _check_working_folder() -> None:
    """Refuse working folders in which Hydra cannot start."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        raise InputError(
            "the working folder no longer exists; change to another folder", code="no_working_folder"
        ) from None
    if "${" in str(folder):
        raise InputError(
            f"{folder}: Hydra would interpret ${{...}} in the name of the working folder; change to another folder",
            code="no_working_folder",
        )


def _check_mlx() -> None:
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise FlashMoeError(f"{_NO_MLX} ({error})", code="no_mlx") from error


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # for instance a checkout that was never installed
        return None
