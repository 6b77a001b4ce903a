"""`python -m tandem.launch.child MODULE ARGS...` runs a module as `python -m MODULE ARGS...` would, in this process,
tied to the life of the process that started it. What it runs need not know that it has a parent.
"""

from __future__ import annotations

import runpy
import sys

from tandem.launch.parent import exit_with_parent
from tandem.process.standard_streams import never_block


def main() -> None:
    never_block()
    exit_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
