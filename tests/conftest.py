"""What every test can rely on, however pytest was started."""

from __future__ import annotations

import signal

# A non-interactive shell starts its background jobs (`pytest &` in a script) with SIGINT ignored, and children inherit
# that: Ctrl-C in a test would reach nobody. A handler does not survive exec, so children begin with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
