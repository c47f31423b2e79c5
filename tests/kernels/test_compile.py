"""The kernels compile for an H100 on a machine without a GPU, in every launch of the committed table.

The interpreter runs Python: it does not see what the compiler refuses. What is compiled is not run.
"""

import json
import os

import pytest
import torch
import triton
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows
from mamba_hybrid_kernels.launch import TABLES
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled for it")


class Hopper:
    """What the compiler asks a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that a test launches, compiled instead of run."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    for module in ("verify", "prefill", "ssd_forward", "ssd_backward"):
        monkeypatch.setattr(
            f"mamba_hybrid_kernels.{module}.precision", lambda t: "tf32" if t.itemsize == 2 else "tf32x3"
        )
    return kernels


def tokens(layout: SlotLayout, T: int) -> list[torch.Tensor]:
    """x, dt, A, B, C and D of T tokens."""
    G, S, H, P, N = layout.groups, layout.state_heads, layout.query_heads, layout.head_dim, layout.state_size
    x, B, C = (torch.zeros(T, n, d, dtype=layout.dtype) for n, d in ((G, P), (G, N), (H, N)))
    return [x, torch.ones(T, S), -torch.ones(S), B, C, torch.ones(H)]


def step(layout: SlotLayout, T: int, **kwargs) -> None:
    from mamba_hybrid_kernels.verify import verify

    index = torch.zeros(17, dtype=torch.int32)
    verify(
        SlotTensors.allocate(layout, 1), layout, index[:1], index[:1], index[:2], *tokens(layout, T),
        max_tokens=T, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("table", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_launch_of_a_table_compiles_without_wgmma(compiled, table):
    from mamba_hybrid_kernels.verify import VerifyLaunch, launch_case

    cases = json.loads(table.read_text())
    known = {}
    for S in (32, 8):
        for w in (0, 64):
            for T in (1, 4, 8, 16):
                layout = SlotLayout(
                    8, S, 32, 128, 128, w, dtype=torch.bfloat16, step=T, rewind=T if T > 1 else 0
                )  # fmt: skip
                known[launch_case(layout, T)] = (layout, T)
    assert set(cases) <= set(known), "a case that the benchmark does not have"
    pairs = {}  # one case for each launch is enough
    for case, rows in cases.items():
        for _, launch in rows:
            pairs.setdefault(json.dumps(launch), (case, launch))
    for case, launch in pairs.values():
        step(*known[case], launch=VerifyLaunch(**launch))
        assert "wgmma" not in compiled[-1].asm["ptx"], (case, launch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("P,N,w,T", [(64, 64, 64, 5), (96, 256, 256, 2), (256, 32, 3, 8)])
def test_defaults_compile(compiled, dtype, P, N, w, T):
    layout = SlotLayout(1, 1, 3, P, N, w, dtype=dtype, step=T, rewind=T)
    step(layout, T)
    assert compiled[-1].metadata.shared <= 227 << 10
    assert "wgmma" not in compiled[-1].asm["ptx"]


def test_bf16_state_rounded_at_random_compiles(compiled):
    layout = SlotLayout(1, 1, 4, 64, 64, 0, dtype=torch.bfloat16, state_dtype=torch.bfloat16, step=4, rewind=4)
    step(layout, 4, seed=7)
    assert len(compiled) == 1


def test_prefill_and_training_compile(compiled):
    from mamba_hybrid_kernels.prefill import prefill
    from mamba_hybrid_kernels.ssd_backward import ssd_backward
    from mamba_hybrid_kernels.ssd_forward import ssd_forward

    layout = SlotLayout(2, 2, 8, 64, 64, 64, dtype=torch.bfloat16)
    index = torch.tensor([0, 1000], dtype=torch.int32)
    parts = tokens(layout, 1000)
    prefill(SlotTensors.allocate(layout, 1), layout, index[:1], index[:1], index, [1000], *parts)
    x, dt, A, B, C, D = parts
    x, dt, B, C = (t[None] for t in (x, dt, B, C))
    y, last, enter = ssd_forward(x, dt, A, B, C, D, delay=64)
    ssd_backward(y, last, x, dt, A, B, C, D, enter, delay=64)
    assert len(compiled) == 5 + 2 + 6  # the walk of this row is cut into pieces, which is one launch more
    assert all(kernel.metadata.shared <= 227 << 10 for kernel in compiled)


def test_readout_compiles(compiled):
    from mamba_hybrid_kernels import readout

    near, z = torch.zeros(2, 4, 96, dtype=torch.bfloat16), torch.zeros(2, 384, dtype=torch.bfloat16)
    weight = torch.ones(4, 96)
    readout(near, near.float(), z, weight, weight, backend="triton")
    readout(None, near.float(), z, None, weight, gate="silu", norm="after_gate", backend="triton")
    assert len(compiled) == 2


def test_convolution_compiles(compiled):
    from mamba_hybrid_kernels import short_conv_step

    layout = SlotLayout(2, 2, 8, 64, 64, 64, conv=4, dtype=torch.bfloat16, step=4, rewind=4)
    raw, weight = torch.zeros(9, layout.channels, dtype=torch.bfloat16), torch.zeros(layout.channels, 4)
    short_conv_step(
        SlotTensors.allocate(layout, 1), layout, StepRows.of([0], [0], [9]), raw, weight, weight[:, 0], backend="triton"
    )
    assert len(compiled) == 1
