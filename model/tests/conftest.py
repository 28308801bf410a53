"""Chooses Triton's mode: importing the kernels decides it, before anything else loads Triton."""

from __future__ import annotations

import kda_optimized  # noqa: F401 - for what importing it does
