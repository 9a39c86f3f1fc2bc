"""``python -m ghost_ops``: what was built, which backend runs where, and why not another."""

import sys

from .diagnosis.command import main

if __name__ == "__main__":
    sys.exit(main())
