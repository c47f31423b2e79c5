"""Prefix sums inside a Triton program.

Shapes: J rows, in the function K blocks of Q rows each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefix_sum(a_J, J: tl.constexpr):
    """Sums of a_0 .. a_j for every j; J a power of two and at least 16.

    Not tl.cumsum: Triton 3.6 may place a scan in a layout that holds each element in several lanes, and on a GPU it
    then adds up other elements' sums (`docs/kernels.md`). Masked sums have no such layouts to fear.
    """
    Q: tl.constexpr = 16
    K: tl.constexpr = J // Q
    q_Q = tl.arange(0, Q)
    a_KQ = tl.reshape(a_J, (K, Q))
    within_KQ = tl.sum(tl.where((q_Q[None, :] <= q_Q[:, None])[None, :, :], a_KQ[:, None, :], 0), 2)
    if K == 1:
        return tl.reshape(within_KQ, (J,))
    k_K = tl.arange(0, K)
    before_K = tl.sum(tl.where(k_K[None, :] < k_K[:, None], tl.sum(a_KQ, 1)[None, :], 0), 1)
    return tl.reshape(within_KQ + before_K[:, None], (J,))
