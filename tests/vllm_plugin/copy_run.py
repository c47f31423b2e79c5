"""Copies slots by `SlotMover` in Triton's interpreter and by a loop; run with `interpreted_triton` on the path."""

import random

import torch

from vllm_plugin.snapshots import SlotMover

REQUESTS, COLUMNS, BLOCKS, BLOCK_SIZE = 6, 5, 40, 16


def pages(layers: int, words: int, stride: int) -> list[torch.Tensor]:
    """int32 (blocks, words) of each layer, with room between the slots that no one may touch."""
    return [torch.randint(0, 2**31 - 1, (BLOCKS, stride), dtype=torch.int32)[:, :words] for _ in range(layers)]


def main() -> None:
    for seed in range(12):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        layers = [(page, rng.randrange(2)) for page in pages(3, rng.choice([4, 70, 5000]), 5008)]
        # blocks of a sequence are its own; 0 is no one's
        order = torch.randperm(BLOCKS - 1)[: REQUESTS * COLUMNS].view(REQUESTS, COLUMNS).int() + 1
        tables = [order, order.flip(1).contiguous()]
        fields = [((page[:, :2].view(torch.float32), page[:, 2:]), group) for page, group in layers]
        mover = SlotMover(fields, tables, BLOCK_SIZE)
        index = torch.tensor([*rng.sample(range(REQUESTS), 4), -1])
        source, target = (
            torch.tensor([rng.randrange(-1, COLUMNS) for _ in range(REQUESTS)], dtype=torch.int32) for _ in range(2)
        )
        accepted = torch.tensor([rng.randrange(1, 6) for _ in range(REQUESTS)], dtype=torch.int32)
        computed = torch.tensor([rng.randrange(0, COLUMNS * BLOCK_SIZE) for _ in range(REQUESTS)], dtype=torch.int32)
        for after in (False, True):
            want = [page.clone() for page, _ in layers]
            for r in index[:-1].tolist():
                s, d = int(source[r]), int(target[r])
                if after:  # the last boundary that the accepted tokens have reached
                    d = int(computed[r]) // BLOCK_SIZE - 1
                    if int(computed[r]) - int(accepted[r]) >= (d + 1) * BLOCK_SIZE or d >= s:
                        continue
                if min(s, d) >= 0:
                    for page, (_, group) in zip(want, layers, strict=True):
                        page[tables[group][r, d]] = page[tables[group][r, s]]
            if after:
                mover.run_fused_postprocess_align(len(index), accepted, source, computed, index)
            else:
                mover.run_fused_precopy(len(index), target, source, None, index)
            for (page, _), expected in zip(layers, want, strict=True):
                assert torch.equal(page, expected), (seed, after)
    print("copies are right")


if __name__ == "__main__":
    main()
