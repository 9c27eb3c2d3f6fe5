"""``backend=auto`` on the command line."""

from pathlib import Path

import pytest

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import ModelChoice


def test_options_that_auto_would_ignore_are_refused(tmp_path: Path) -> None:
    """The error comes before the measurement of the machine, which takes minutes."""
    settings = {"_target_": "auto", "variant": None, "mirrors": [], "budget_gib": 3}
    with pytest.raises(InputError, match=r"backend\.budget_gib") as caught:
        chosen_backend(settings, tmp_path, ModelChoice(cache_dir=str(tmp_path)), None)
    assert caught.value.code == "unknown_option"
