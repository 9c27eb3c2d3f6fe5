"""The page of ``task=simulate html=``: complete in itself, bounded, and equal to its trace."""

import base64
import re
import zlib
from pathlib import Path

import pytest

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.traces import replay_page
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.research.traces.replay_page import write_replay_page


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "made.moetrace"
    zipf_trace(40, 5, 32, 4, 1.0, seed=1).save(path)
    return path


def test_the_data_is_the_trace(trace: Path, tmp_path: Path) -> None:
    write_replay_page(trace, tmp_path / "out.html")
    found = re.search('id="trace">([^<]*)<', (tmp_path / "out.html").read_text())
    assert found is not None
    assert zlib.decompress(base64.b64decode(found[1])) == trace.read_bytes()


def test_nothing_is_outside_the_page(trace: Path, tmp_path: Path) -> None:
    write_replay_page(trace, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"\w+://[^\s\"'`)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of SVG, which nothing fetches
    assert not re.search(r"\b(src|href|srcset|action)\s*=|url\(|@import|\bimport[ (]|^export ", page, re.MULTILINE)
    assert page.count("<script") == page.count("</script>") == 2


def test_a_large_trace_is_refused(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_page, "MOST_BYTES", 10_000)
    with pytest.raises(InputError) as caught:
        write_replay_page(trace, tmp_path / "out.html")
    assert caught.value.code == "page_too_large"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_replay_page(trace, tmp_path / "none" / "out.html")
    assert caught.value.code == "cannot_write_page"
