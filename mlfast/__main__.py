"""``python -m mlfast``: the command line."""

import sys

from mlfast.cli import main

sys.exit(main())
