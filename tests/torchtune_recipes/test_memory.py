"""One step at the shape of SmolLM2-135M and 2,048 tokens, with every tensor that is made watched."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.checkpoint import save_model
from mamba_hybrid.source import hybrid_config
from tests.tiny import save_text, tokenizer
from torchtune_recipes.distill_hybrid import DistillHybrid

from .conftest import CONFIG

VOCABULARY, TOKENS, CHUNK = 49_152, 2_048, 256
SMOLLM2 = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, those of the backward pass included."""

    largest, shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() > self.largest:
                self.largest, self.shape = t.numel(), (str(func), tuple(t.shape))
        return out


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Random checkpoints of that shape in bf16, and text."""
    home = tmp_path_factory.mktemp("shape")
    tokenizer().save_pretrained(home)
    kinds = ["linear_attention", "full_attention"] * 15
    for name, config in {
        "teacher": hybrid_config(SMOLLM2),
        "hybrid": hybrid_config(SMOLLM2, layer_types=kinds),
    }.items():
        model = HybridMambaForCausalLM(config).bfloat16()
        save_model(home / name, model.config, model.state_dict().items(), home)
    save_text(home / "text.jsonl", words=3000)
    return home


def test_the_watch_sees_logits():
    """The same watch on the plain way: the check can fail."""
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8)
    with Watch() as watch:
        (hidden @ head.T).log_softmax(-1).sum().backward()
    assert watch.largest == 64 * 100


@pytest.mark.parametrize("frozen", [[], ["embeddings", "attention", "mlp", "norms"]])
def test_a_step_never_holds_tokens_times_vocabulary(shaped, tmp_path, frozen):
    torch.set_num_threads(2)
    cfg = OmegaConf.load(CONFIG)
    for key, value in {
        "student": str(shaped / "hybrid"), "teacher": str(shaped / "teacher"),
        "dataset.source": str(shaped / "text.jsonl"), "dataset.max_seq_len": 512, "batch_size": 4, "max_steps": 1,
        "loss.chunk_tokens": CHUNK, "loss.ce_weight": 0.1, "output_dir": str(tmp_path / "run"), "freeze": frozen,
    }.items():  # fmt: skip
        OmegaConf.update(cfg, key, value)
    recipe = DistillHybrid(cfg)
    try:
        recipe.setup()
        with Watch() as watch:
            sums, _ = recipe.train_step()
    finally:
        recipe.cleanup()
    assert torch.isfinite(sums).all() and sums[0] > 0
    # embeddings, V x D, are larger than a chunk's logits; both are far from M x V
    assert CHUNK * VOCABULARY <= watch.largest <= 1.1 * VOCABULARY * 576, watch.shape
    assert watch.largest < TOKENS * VOCABULARY / 3
