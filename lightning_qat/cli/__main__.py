"""``python -m lightning_qat.cli``."""

import sys

from lightning_qat.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
