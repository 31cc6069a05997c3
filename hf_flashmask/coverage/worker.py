"""A process that checks the types named on its stdin and writes a JSON row a line; ``run.py`` starts and watches it."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import warnings

MEMORY_LIMIT = 16 << 30  # of addresses: a configuration that is not tiny fails instead of filling the machine


def main() -> None:
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what models print must not mix with the rows
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    import torch
    import transformers

    from .cases import check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows.write("ready\n")
    for line in sys.stdin:
        kind, model_type = json.loads(line)
        rows.write(json.dumps(check(kind, model_type).as_dict()) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
