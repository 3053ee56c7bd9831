"""``python -m kvshare`` is the command ``kvshare``."""

from __future__ import annotations

import sys

from kvshare.cli import main

if __name__ == "__main__":
    sys.exit(main())
