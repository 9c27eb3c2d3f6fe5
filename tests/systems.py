"""Marks for tests that need features of some systems."""

import platform
import sys

import pytest

from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.uring import Ring


def _why_no_io_uring() -> str | None:
    try:
        Ring(1, workers=False).close()
    except BackendUnavailableError as error:
        return str(error)
    return None


WHY_NO_IO_URING = _why_no_io_uring()
needs_io_uring = pytest.mark.skipif(WHY_NO_IO_URING is not None, reason=str(WHY_NO_IO_URING))
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this feature")
needs_nvrtc = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="NVIDIA's compiler has no wheel for this system"
)
