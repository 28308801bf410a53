"""What pytest-benchmark writes beside its numbers: the same fingerprint as rows carry."""

from __future__ import annotations

from typing import Any

from kda_conformance.rows import fingerprint


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add libraries, commit and processor."""
    machine_info["kda"] = fingerprint()
