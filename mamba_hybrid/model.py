"""The hybrid as a transformers model: Llama, with mixers where `layer_types` says so.

Shapes: B batch, L length, T new tokens, M real tokens of a ragged step, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from mamba_hybrid_kernels import PackedDocuments, StepRows, document_starts, packed_attention, packed_runs
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from .cache import HybridCache
from .carry import Carry, LayerCarry
from .config import HybridMambaConfig
from .mixer import HybridMixer, MixerCore, ZeroLinear


@dataclass
class Batch:
    """What the layers of one forward pass share, but for `carry`.

    Args:
        cos, sin: rotary tables (B, T, N).
        mask: True where a query may look (B or 1, 1, T, L), None for plain causal attention.
        doc_BL: document ids of packed rows, None for one document a row.
        first_D1: where documents begin, for attention that needs no mask; None where that does not run.
        cache: None in training.
        valid_BT: real tokens of this pass (False is padding), with a cache only.
        rows: the slots that they continue, with a cache only.
        carry: of the layer: what the chunk before of these rows left, in training on chunks.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    doc_BL: Tensor | None = None
    first_D1: Tensor | None = None
    cache: HybridCache | None = None
    valid_BT: Tensor | None = None
    rows: StepRows | None = None
    carry: LayerCarry | None = None


class Attention(nn.Module):
    """Llama's grouped-query attention, for a layer that was kept."""

    def __init__(self, config: HybridMambaConfig, layer: int) -> None:
        super().__init__()
        D, H, G, P = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim, self.grouped = layer, P, H != G
        self.q_proj = nn.Linear(D, H * P, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * P, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * P, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * P, D, bias=config.o_bias)

    def _rotated(self, u_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        q, k = (proj(u_BTD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        return apply_rotary_pos_emb(q, k, batch.cos.to(q.dtype), batch.sin.to(q.dtype), unsqueeze_dim=2)

    def queries_and_keys(self, u_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the softmax is made of: queries (B, T, H, P) and keys (B, T, G, P), rotated. Not for use by `forward`:
        FSDP may take it for a forward of its own."""
        return self._rotated(u_BTD, batch)

    def heads(self, u_BTD: Tensor, batch: Batch) -> Tensor:
        """The heads' outputs side by side (B, T, H P), before o_proj."""
        q, k = self._rotated(u_BTD, batch)
        v = self.v_proj(u_BTD).unflatten(-1, (-1, self.head_dim))
        if batch.first_D1 is not None:
            return packed_attention(q, k, v, batch.first_D1).flatten(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.append(self.layer, k, v)
        if batch.carry is not None:
            k, v = batch.carry.attend(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=batch.mask, is_causal=batch.mask is None, enable_gqa=self.grouped
        )
        return y.transpose(1, 2).flatten(2)

    def forward(self, u_BTD: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.heads(u_BTD, batch))


class HybridLayer(nn.Module):
    """One block: attention or mixer, then the MLP, both pre-normed with a residual around."""

    def __init__(self, config: HybridMambaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.is_mixer = layer in config.mixer_layers
        if self.is_mixer:
            self.mixer = HybridMixer(config)
        else:
            self.self_attn = Attention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def mix(self, u_BTD: Tensor, batch: Batch) -> Tensor:
        """The token-mixing part, attention or mixer, of normed inputs."""
        if not self.is_mixer:
            return self.self_attn(u_BTD, batch)
        if batch.carry is not None:
            assert batch.doc_BL is not None
            past = batch.carry.past
            y, batch.carry.next = self.mixer.chunk(u_BTD, batch.cos, batch.sin, batch.doc_BL, past)
            return y
        if batch.cache is None:
            return self.mixer(u_BTD, batch.cos, batch.sin, batch.doc_BL, batch.first_D1)
        cache, valid, rows = batch.cache, batch.valid_BT, batch.rows
        assert valid is not None and rows is not None
        out = torch.zeros_like(u_BTD)
        out[valid] = self.mixer.step(
            u_BTD[valid], batch.cos[valid], batch.sin[valid], cache.slots[self.layer], cache.layout, rows
        )  # fmt: skip
        return out

    def forward(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        h_BTD = h_BTD + self.mix(self.input_layernorm(h_BTD), batch)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class HybridMambaPreTrainedModel(PreTrainedModel):
    config_class = HybridMambaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HybridLayer"]
    _keep_in_fp32_modules_strict = ["core"]
    # which is also what transformers' quantisers leave alone; some ask by the module's name, some by the parameter's
    _keep_in_fp32_modules = ["dt_proj", "dt_proj.weight"]
    _supports_sdpa = True
    supports_gradient_checkpointing = False
    _is_stateful = True  # a state cannot be cropped: transformers' assisted generation refuses

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers calls this for modules that hold parameters themselves, not for containers
        if isinstance(module, MixerCore):
            module.reset()
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)


class HybridMambaModel(HybridMambaPreTrainedModel):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: HybridMambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | PackedDocuments | None = None,
        carry: Carry | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last layer, normed.

        Args:
            input_ids: (B, T); or inputs_embeds (B, T, D).
            attention_mask: (B, columns seen with these), 0 for padding, which stands on the left or, without a
                cache, anywhere behind the tokens.
            position_ids: (B, T); made from the mask or the documents when None.
            past_key_values: what an earlier pass returned.
            use_cache: return one.
            document_ids: (B, T) integers; a token sees only tokens of its own document, and positions start
                at 0 in each. Not with a cache. As `PackedDocuments` where the device is not to be waited for.
            carry: makes the tokens a chunk of longer rows, whose document_ids go on from the chunk before.

        Raises:
            ValueError: document_ids with a cache, padding on the left without one, both inputs, or a carry with
                anything but document_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        starts_D1 = None
        if isinstance(document_ids, PackedDocuments):
            document_ids, starts_D1 = document_ids
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, T = h.shape[:2]
        cache = past_key_values
        if cache is None and use_cache:
            cache = HybridCache(self.config, b, h.dtype, h.device)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are for training, a cache is for generation: one of them")
        past = cache.length if cache is not None else 0
        documents = document_ids
        if carry is not None:
            if cache is not None or document_ids is None or attention_mask is not None or position_ids is not None:
                raise ValueError("chunks of long rows take document_ids, no cache, mask or positions")
            documents = carry.behind(document_ids)
            past = documents.shape[1] - T
        valid_BL = None
        if attention_mask is not None and not bool(attention_mask.all()):
            valid_BL = attention_mask[:, -(past + T) :].bool()
        if cache is None and valid_BL is not None and not bool(valid_BL[:, 0].all()):
            raise ValueError("padding on the left needs a cache (use_cache=True); without one pad on the right")
        if position_ids is None:
            position_ids = self._positions(b, T, past, valid_BL, documents, h.device)
        cos, sin = self.rotary_emb(h.float(), position_ids)
        valid_BT = rows = None
        if cache is not None:
            valid_BT = h.new_ones(b, T, dtype=torch.bool) if valid_BL is None else valid_BL[:, past:]
            rows = StepRows.of(list(range(b)), cache.tokens, valid_BT.sum(1).tolist(), h.device)
        mask = first_D1 = None
        if cache is None and carry is None and valid_BL is None and packed_runs(h, self.config.head_dim):
            first_D1 = document_starts(document_ids, b, T, h.device) if starts_D1 is None else starts_D1
        else:
            mask = self._mask(T, past, valid_BL, documents, h.device)
        cos, sin = cos.expand(b, -1, -1), sin.expand(b, -1, -1)
        batch = Batch(cos, sin, mask, document_ids, first_D1, cache, valid_BT, rows)
        for i, layer in enumerate(self.layers):
            h = layer(h, batch if carry is None else replace(batch, carry=carry.of(i)))
        if cache is not None:
            assert batch.valid_BT is not None
            cache.advance(batch.valid_BT)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h), past_key_values=cache)

    @staticmethod
    def _positions(b, T, past, valid_BL, document_ids, device) -> Tensor:
        if document_ids is not None:
            columns = torch.arange(past + T, device=device).expand(b, -1)
            starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
            return (columns - torch.where(starts, columns, 0).cummax(1).values)[:, past:]
        if valid_BL is not None:
            return (valid_BL.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        return torch.arange(past, past + T, device=device)[None]

    @staticmethod
    def _mask(T, past, valid_BL, document_ids, device) -> Tensor | None:
        if past + T == T and valid_BL is None and document_ids is None:
            return None
        query = torch.arange(past, past + T, device=device)[:, None]
        mask = (torch.arange(past + T, device=device) <= query)[None, None]
        if valid_BL is not None:
            # a padding query sees all it may by order, or its softmax would have nothing to sum over
            mask = mask & (valid_BL[:, None, None, :] | ~valid_BL[:, None, past:, None])
        if document_ids is not None:
            mask = mask & (document_ids[:, None, past:, None] == document_ids[:, None, None, :])
        return mask


class HybridMambaForCausalLM(HybridMambaPreTrainedModel, GenerationMixin):
    """The hybrid with its language-model head.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("hybrid")          # after `import mamba_hybrid`
        >>> model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridMambaConfig) -> None:
        super().__init__(config)
        self.model = HybridMambaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation {generation_config.cache_implementation!r}: a hybrid has its own")
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = HybridCache(self.config, rows, self.dtype, self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | PackedDocuments | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when labels (B, T; -100 is not counted) are given; the rest as HybridMambaModel."""
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(HybridMambaConfig.model_type, HybridMambaConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridMambaConfig, HybridMambaForCausalLM, exist_ok=True)
