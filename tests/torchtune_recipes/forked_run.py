"""A run of a recipe on several processes, for the price of one import.

    python -m tests.torchtune_recipes.forked_run RECIPE PROCESSES CONFIG key=value ...

Every process is forked from this one and runs the recipe's command, with the variables that torchrun sets. Ends with 1
when one of them does.
"""

import importlib
import os
import socket
import sys

# what a run needs, before anything is forked
import torch
import torch.distributed.checkpoint

from .fork import fork


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    recipe, processes, *words = sys.argv[1:]
    main, port = importlib.import_module(f"torchtune_recipes.{recipe}").main, free_port()

    def work(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        torch.set_num_threads(1)
        sys.argv = [recipe, "--config", *words]
        main()

    children = [fork(lambda rank=rank: work(rank)) for rank in range(int(processes))]
    ends = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(ends))
