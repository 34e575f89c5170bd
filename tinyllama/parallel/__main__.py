"""torchrun without its report: `python -m tinyllama.parallel --nproc-per-node 2 scripts/generate.py ...`.

The arguments are those of torchrun. Where a rank fails, it says so in one line, torchrun adds some forty, and
its exit status is always 1. Here the line is all, and the status is that of the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tinyllama.cli import terminal
from tinyllama.cli.together import LAUNCHED
from tinyllama.parallel.ranks import SECONDS


def main() -> int:
    """Start the ranks and wait for them; the exit status of a script."""
    logging.disable()
    args = run.parse_args(sys.argv[1:])
    os.environ[LAUNCHED] = "1"
    if args.nproc_per_node.isdigit():  # torchrun would give each one thread, and say so at length
        cores = max(1, (os.cpu_count() or 1) // int(args.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    # After Ctrl-C heal.py ends its step, saves, and measures; torchrun would kill it after 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(SECONDS)))
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        for other, one in error.failures.items():
            # Ranks that lost another end within the same look at them; SIGTERM is torchrun's own.
            if one.exitcode < 0 and one.exitcode != -signal.SIGTERM:
                rank, failure = other, one
        if failure.exitcode > 0:  # it said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        why = "; the system does so where memory runs out" if name == "SIGKILL" else ""
        terminal.refuse(f"ranks: rank {rank} was ended by {name}{why}")
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
