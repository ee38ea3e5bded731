"""``python -m lightning_mlc``."""

import sys

from lightning_mlc.cli import main

if __name__ == "__main__":
    sys.exit(main())
