"""Prefix caching of mixers on vLLM's Model Runner V2: whole slots copied between a sequence's blocks.

Shapes: R rows of the batch, Q request places of the runner, L mixer layers, F cache groups of mixer layers.

With prefix caching a sequence has a column of blocks, column a for the tokens up to (a + 1) block_size. It works in the
block of its newest token, and a block that it has left is a snapshot of the sequence at that block's end: a slot is
addressed by position, so a copy of it serves wherever the sequence stands within what a later step may take back.

- Before a step that ends in another column than the step before, the slot is copied there.
- A verify step may end beyond a boundary that its accepted tokens reach only now. The tokens up to the boundary are
  then in the slot of the next column, and that is copied back into the block that the boundary ends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

PIECES, WORDS = 8, 2048  # programs that copy a slot, and 32-bit words of a copy's step


@triton.jit
def _copy(
    index_ptr, source_ptr, target_ptr, accepted_ptr, computed_ptr,
    page_ptr, page_stride_ptr, words_ptr, group_ptr, table_ptr, table_stride_ptr,
    BLOCK_SIZE: tl.constexpr, AFTER: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """AFTER a step from the working column to the one whose end was reached, before it from `source` to `target`."""
    row, layer, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(index_ptr + row)
    if request < 0:
        return
    source = tl.load(source_ptr + request)
    if AFTER:
        computed = tl.load(computed_ptr + request)
        target = (computed // BLOCK_SIZE - 1).to(tl.int32)
        before = computed - tl.load(accepted_ptr + request)
        if (target >= source) | (before >= (target + 1) * BLOCK_SIZE):
            return
    else:
        target = tl.load(target_ptr + request)
    if (source < 0) | (target < 0) | (source == target):
        return
    group = tl.load(group_ptr + layer)
    table = tl.load(table_ptr + group).to(tl.pointer_type(tl.int32)) + request.to(tl.int64) * tl.load(
        table_stride_ptr + group
    )
    from_block = tl.load(table + source).to(tl.int64)
    to_block = tl.load(table + target).to(tl.int64)
    if (from_block <= 0) | (to_block <= 0) | (from_block == to_block):  # block 0 is no one's
        return
    page = tl.load(page_ptr + layer).to(tl.pointer_type(tl.int32))
    stride, words = tl.load(page_stride_ptr + layer), tl.load(words_ptr + layer)
    each = (words + PIECES - 1) // PIECES
    end = tl.minimum((piece + 1) * each, words)
    for at in range(piece * each, end, WORDS):
        word = at + tl.arange(0, WORDS)
        value = tl.load(page + from_block * stride + word, mask=word < end)
        tl.store(page + to_block * stride + word, value, mask=word < end)


class SlotMover:
    """Copies slots in all mixer layers in one launch. It has the methods that vLLM's model state calls.

    Args:
        layers: of each mixer layer its fields (blocks, ...) as `bind_kv_cache` cut them, and its group's number.
        tables: block tables of the groups, int32 (Q, columns).
        block_size: tokens of a column.
    """

    def __init__(self, layers: list[tuple[tuple[Tensor, ...], int]], tables: list[Tensor], block_size: int) -> None:
        device = tables[0].device
        rows = []
        for fields, group in layers:
            stride = fields[0].stride(0) * fields[0].element_size()
            size = sum(field[0].numel() * field.element_size() for field in fields)
            if stride % 4 or size % 4 or fields[0].data_ptr() % 4:
                raise ValueError(f"slots of {size} bytes, {stride} apart, are no whole 32-bit words")
            rows.append((fields[0].data_ptr(), stride // 4, size // 4, group))

        def on_device(values) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        self.columns = [on_device(column) for column in zip(*rows, strict=True)]
        self.tables = [on_device(t.data_ptr() for t in tables), on_device(t.stride(0) for t in tables)]
        self.layers, self.block_size = len(layers), block_size

    def _launch(self, rows: int, index_R, source_Q, target_Q, accepted_Q, computed_Q, *, after: bool) -> None:
        _copy[(rows, self.layers, PIECES)](
            index_R, source_Q, target_Q, accepted_Q, computed_Q, *self.columns, *self.tables,
            BLOCK_SIZE=self.block_size, AFTER=after, PIECES=PIECES, WORDS=WORDS,
        )  # fmt: skip

    def run_fused_precopy(self, rows: int, column_Q, before_Q, _bias_Q, index_R) -> None:
        """Before a step: from the column of the last step to this one's."""
        self._launch(rows, index_R, before_Q, column_Q, None, None, after=False)

    def run_fused_postprocess_align(self, rows: int, accepted_Q, column_Q, computed_Q, index_R) -> None:
        """After a step: into the block whose end the accepted tokens have reached from within."""
        self._launch(rows, index_R, column_Q, None, accepted_Q, computed_Q, after=True)


class SnapshotState(MambaHybridModelState):
    """vLLM's model state of hybrids, with `SlotMover` for what it copies."""

    def initialize_kv_cache(self, kv_cache_config, block_tables) -> None:
        if not self._align_mode:
            return
        groups, spec = self._get_mamba_group_info(kv_cache_config)
        known = self.vllm_config.compilation_config.static_forward_context
        layers = [
            (known[name].kv_cache, i)
            for i, group in enumerate(groups)
            for name in kv_cache_config.kv_cache_groups[group].layer_names
        ]
        tables = [block_tables.block_tables[group].gpu for group in groups]
        self._mamba_ctx = SlotMover(layers, tables, spec.block_size)  # type: ignore[assignment]
