"""A run of `distill_hybrid` on several processes, for the price of one import.

    python -m tests.torchtune_recipes.forked_run PROCESSES CONFIG key=value ...

Every process is forked from this one and runs the recipe's command, with the variables that torchrun sets. Ends with 1
when one of them does.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable

# what a run needs, before anything is forked
import torch
import torch.distributed.checkpoint

from torchtune_recipes.distill_hybrid import main


def start(rank: int, processes: int, port: int, run: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    code = 1
    try:
        run()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def each(processes: int, run: Callable[[], object]) -> bool:
    """Fork so many processes that run this, wait for them, and say whether one has failed."""
    port = free_port()
    children = [start(rank, processes, port, run) for rank in range(processes)]
    return any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    processes = int(sys.argv[1])
    sys.argv = ["distill_hybrid", "--config", *sys.argv[2:]]
    sys.exit(each(processes, main))
