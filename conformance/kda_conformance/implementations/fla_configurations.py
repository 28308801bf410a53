"""Write one launch configuration of every kernel of ``fla-core``, so that judging it compiles each kernel once a shape.

The package tunes every kernel at every new shape: some two hundred compilations a call of a new width, hours for a suite. Its own setting
``FLA_CACHE_MODE=default`` with ``FLA_CONFIG_DIR`` takes the configuration from a file instead. The one written here is, of those that
the package offers, the one with the smallest tiles, then the fewest stages, then four warps or nearest to it: it fits every width. So what
is judged are the kernels in this configuration; faults that only another one has are not seen.

    python -m kda_conformance.implementations.fla_configurations FOLDER
"""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import fla.ops.kda
from fla.ops.utils.cache import CachedAutotuner

USUAL_WARPS = 4


def write_configurations(folder: Path) -> int:
    """Write a file for each kernel that the KDA operators load; return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    tuners = [found for found in gc.get_objects() if isinstance(found, CachedAutotuner)]
    for tuner in tuners:
        chosen = min(tuner.configs, key=_size)
        entry = {
            "kwargs": chosen.kwargs,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            "num_ctas": chosen.num_ctas,
        }
        (folder / f"{tuner.kernel_name}.json").write_text(json.dumps({"default_config": entry}))
    return len(tuners)


def _size(configuration: Any) -> tuple[float, int, int]:  # noqa: ANN401 - Triton's, without a type
    return (
        math.prod(configuration.kwargs.values()),
        configuration.num_stages,
        abs(configuration.num_warps - USUAL_WARPS),
    )


if __name__ == "__main__":
    sys.stdout.write(f"{write_configurations(Path(sys.argv[1]))} kernels of {fla.ops.kda.__name__}\n")
