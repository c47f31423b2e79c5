"""What FSDP moves in a step, and how much of it between nodes.

Symbols: N GPUs, s of them share a copy of the models (`data_parallel_shard`, else all), R = N / s copies; in one node
are m of the s, and k of a GPU's R counterparts.

All of it goes in rings. Gathering or reduce-scattering a unit of U bytes brings U (s - 1)/s to each GPU. A ring enters
a node once; m rings with a part of the unit each do so over the links of m GPUs, so that 1/m of what comes to a GPU
comes from another node, if there is one. With copies, the U/s of a gradient that a GPU is left with are then summed
with its counterparts': 2 (U/s)(R - 1)/R, of which 1/k comes from another node.

Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
"""

from __future__ import annotations

from dataclasses import dataclass

from mamba_hybrid.errors import UserError


@dataclass(frozen=True)
class Exchange:
    """Units that FSDP gathers and gradients that it sums.

    Args:
        gathered, summed: bytes of whole units.
        gathers, sums: how many there are.
    """

    gathered: float = 0
    summed: float = 0
    gathers: int = 0
    sums: int = 0

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(
            self.gathered + other.gathered, self.summed + other.summed,
            self.gathers + other.gathers, self.sums + other.sums,
        )  # fmt: skip

    def __mul__(self, times: int) -> Exchange:
        return Exchange(self.gathered * times, self.summed * times, self.gathers * times, self.sums * times)


@dataclass(frozen=True)
class Load:
    """What an exchange costs one GPU.

    Args:
        within, between: bytes that come to it from GPUs of its node, and from others.
        hops: messages that wait for one another, in rings.
    """

    within: float
    between: float
    hops: int

    def seconds(self, link: float, node_link: float, hop: float) -> float:
        """Time for it, if both kinds of links are busy together.

        Args:
            link, node_link: bytes a second to a GPU, within a node and from other nodes.
            hop: seconds of a message without content.
        """
        return max(self.within / link, self.between / node_link) + self.hops * hop


@dataclass(frozen=True)
class Layout:
    """Where a run's GPUs are.

    Args:
        gpus: N.
        shard: s.
        node: GPUs of a node.

    Raises:
        UserError: numbers that do not divide as they must.

    Example:
        >>> Layout(gpus=64, shard=8, node=8).load(Exchange(gathered=8e9, summed=16e9))
        Load(within=21000000000.0, between=3500000000.0, hops=0)
    """

    gpus: int
    shard: int
    node: int

    def __post_init__(self) -> None:
        if self.node < 1 or (self.gpus > self.node and self.gpus % self.node):
            raise UserError(f"--gpus-per-node {self.node} does not divide the {self.gpus} GPUs (--gpus)")
        if self.gpus % self.shard:
            raise UserError(f"data_parallel_shard {self.shard} does not divide the {self.gpus} GPUs (--gpus)")
        if self.shard % self.near and self.node % self.shard:
            raise UserError(
                f"data_parallel_shard {self.shard}: of it and --gpus-per-node {self.node} one must divide the other"
            )

    @property
    def copies(self) -> int:
        """R."""
        return self.gpus // self.shard

    @property
    def near(self) -> int:
        """m."""
        return min(self.shard, self.node)

    @property
    def alike(self) -> int:
        """k."""
        return min(max(self.node // self.shard, 1), self.copies)

    def load(self, e: Exchange) -> Load:
        """What an exchange costs one GPU."""
        s, R, m, k = self.shard, self.copies, self.near, self.alike
        units, copies = (e.gathered + e.summed) * (s - 1) / s, 2 * (e.summed / s) * (R - 1) / R
        between = (units / m if s > m else 0) + (copies / k if k < R else 0)
        return Load(units + copies - between, between, e.gathers * (s - 1) + e.sums * (s - 1 + 2 * (R - 1)))
