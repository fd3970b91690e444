"""``python -m lionax``."""

import sys

from lionax.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
