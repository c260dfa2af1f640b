"""What only a GPU can answer, in two calls: whether it is right there, and how fast it is.

    python benchmarks/gpu_check.py right     # at most 7 minutes
    python benchmarks/gpu_check.py fast      # at most 5 minutes
    python benchmarks/gpu_check.py right fast --small     # all of it without a GPU

Each part stands alone: what raises is a row that says FAILED, and what the time does not reach says
so.  Rows are printed as they come, and as a table at the end; where the environment has OUT, they
are in $OUT/gpu_check.json too, with profiles beside them.  Needs torch, transformers and what the
package imports, no network (HF_HUB_OFFLINE=1 then) and no model; benchmarks/README.md says how
packages are taken along.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gpu.ceilings import ceilings, machine
from gpu.check import Check
from gpu.codes import codes, compiled_codes, integers
from gpu.learning import graphs, repeats, steps
from gpu.speed import blocks, profiled, quantizers, streams
from gpu.whole_run import whole_run
from lrquant.model.arithmetic import full_precision_sums, prepare_repeatable
from lrquant.model.device import choose_device

PARTS: dict[str, dict[str, Callable[[Check], None]]] = {
    "right": {
        "machine": machine,
        "ceilings": ceilings,
        "codes": codes,
        "integers": integers,
        "steps": steps,
        "whole run": whole_run,
        "repeats": repeats,
        "graphs": graphs,
        "compiled codes": compiled_codes,
    },
    "fast": {
        "machine": machine,
        "quantizers": quantizers,
        "profile": profiled,
        "streams": streams,
        "blocks": blocks,
    },
}
SECONDS = {"right": 330, "fast": 210}  # after which no part begins any more


def main() -> int:
    """Carry out what is asked for; 1 if something failed."""
    options = _options()
    out = os.environ.get("OUT")
    seconds = sum(SECONDS[half] for half in options.halves)
    device = choose_device("cpu" if options.small else options.device)
    prepare_repeatable(device)
    check = Check(device, options.small, seconds, None if out is None else Path(out))
    with full_precision_sums():
        for half in options.halves:
            for name, part in PARTS[half].items():
                if name not in options.without:
                    check.run(name, part)
    print(f"\n{check.summary()}\nfailed: {len(check.failed)} of {len(check.rows)} rows")
    return int(bool(check.failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("halves", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--without", nargs="*", default=[], help="parts to leave out, by name")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
