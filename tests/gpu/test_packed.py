"""Documents of packed rows without a mask: attention and window as with one, and the model's logits."""

from __future__ import annotations

import pytest
import torch
from mamba_hybrid_kernels import document_starts, packed_attention, window_attention
from torch.nn import functional as F

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.config import HybridMambaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
B, L, H, G, N = 3, 333, 8, 2, 64


def documents() -> torch.Tensor:
    """Ids of documents of one token and more."""
    doc_BL = torch.zeros(B, L, dtype=torch.int64, device="cuda")
    doc_BL[0, 100:], doc_BL[0, 101:] = 1, 2
    doc_BL[2, 332:] = 1
    return doc_BL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 64, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_attention(dtype, window, packed):
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(B, L, n, N, device="cuda").to(dtype).requires_grad_() for n in (H, G, G, H))
    doc_BL = documents() if packed else None
    first_D1 = document_starts(doc_BL, B, L, q.device)
    assert first_D1.tolist() == ([0, 100, 101, 333, 666, 998, 999] if packed else [0, 333, 666, 999])
    got = packed_attention(q, k, v, first_D1, window=window)
    q2, k2, v2 = (t.detach().float().requires_grad_() for t in (q, k, v))
    if window:
        want = window_attention(q2, k2, v2, window, doc_BL=doc_BL)
    else:
        mask = torch.ones(L, L, dtype=torch.bool, device="cuda").tril()[None, None]
        if packed:
            mask = mask & (doc_BL[:, None, :, None] == doc_BL[:, None, None, :])
        heads = (t.transpose(1, 2) for t in (q2, k2, v2))
        want = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    mine = torch.autograd.grad(got, (q, k, v), g)
    for one, other in zip(mine, torch.autograd.grad(want, (q2, k2, v2), g.float()), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("state_heads", [8, 2])
def test_logits_of_packed_documents(state_heads):
    torch.manual_seed(0)
    config = HybridMambaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=H,
        num_key_value_heads=G, head_dim=N, layer_types=["linear_attention", "full_attention"] * 2,
        state_heads=state_heads,
    )  # fmt: skip
    model = HybridMambaForCausalLM(config).cuda().bfloat16()
    for layer in model.model.layers:
        if layer.is_mixer:
            layer.mixer.core.float()
    tokens, doc_BL = torch.randint(128, (B, L), device="cuda"), documents()
    with torch.no_grad():
        got = model(tokens, document_ids=doc_BL).logits.float()
        alone = [
            model(row[ids == d][None]).logits[0].float()
            for row, ids in zip(tokens, doc_BL, strict=True)
            for d in range(int(ids.max()) + 1)
        ]
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(alone), rtol=5e-2, atol=0.1)
