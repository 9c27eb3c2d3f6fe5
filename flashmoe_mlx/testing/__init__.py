"""Tests for stores, here and elsewhere; needs the ``test`` extra."""

import pytest

pytest.register_assert_rewrite("flashmoe_mlx.testing.store_tests")

from flashmoe_mlx.testing.store_tests import ExpertStoreTests, Fault  # noqa: E402  # its asserts explain themselves only if registered first
from flashmoe_mlx.testing.stored_experts import StoredExperts  # noqa: E402

__all__ = ["ExpertStoreTests", "Fault", "StoredExperts"]
