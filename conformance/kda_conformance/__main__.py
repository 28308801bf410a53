"""``python -m kda_conformance`` is the command ``kda``."""

from kda_conformance.cli import main

if __name__ == "__main__":
    main()
