"""The conformance suite for stores of this package and of others; it needs the ``test`` extra."""

import pytest

pytest.register_assert_rewrite("flashmoe_mlx.testing.store_tests")

from flashmoe_mlx.testing.store_tests import ExpertStoreTests, Fault  # noqa: E402  # registered first, so that pytest rewrites its asserts
from flashmoe_mlx.testing.stored_experts import StoredExperts  # noqa: E402

__all__ = ["ExpertStoreTests", "Fault", "StoredExperts"]
