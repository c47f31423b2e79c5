"""What one sequence keeps in one mixer layer between steps: a slot.

A slot holds the state after the tokens [0, c), the position c, and a ring of the newest tokens' raw rows,
addressed by position mod ring. The ring serves three ends at once: the window's attention, the replay of tokens
that have left the window since c, and speculation (a rejected token is a row that the next step overwrites).

Rules that make a step's reads and writes independent of how many drafted tokens were accepted, with `step` the
most tokens of a verify step, `rewind` how many of the newest tokens a later step may take back, and `end` the
position after a step's last token:

- the state never holds a token newer than end - rewind - window;
- it is written (flush) only when end + step - c would exceed the ring, then up to exactly that position;
- so a verify step finds every row it reads, and the rows it writes never collide with them.

They keep c in [start + step - ring, start - window] for the first position `start` of every step, or at 0. What a slot
of another history holds is taken as the nearest of those: an engine that measures itself runs steps at positions that
its slots have never come to, and such a step must not walk, or write, past what is set aside for it.

`ring >= window + rewind + step` is what the rules need; what is above that (`slack`) makes flushes rare.

c is kept once for each tile of 16 state rows, all copies equal: a program of a kernel reads and writes the copies of
the tiles it owns, so no program can see a position that another one has moved already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_TOKENS = 16  # of a row in a step of the verify kernel


@dataclass(frozen=True)
class SlotLayout:
    """Shapes and dtypes of a slot.

    Args:
        groups, state_heads, query_heads: G, S and H.
        head_dim, state_size: P and N.
        window: tokens of softmax attention; the state is fed with what has left it.
        conv: width of the short convolution, 0 for none.
        dtype: of the rows (the activations' dtype).
        state_dtype: of the state, fp32 unless told.
        step: most tokens of one verify step, K + 1 with K drafted tokens (1 without speculation).
        rewind: how many of the newest tokens a later step may take back: 0 without speculation, K + 1 for a
            target that verifies K drafts.
        slack: rows beyond the least, how many decode steps pass between two flushes.

    Raises:
        ValueError: a step or rewind that contradict each other.
    """

    groups: int
    state_heads: int
    query_heads: int
    head_dim: int
    state_size: int
    window: int
    conv: int = 0
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    step: int = 1
    rewind: int = 0
    slack: int = 15

    def __post_init__(self) -> None:
        if self.step < 1 or self.rewind < 0:
            raise ValueError(f"step {self.step} must be at least 1 and rewind {self.rewind} at least 0")
        if self.rewind == 0 and self.step > 1:
            raise ValueError(f"a verify step of {self.step} tokens can be rewound; rewind 0 cannot serve it")

    @property
    def ring(self) -> int:
        """Rows of the ring, rounded up to 16."""
        least = self.window + self.rewind + self.step + self.slack
        return -(-least // 16) * 16

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows that a state is cut into, each with its own copy of the checkpoint position."""
        return -(-self.head_dim // 16)

    def checkpoint(self, held_R: torch.Tensor, start_R: torch.Tensor) -> torch.Tensor:
        """c of rows that begin at `start`, from what their slots hold; integers of any one shape."""
        return held_R.maximum(start_R + self.step - self.ring).minimum(start_R - self.window).clamp(min=0)

    @property
    def conv_ring(self) -> int:
        """Rows of the short convolution's ring of inputs: its reach back, a rewind and a step."""
        return self.conv - 1 + self.rewind + self.step if self.conv else 0

    @property
    def channels(self) -> int:
        """Channels of the short convolution: x, B and C side by side."""
        return self.groups * (self.head_dim + self.state_size) + self.query_heads * self.state_size

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of one slot's tensors, widest element first so that views stay aligned."""
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "state": ((self.state_heads, self.head_dim, self.state_size), self.state_dtype),
            "dt": ((self.ring, self.state_heads), torch.float32),
            "position": ((self.state_heads, self.tiles), torch.int32),
            "x": ((self.ring, self.groups, self.head_dim), self.dtype),
            "b": ((self.ring, self.groups, self.state_size), self.dtype),
        }
        if self.conv:
            fields["conv"] = ((self.conv_ring, self.channels), self.dtype)
        order = sorted(fields, key=lambda name: -fields[name][1].itemsize)
        return {name: fields[name] for name in order}

    def bytes(self) -> int:
        """Bytes of one slot in one layer."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.fields().values())


@dataclass
class SlotTensors:
    """One layer's slots as tensors whose first dimension counts slots.

    `state` is read only where `position` (S, tiles) is above zero, and a sequence's first step (start 0) ignores both,
    so a slot handed to a new sequence needs no clearing.
    """

    state: torch.Tensor
    dt: torch.Tensor
    position: torch.Tensor
    x: torch.Tensor
    b: torch.Tensor
    conv: torch.Tensor | None = None

    @classmethod
    def allocate(cls, layout: SlotLayout, slots: int, device: torch.device | str = "cpu") -> SlotTensors:
        """Slots with arbitrary content."""
        return cls(
            **{
                name: torch.empty(slots, *shape, dtype=dtype, device=device)
                for name, (shape, dtype) in layout.fields().items()
            }
        )

    def select(self, order: torch.Tensor) -> SlotTensors:
        """A copy whose slot i is this one's slot order[i] (beam search)."""
        return SlotTensors(**{name: t[order] for name, t in vars(self).items() if t is not None})
