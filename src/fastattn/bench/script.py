"""How the commands `python -m fastattn.bench.NAME` end: as `fastattn` itself does, in one line where they fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..common.printable import printable
from ..config import is_on


def run(main: Callable[[], int]) -> None:
    """Runs a command and exits: with 2 after a ValueError (bad input), with 1 where a file cannot be written."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        if is_on("FASTATTN_DEBUG", False):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {printable(str(error))}", file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)
