"""In which numbers KV travels: an option of whatever carries payloads, and the sender's to choose.

    native   the pool's own bytes; what arrives is what was sent
    int8     a quarter of float32's bytes, half of the others'; lossy (kv_transfer/frames/int8.py)

The open frame says which, and both ends make it from their own layout. Carriers that move no payload (`local`) have
no use for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kv_transfer.frames.cells import Native
from kv_transfer.frames.int8 import Int8
from kv_transfer.frames.layout import KVLayout
from tandem.errors import Refused

# What `worker.wire_dtype` may say, and what a receiver takes.
WIRE_DTYPES: Mapping[str, type[Native]] = {Native.name: Native, Int8.name: Int8}


def wire_dtype(name: str, layout: KVLayout) -> Native:
    """Raises Refused for a name that this worker does not know."""
    if name not in WIRE_DTYPES:
        raise Refused(f"KV in wire dtype {name[:20]!r} is unknown to this worker; it takes {', '.join(WIRE_DTYPES)}")
    return WIRE_DTYPES[name](layout)
