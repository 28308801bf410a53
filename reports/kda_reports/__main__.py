"""Run the command, or say what to install."""

from __future__ import annotations

import sys

USAGE = 2

try:
    from kda_reports.command import app
except ModuleNotFoundError as error:
    print(f"error: reports must have {error.name} installed; run pip install 'kda-suite[reports]'", file=sys.stderr)  # noqa: T201 - the command's own word
    sys.exit(USAGE)

if __name__ == "__main__":
    app(prog_name="python -m kda_reports")
