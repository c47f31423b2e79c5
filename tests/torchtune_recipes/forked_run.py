"""A run of a recipe on several processes, for the price of one import.

    python -m tests.torchtune_recipes.forked_run RECIPE PROCESSES CONFIG key=value ...

Every process is forked from this one and runs the recipe's command, with the variables that torchrun sets. Ends with 1
when one of them does.
"""

import importlib
import os
import socket
import sys
from collections.abc import Callable

# what a run needs, before anything is forked
import torch
import torch.distributed.checkpoint

from .fork import fork


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def each(processes: int, run: Callable[[], object]) -> bool:
    """Fork so many processes that run this, wait for them, and say whether one has failed."""
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        torch.set_num_threads(1)
        run()

    children = [fork(lambda rank=rank: work(rank)) for rank in range(processes)]
    return any([os.waitpid(child, 0)[1] for child in children])


if __name__ == "__main__":
    recipe, count, *words = sys.argv[1:]
    main = importlib.import_module(f"torchtune_recipes.{recipe}").main
    sys.argv = [recipe, "--config", *words]
    sys.exit(each(int(count), main))
