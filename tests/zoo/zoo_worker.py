"""A process that tries what it is told: one JSON line in, one out.

    zoo_worker.py         reads {"architecture": ..., "changes": ...}, answers {"outcome": ..., "words": ...}

A process of its own, for a model may end it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    # The answers' stream is for nobody else.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "support")]
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    logging.disable(logging.WARNING)
    from zoo_trial import tried

    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            verdict = tried(job["architecture"], job["changes"], Path(folder))
        gc.collect()  # a model that was patched refers to itself
        print(json.dumps({"outcome": verdict.outcome, "words": verdict.words}), file=answers)


if __name__ == "__main__":
    main()
