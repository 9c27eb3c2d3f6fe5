"""Jobs of a sweep that a launcher runs in other processes or on other machines, such as ``hydra/launcher=ray``.

Such a process has copies of all variables, so a job returns its outcome, with its records, to the process of the sweep.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from flashmoe_mlx.cli.sweeps import Job
from flashmoe_mlx.formats.files import write_atomically

_MOST_BYTES = 64 * 2**20
"""Size above which a record stays where it was written."""


@dataclass
class RemoteJob:
    """The outcome of a job that ran in another process.

    Attributes:
        job: the job; its folder is on the machine that ran it.
        code: the exit code.
        metric: the result for a sweeper that optimizes, or None.
        records: the records of the run by name.
    """

    job: Job
    code: int
    metric: float | None
    records: dict[str, bytes] = field(default_factory=dict)

    def __float__(self) -> float:
        """Return the metric, for sweepers."""
        if self.metric is None:
            raise TypeError("this job has no metric")
        return self.metric


def outcome(job: Job, code: int, metric: float | None) -> RemoteJob:
    """Return the outcome of ``job``, which has ended in this process, with its records."""
    paths = [path for path in sorted(job.folder.glob("*.json")) if path.stat().st_size <= _MOST_BYTES]
    return RemoteJob(job, code, metric, {path.name: path.read_bytes() for path in paths})


@contextmanager
def collecting(returned: list[JobReturn]) -> Iterator[None]:
    """Add what the jobs of sweeps in the enclosed code return to ``returned``, in the order of the jobs."""
    original = Plugins.instantiate_launcher

    def instantiate(plugins: Plugins, **arguments: Any) -> Any:
        launcher = original(plugins, **arguments)
        launch = launcher.launch

        def launch_and_keep(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            results = launch(job_overrides, initial_job_idx=initial_job_idx)
            returned.extend(results)
            return results

        launcher.launch = launch_and_keep  # type: ignore[method-assign]
        return launcher

    Plugins.instantiate_launcher = instantiate  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = original  # type: ignore[method-assign]


def take_home(returned: Sequence[JobReturn]) -> Iterator[RemoteJob]:
    """Yield the jobs among ``returned`` that other processes ran, after their records were written to this machine."""
    for one in returned:
        remote = one.return_value if one.status is JobStatus.COMPLETED else None
        if isinstance(remote, RemoteJob) and one.hydra_cfg is not None:
            folder = _folder_here(one.hydra_cfg)
            for name, content in remote.records.items():
                if not (folder / name).exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(folder / name, content)
            remote.job.folder = folder
            yield remote


def _folder_here(configured: DictConfig) -> Path:
    """Return the run directory of a job on this machine."""
    return Path(str(configured.hydra.sweep.dir)) / str(configured.hydra.sweep.subdir)
