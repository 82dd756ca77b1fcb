"""``python -m vit_cls``: the same command as ``vit-cls``."""

import sys

from vit_cls.cli import main

if __name__ == "__main__":
    sys.exit(main())
