"""Jobs of a sweep in other processes: their outcomes and records come back to the process of the sweep."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from flashmoe_mlx.cli.remote_jobs import outcome, take_home
from flashmoe_mlx.cli.sweeps import Job


def job_return(value: object, folder: Path, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    """Return what a launcher returns for a job whose folder on this machine is ``folder``."""
    configured = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder.parent), "subdir": folder.name}}})
    return JobReturn(hydra_cfg=configured, status=status, _return_value=value)


def test_records_come_home(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here" / "0"
    there.mkdir()
    (there / "bench.json").write_text("{}")
    (there / "failure.json").write_text('{"error": "no"}')
    sent = pickle.loads(pickle.dumps(outcome(Job(there, ["experts_k=2"], "no"), 2, None)))
    failed = job_return(RuntimeError("lost"), tmp_path / "here" / "1", JobStatus.FAILED)
    local = job_return(0.5, tmp_path / "here" / "2")
    (taken,) = take_home([job_return(sent, here), failed, local])
    assert (taken.code, taken.job.folder, taken.job.failure) == (2, here, "no")
    assert {path.name for path in here.iterdir()} == {"bench.json", "failure.json"}
    with pytest.raises(TypeError):
        float(taken)
    assert float(outcome(Job(there, []), 0, 1.5)) == 1.5


def test_records_of_a_shared_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    sent = outcome(Job(tmp_path, []), 0, None)
    sent.records["metrics.json"] = b"changed"
    assert len(list(take_home([job_return(sent, tmp_path)]))) == 1
    assert (tmp_path / "metrics.json").read_text() == "{}"


@pytest.fixture
def two_workers() -> Iterator[str]:
    """Start Ray with two workers that have a disk each, and return its address."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    ray = str(Path(sys.executable).with_name("ray"))
    common = ["--num-cpus=1", "--object-store-memory=80000000", '--resources={"disk": 1}', "--disable-usage-stats"]
    subprocess.run([ray, "start", "--head", "--port=6398", "--include-dashboard=false", *common], check=True)
    subprocess.run([ray, "start", "--address=127.0.0.1:6398", *common], check=True)
    yield "127.0.0.1:6398"
    subprocess.run([ray, "stop"], check=True)


@pytest.mark.thorough
def test_a_sweep_runs_on_two_workers_of_ray(two_workers: str, tmp_path: Path) -> None:
    options = ["backends=[pread]", "tokens=4", "rounds=1", "experts_k=2,3,400", f"hydra.sweep.dir={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "flashmoe_mlx", "-m", "experiment=cluster", *options]
    command.append(f"hydra.launcher.ray.init.address={two_workers}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ})
    assert done.returncode == 2, done.stderr
    assert "1 of 3 jobs failed" in done.stderr
    assert "2 experts_k=400: " in done.stderr
    for job in ("0", "1"):
        assert json.loads((tmp_path / "out" / job / "bench.json").read_text())["passes"]
