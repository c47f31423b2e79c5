import pytest
import torch

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from mamba_hybrid.carry import Carry

KINDS = {
    "window": {"window": 8, "state_heads": 2},
    "window and convolution": {"window": 5, "short_conv": 4},
    "paper": {"window": 0, "short_conv": 4, "gate": "silu", "norm": "after_gate"},
    "pure": {"window": 0, "state_heads": 4},
}
L = 60
# borders in the middle of chunks of 16, at their ends, a token behind, and within the window before
DOCUMENTS = [[L], [10, 22, 28], [16, 17, 27], [3, 26, 2, 1, 28], [31, 29], [15, 1, 44]]


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    config = HybridMambaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"], **KINDS[kind],
    )  # fmt: skip
    model = HybridMambaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for layer in config.mixer_layers:  # slow decays: what is far away must matter
            model.model.layers[layer].mixer.core.A_log.sub_(4)
    return model.model


def rows(seed=0):
    g = torch.Generator().manual_seed(seed)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in DOCUMENTS])
    return torch.randint(0, 50, documents.shape, generator=g), documents


def chunked(model, tokens, documents, size):
    carry = Carry()
    for t, d in zip(tokens.split(size, 1), documents.split(size, 1), strict=True):
        yield model(t, document_ids=d, carry=carry).last_hidden_state
        carry = carry.following(d)


@pytest.mark.parametrize("size", [11, 16, 59])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_hidden_states_of_the_whole_row(kind, size):
    model, (tokens, documents) = model_of(kind), rows()
    with torch.no_grad():
        whole = model(tokens, document_ids=documents).last_hidden_state
        parts = torch.cat(list(chunked(model, tokens, documents, size)), 1)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        # what came before does matter
        pieces = zip(tokens.split(size, 1), documents.split(size, 1), strict=True)
        alone = torch.cat([model(t, document_ids=d).last_hidden_state for t, d in pieces], 1)
    assert (alone[0] - whole[0]).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact_where_no_document_crosses_a_border(kind):
    model, (tokens, _) = model_of(kind).double(), rows()
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([16, 16, 16, 12])).expand(len(tokens), -1)
    weight = torch.randn(len(tokens), L, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    whole = torch.autograd.grad(
        (model(tokens, document_ids=documents).last_hidden_state * weight).sum(), list(model.parameters())
    )
    for h, w in zip(chunked(model, tokens, documents, 16), weight.split(16, 1), strict=True):
        (h * w).sum().backward()
    for (name, p), expected in zip(model.named_parameters(), whole, strict=True):
        # the norms are fp32 in any case, and the paper's block has steep ones
        assert (p.grad - expected).norm() < 5e-4 * expected.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learnt_through_a_border(kind):
    model, (tokens, documents) = model_of(kind), rows()
    first, second = (model.embed_tokens(t).detach().requires_grad_() for t in (tokens[:1, :16], tokens[:1, 16:]))
    carry = Carry()
    model(inputs_embeds=first, document_ids=documents[:1, :16], carry=carry)
    carry = carry.following(documents[:1, :16])
    out = model(inputs_embeds=second, document_ids=documents[:1, 16:], carry=carry).last_hidden_state
    assert torch.autograd.grad(out.sum(), (first, second), allow_unused=True)[0] is None


def test_a_chunk_that_is_run_again_leaves_the_same():
    """As recomputed activations do."""
    model, (tokens, documents) = model_of("window and convolution"), rows()
    carry = Carry()
    model(tokens[:, :16], document_ids=documents[:, :16], carry=carry)
    carry = carry.following(documents[:, :16])
    with torch.no_grad():
        once, again = (
            model(tokens[:, 16:32], document_ids=documents[:, 16:32], carry=carry).last_hidden_state for _ in range(2)
        )
    assert torch.equal(once, again) and carry.following(documents[:, 16:32]).documents.shape[1] == 32


def test_what_a_chunk_does_not_take():
    model, (tokens, documents) = model_of("window"), rows()
    for more in (
        {},
        {"document_ids": documents, "attention_mask": documents},
        {"position_ids": documents, "document_ids": documents},
    ):
        with pytest.raises(ValueError, match="chunks of long rows take document_ids"):
            model(tokens, carry=Carry(), **more)
