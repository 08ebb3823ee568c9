"""``python -m glassbox_utils COMMAND``: the ``glassbox`` command where no script was installed, or there is no make."""

import sys

from glassbox_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
