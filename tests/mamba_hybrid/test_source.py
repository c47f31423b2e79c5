import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mamba_hybrid.checkpoint import load_config, load_model
from mamba_hybrid.errors import UserError
from mamba_hybrid.importer import import_gguf
from mamba_hybrid.source import hybrid_config, open_source
from tests.tiny import FAMILIES, save_transformer, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_our_model_is_the_same_function(family, tmp_path):
    path = save_transformer(tmp_path / "src", family)
    ids = torch.randint(0, 256, (2, 90))
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(load_model(path)(ids).logits, want, rtol=1e-4, atol=1e-4)


def write_gguf(path, model) -> None:
    """The model as llama.cpp's converter writes it: its names, and q and k with interleaved halves."""
    c = model.config
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    tokens = sorted(tokenizer().get_vocab().items(), key=lambda kv: kv[1])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    names = [*(t for t, _ in tokens[:-1]), "ab"]  # the reader wants at least one merge
    w.add_token_list(names)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in names])
    w.add_token_merges(["a b"])
    w.add_eos_token_id(256)
    w.add_bos_token_id(256)
    ours = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, tensor in model.state_dict().items():
        t = tensor.float()
        if name in top:
            out = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            out = f"blk.{layer}.{ours[rest.removesuffix('.weight')]}.weight"
            heads = {"self_attn.q_proj.weight": c.num_attention_heads, "self_attn.k_proj.weight": c.num_key_value_heads}
            if rest in heads:
                t = t.view(heads[rest], 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        w.add_tensor(out, np.ascontiguousarray(t.numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@torch.no_grad()
def test_gguf_equals_the_model_it_was_written_from(tmp_path):
    src = save_transformer(tmp_path / "src")
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    write_gguf(tmp_path / "m.gguf", model)
    ids = torch.randint(0, 256, (1, 50))
    want = model(ids).logits
    torch.testing.assert_close(load_model(tmp_path / "m.gguf")(ids).logits, want, rtol=1e-4, atol=1e-4)
    import_gguf(tmp_path / "m.gguf", tmp_path / "hf", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert again.config.model_type == "llama"
    torch.testing.assert_close(again(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_truncated_gguf(tmp_path):
    src = save_transformer(tmp_path / "src")
    write_gguf(tmp_path / "m.gguf", AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32))
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        open_source(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match=r"is a directory already"):
        import_gguf(src, tmp_path / "x")


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_source(tmp_path / "empty")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="is no GGUF file"):
        open_source(tmp_path / "text.gguf")
    other = save_transformer(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' model; this converts llama, mistral, qwen2"):
        open_source(other)
    (other / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index.json cannot be read"):
        open_source(other)
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        open_source(other)


def test_truncated_safetensors(tmp_path):
    path = save_transformer(tmp_path / "src")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors is missing, truncated or damaged"):
        load_model(path)


def test_checkpoint_that_does_not_fit_its_config(tmp_path):
    path = save_transformer(tmp_path / "src")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match="9 tensors missing"):
        load_model(path)
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"\(96, 48\), its config.json says \(64, 48\)"):
        load_model(path)


def test_architectures_that_are_no_plain_llama(tmp_path):
    sliding = open_source(save_transformer(tmp_path / "m", "mistral", sliding_window=64)).config
    with pytest.raises(UserError, match="--max-positions 64"):
        hybrid_config(sliding)
    assert hybrid_config(sliding, max_position_embeddings=64).max_position_embeddings == 64
    biased = open_source(save_transformer(tmp_path / "l", "llama", mlp_bias=True)).config
    with pytest.raises(UserError, match="mlp_bias"):
        hybrid_config(biased)


def test_qwen_has_biases_on_qkv_only(tmp_path):
    config = load_config(save_transformer(tmp_path / "q", "qwen2"))
    assert config.qkv_bias and not config.o_bias
