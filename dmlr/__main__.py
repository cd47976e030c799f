"""`python -m dmlr …`, see `dmlr.cli`."""

import sys

from dmlr.cli import main

if __name__ == "__main__":
    sys.exit(main())
