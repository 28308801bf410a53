"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
from optimized_calls import Calls


@pytest.fixture
def calls() -> Calls:
    """Return a builder of calls."""
    return Calls()
