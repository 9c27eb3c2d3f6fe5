"""Claims of the documents: the example of a store works, and the named tests exist."""

import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

from flashmoe_mlx.testing import ExpertStoreTests

ROOT = Path(__file__).parents[1]


def example() -> str:
    """Return the source of the store in docs/extend/store.md."""
    blocks = re.findall(
        r"^ *```python\n(.*?)^ *```$", (ROOT / "docs" / "extend" / "store.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return next(textwrap.dedent(block) for block in blocks if "(ExpertStore):" in block)


class TestExampleStore(ExpertStoreTests):
    backend = {"_target_": "example_of_a_store.PlainStore"}
    options = {"slots": 6}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def module(cls) -> None:
        module = types.ModuleType("example_of_a_store")
        sys.modules["example_of_a_store"] = module
        exec(compile(example(), "store.md", "exec"), module.__dict__)


def test_tests_named_in_faults_exist() -> None:
    sources = [*(ROOT / "tests").glob("*.py"), *(ROOT / "flashmoe_mlx" / "testing").glob("*.py")]
    code = "".join(path.read_text() for path in sources)
    document = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"(test_\w+)`", document))
    assert len(named) > 40
    assert {name for name in named if f"def {name}(" not in code} == set()
    classes = set(re.findall(r"`(Test\w+)`", document))
    assert len(classes) >= 4
    assert {name for name in classes if f"class {name}(" not in code} == set()
