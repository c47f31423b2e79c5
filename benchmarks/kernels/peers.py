"""Thin calls into peer Mamba-2 kernels (vLLM 0.32.0, FlashInfer 0.7.0.post1, mamba-ssm 2.3.1, fla 0.6.0).

    pip install vllm==0.32.0 flashinfer-python==0.7.0.post1 mamba-ssm==2.3.1 flash-linear-attention==0.6.0

or a folder on PYTHONPATH that holds the unpacked wheels: of vLLM and mamba-ssm only the Triton files are used. Every
peer is imported on first use; one that is not there raises NotInstalled.
Nothing here builds inputs or copies: what is timed around a wrapper is the peer's own host code and kernels.

Shapes: B sequences, T tokens of a step, H query heads, P head width, N state width, M slots of the state cache,
L tokens of packed prompts, W logical replay window, R = W + T rows of a replay ring.
These peers know one state per head and B/C per group; with C per query head the groups number H.

SLOT 0 IS SKIPPED. vLLM keeps block 0 as its null block: every vLLM and FlashInfer wrapper here leaves rows whose
slot is 0 alone (faster and without output), so hand out slots 1..M-1.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import itertools
import logging
import os
import pathlib
import sys
import types
from collections.abc import Iterator

import torch

NULL_SLOT = 0  # vllm.v1.attention.backends.utils.NULL_BLOCK_ID
PACKAGES = {  # module -> what pip calls it
    "vllm": "vllm==0.32.0",
    "flashinfer": "flashinfer-python==0.7.0.post1",
    "mamba_ssm": "mamba-ssm==2.3.1",
    "fla": "flash-linear-attention==0.6.0",
}


class NotInstalled(ImportError):
    """A peer whose package is not there."""


# ---------------------------------------------------------------- entering packages beside their __init__


def _root(name: str) -> pathlib.Path:
    """Folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalled(f"{name} is not installed ({PACKAGES[name]})")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _package(name: str, path: pathlib.Path) -> None:
    """A package of that name whose submodules are the real files, without running its __init__."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        module.__spec__.submodule_search_locations = [str(path)]
        sys.modules[name] = module
        if "." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(sys.modules[parent], leaf, module)


def _stub(name: str, **content) -> types.ModuleType:
    """A module of that name with nothing but this content."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, module)
    return sys.modules[name]


class _CudaPlatform:
    """What the entered files ask of vllm.platforms.current_platform, answered for the CUDA device of torch."""

    def is_cuda(self):
        return True

    is_cuda_alike = is_cuda

    def is_cpu(self):
        return False

    is_rocm = is_xpu = is_tpu = is_cpu

    def get_device_capability(self, device_id=0):
        return torch.cuda.get_device_capability(device_id)

    def is_device_capability(self, capability, device_id=0):
        want = divmod(capability, 10) if isinstance(capability, int) else tuple(capability)
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device_id) == want

    def is_device_capability_family(self, capability, device_id=0):
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device_id)[0] == capability // 10

    def has_device_capability(self, capability, device_id=0):
        want = divmod(capability, 10) if isinstance(capability, int) else tuple(capability)
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device_id) >= want

    def get_device_name(self, device_id=0):
        return torch.cuda.get_device_name(device_id) if torch.cuda.is_available() else "none"

    def num_compute_units(self, device_id=0):
        return torch.cuda.get_device_properties(device_id).multi_processor_count

    def is_pin_memory_available(self):
        return True

    def log_warnings(self):
        pass


@functools.cache
def _vllm_root() -> pathlib.Path:
    """Make vLLM's Triton files importable without its __init__, its compiled parts and its other dependencies.
    A vLLM that the process has already imported for real is used as it is."""
    root = _root("vllm")
    if "vllm" in sys.modules:
        return root
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # each process would say that it ships no table for P = N = 128
    _package("vllm", root)
    for name in (
        "model_executor", "model_executor.layers", "model_executor.layers.mamba",
        "model_executor.layers.mamba.ops", "v1", "v1.attention", "v1.attention.backends",
    ):  # fmt: skip
        _package(f"vllm.{name}", root.joinpath(*name.split(".")))
    _stub("vllm.platforms", current_platform=_CudaPlatform(), vllm_version_matches_substr=lambda text: False)
    _package("vllm.distributed", root / "distributed")
    first = {"is_global_first_rank": lambda: True, "is_local_first_rank": lambda: True}
    _stub("vllm.distributed.parallel_state", **first)  # asked by the logger's info_once(scope=...)
    _stub("vllm._custom_ops")  # only Mamba-1's selective_scan_fn uses it
    _stub("vllm.v1.attention.backends.utils", NULL_BLOCK_ID=NULL_SLOT, PAD_SLOT_ID=-1)
    return root


@functools.cache
def _vllm(name: str):
    _vllm_root()
    return importlib.import_module(f"vllm.model_executor.layers.mamba.ops.{name}")


@functools.cache
def _flashinfer():
    _root("flashinfer")
    return importlib.import_module("flashinfer.mamba.checkpointing_ssu")


@functools.cache
def _mamba_ssm():
    if "mamba_ssm" not in sys.modules:
        _package("mamba_ssm", _root("mamba_ssm"))
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@functools.cache
def _fla():
    _root("fla")
    return importlib.import_module("fla.ops.simple_gla")


# ---------------------------------------------------------------- vLLM: one token, verify step


def vllm_update(state, x, dt, A, B, C, D, dt_bias, slots, out, *, config=None) -> None:
    """vLLM's plain decode step: MambaMixer2's selective_state_update without speculation.

    Args:
        state: (M, H, P, N) fp32, updated in place (bf16 and fp16 also work).
        x: (B, H, P) bf16.
        dt: (B, H, P), an expanded (B, H) (stride 0 in P), before bias and softplus.
        A: (H, P, N) fp32, an expanded (H,) (strides 1, 0, 0), negative.
        B, C: (B, H, N) bf16 (ngroups = H).
        D: (H, P) expanded (H,).
        dt_bias: (H, P) expanded (H,). All of A, dt, dt_bias expanded selects the scalar-decay kernel.
        slots: (B,) int32 state slots; also where the new state goes. Rows of slot 0 are skipped.
        out: (B, H, P) bf16, written.
        config: (BLOCK_SIZE_M, num_warps) instead of vLLM's choice. vLLM 0.32 ships an H100 table for P=64, N=128
            only; at P=N=128 it falls back to (4, 4), so also time e.g. (8..64, 1..8) before judging it.
    """
    update = _vllm("mamba_ssm")
    with contextlib.nullcontext() if config is None else update.override_ssm_config(config):
        update.selective_state_update(
            state, x, dt, A, B, C, D, dt_bias,
            dt_softplus=True, state_batch_indices=slots, dst_state_batch_indices=slots, null_block_id=NULL_SLOT,
            out=out, num_accepted_tokens=None, cu_seqlens=None, is_blackwell=False,
        )  # fmt: skip


def vllm_verify(state, x, dt, A, B, C, D, dt_bias, slots, accepted, cu_seqlens, out) -> None:
    """vLLM's speculative decode step: MambaMixer2's selective_state_update of T = 1 + K tokens a sequence, which
    starts from the state after the last accepted token of the step before and stores the state after every token.

    Args: as vllm_update, but token-packed:
        x, dt, out: (B*T, H, P); B, C: (B*T, H, N).
        slots: (B, T) int32, T distinct slots per sequence, read and written: slots[b, t] receives the state after
            token t (vLLM passes the same tensor as source and destination, so M >= 1 + B*T).
        accepted: (B,) int32, tokens accepted of the step before (1..T, including the target's own): the start state
            is slots[b, max(accepted[b] - 1, 0)].
        cu_seqlens: (B + 1,) int32 token offsets, here arange(B + 1) * T.
    """
    _vllm("mamba_ssm").selective_state_update(
        state, x, dt, A, B, C, D, dt_bias,
        dt_softplus=True, state_batch_indices=slots, dst_state_batch_indices=slots, null_block_id=NULL_SLOT,
        out=out, num_accepted_tokens=accepted, cu_seqlens=cu_seqlens, is_blackwell=False,
    )  # fmt: skip


# ---------------------------------------------------------------- FlashInfer checkpointing_ssu (ReplaySSM)


def flashinfer_scratch(B: int, H: int, T: int, window: int, device="cuda", dtype=torch.bfloat16):
    """(cb_scaled, cumAdt_vec, cb_old) for the two-kernel algorithm, reusable by every layer and step. With fewer
    rows than allocated pass t[:B] of each, as vLLM does."""
    return _flashinfer().allocate_checkpointing_ssu_scratch(B, H, T, window, dtype, device)


def flashinfer_update(
    state, x_ring, B_ring, dt_ring, ring_start, prev_accepted, x, dt, A, B, C, out, *,
    D, dt_bias, slots, scratch=None, algorithm="auto", d_split=None,
) -> None:  # fmt: skip
    """FlashInfer's checkpointing_ssu as vLLM 0.32's MambaMixer2 calls it (dt_softplus, no PDL, no rounding noise).
    It neither accepts nor rejects anything: it appends T tokens to each ring and outputs T tokens.

    Args:
        state: (M, H, P, N) fp32, the last checkpoint of each slot; written for flushing rows only.
        x_ring: (M, H, R, P) bf16, B_ring: (M, H, R, N) bf16, dt_ring: (M, H, R) fp32 (dt after bias and softplus;
            dt is written by the kernel). The window is R - T and must be T <= R - T <= 16.
        ring_start: (M,) int32, per slot the row of the oldest live token, 0 <= . < R.
        prev_accepted: (M,) int32, per slot the live tokens since the checkpoint, 0 <= . <= window. DECIDES THE
            FLUSH: a row replays its prev_accepted tokens into the state and stores it iff
            prev_accepted[slot] + T > window; else the state is only read.
            New tokens land in ring rows (ring_start + prev_accepted + i) % R either way.
        x: (B, T, H, P) bf16; dt: (B, T, H, P), expanded, strides (.., 1, 0); A: (H, P, N) fp32 expanded;
        B, C: (B, T, H, N) bf16; out: (B, T, H, P) bf16, written; D, dt_bias: (H, P) expanded, one dtype.
        slots: (B,) int32 contiguous. Rows of slot 0 are skipped.
        scratch: flashinfer_scratch(...), needed by "two-kernel", used by "auto"; without it "auto" is monolith.
        algorithm: "monolith", "two-kernel" (precompute + persistent main) or "auto" (two-kernel if scratch is given
            and B*H >= number of SMs, unless tuned). vLLM calls it with scratch and "auto".
        d_split: None (monolith: 2 for fp32 state while B*H <= 8 * SMs, else 1; two-kernel: 1), 1 or 2.

    Further knobs of the two-kernel path, read from the environment at every launch (os.environ[...] works):
    FLASHINFER_SSU_MAIN_PIPELINE_STAGES (1 default, 2), FLASHINFER_SSU_MAIN_CTA_PER_SM (16 default),
    FLASHINFER_SSU_PRECOMPUTE_NUM_WARPS (4 default here, 8, 16).
    One compiled module holds every algorithm, d_split and depth; a new T, window, width, head count or dtype is a new
    build, minutes of nvcc.
    Neither ring_start nor prev_accepted is moved: vLLM does so once a step for all layers. After a step of T tokens of
    which a were accepted (T = 1: a = 1) a row that flushed has ring_start += prev_accepted (mod R) and
    prev_accepted = a, another prev_accepted += a.
    """
    cb_scaled, cumAdt_vec, cb_old = scratch if scratch is not None else (None, None, None)
    _flashinfer().checkpointing_ssu(
        state, x_ring, B_ring, dt_ring, ring_start, prev_accepted, x, dt, A, B, C, out,
        D=D, dt_bias=dt_bias, dt_softplus=True, state_batch_indices=slots, pad_slot_id=NULL_SLOT, rand_seed=None,
        d_split=d_split, cu_seqlens=None, max_seqlen=None, enable_pdl=False, cb_scaled=cb_scaled,
        cumAdt_vec=cumAdt_vec, cb_old=cb_old, precompute_heads_per_cta=0, algorithm=algorithm,
    )  # fmt: skip


# ---------------------------------------------------------------- prefill and training


@functools.cache
def _chunk_metadata_source():
    # the engine's own function; its module needs all of vLLM, so only the function is compiled
    path = _root("vllm") / "v1" / "attention" / "backends" / "mamba_attn.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_chunk_metadata":
            node.decorator_list = []
            names = {"torch": torch, "cdiv": lambda a, b: -(a // -b)}
            exec(compile(ast.Module([node], []), str(path), "exec"), names)
            return names["_compute_chunk_metadata"]
    raise ImportError("vLLM's _compute_chunk_metadata moved")


def vllm_chunk_metadata(lengths: list[int], chunk: int, device="cuda") -> tuple[torch.Tensor, ...]:
    """(cu_seqlens (B+1,), cu_chunk_seqlens (chunks+1,), last_chunk_indices (B,), seq_idx (chunks,)), all int32, as
    vLLM's engine builds them on the CPU for fresh prompts of those lengths (chunks restart at every prompt). Once
    for all layers."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    fresh = torch.zeros(len(lengths), dtype=torch.int64)
    chunks, seq, last, _ = _chunk_metadata_source()(chunk, len(lengths), fresh, starts)
    return tuple(torch.as_tensor(values, dtype=torch.int32).to(device) for values in (starts, chunks, last, seq))


def vllm_prefill(x, dt, A, B, C, D, out, metadata, chunk) -> torch.Tensor:
    """vLLM's mamba_chunk_scan_combined_varlen as MambaMixer2 calls it, prompts packed one after another.

    Args:
        x: (L, H, P) bf16; dt: (L, H) bf16 or fp32, after softplus; A: (H,) fp32;
        B, C: (L, H, N) bf16 (any ngroups that divides H); D: (H,); out: (L, H, P), written.
        metadata: vllm_chunk_metadata(lengths, chunk); chunk: power of two (256 in Mamba-2 checkpoints; try 64..256).

    Returns:
        (prompts, H, P, N) final states, fp32.
    """
    cu_seqlens, cu_chunk_seqlens, last_chunk_indices, seq_idx = metadata
    return _vllm("ssd_combined").mamba_chunk_scan_combined_varlen(
        x, dt, A, B, C, chunk_size=chunk, cu_seqlens=cu_seqlens, cu_chunk_seqlens=cu_chunk_seqlens,
        last_chunk_indices=last_chunk_indices, seq_idx=seq_idx, out=out, D=D, z=None, dt_bias=None,
        initial_states=None, dt_softplus=False, dt_limit=(0.0, float("inf")), state_dtype=torch.float32,
    )  # fmt: skip


def mamba_ssm_scan(x, dt, A, B, C, D, chunk) -> torch.Tensor:
    """mamba-ssm's differentiable mamba_chunk_scan_combined (forward; backward through autograd).

    Args:
        x: (b, L, H, P) bf16; dt: (b, L, H) bf16 or fp32, after softplus; A: (H,) fp32 negative;
        B, C: (b, L, G, N) bf16, G = H for C per query head; D: (H,); chunk: power of two (256 in Mamba-2).

    Returns:
        y (b, L, H, P).
    """
    return _mamba_ssm().mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=chunk, D=D)


@contextlib.contextmanager
def fla_unguarded() -> Iterator[None]:
    """fla 0.6.0 refuses the gated backward on Hopper with 3.4.0 <= Triton < 3.7.1 (its issue 640: Triton miscompiles
    chunk_bwd_dqkwg). According to that issue the wrong code appears at tiles of 64 keys, while N = 128 gets tiles of
    128 there. Within this context the refusal is lifted: only report times whose gradients you have checked.
    The context must cover the call of backward()."""
    _fla()
    module = importlib.import_module("fla.ops.common.chunk_o")
    kept = module.TRITON_ABOVE_3_7_1
    module.TRITON_ABOVE_3_7_1 = True
    try:
        yield
    finally:
        module.TRITON_ABOVE_3_7_1 = kept


def fla_simple_gla(C, B, x_dt, g) -> torch.Tensor:
    """fla's differentiable chunk_simple_gla in chunks of 64, q = C, k = B, v = x*dt, scale 1; no D (add D*x outside).
    On an H100 with Triton 3.6 its backward raises unless it runs within fla_unguarded().

    Args:
        C, B: (b, L, H, N) bf16; x_dt: (b, L, H, P) bf16, x times dt (after softplus), rounded; g: (b, L, H) fp32,
        dt * A, negative. C, B and x_dt must share one dtype.

    Returns:
        o (b, L, H, P).
    """
    return _fla().chunk_simple_gla(C, B, x_dt, g=g, scale=1.0)[0]
