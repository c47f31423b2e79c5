import random

import pytest
import torch
import torch.nn.functional as F
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows, short_conv, short_conv_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_is_a_causal_depthwise_convolution():
    torch.manual_seed(0)
    raw, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    want = F.conv1d(F.pad(raw.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(short_conv(raw, weight, bias), want, rtol=1e-5, atol=1e-5)


def test_documents_do_not_mix():
    torch.manual_seed(0)
    raw, weight, bias = torch.randn(1, 9, 3), torch.randn(3, 4), torch.randn(3)
    doc = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2]])
    packed = short_conv(raw, weight, bias, doc_BL=doc)
    apart = torch.cat([short_conv(raw[:, a:b], weight, bias) for a, b in ((0, 2), (2, 7), (7, 9))], 1)
    torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("drafts", [0, 3])
def test_steps_equal_the_whole(drafts):
    torch.manual_seed(drafts)
    layout = SlotLayout(1, 1, 2, 4, 4, 8, conv=4, step=drafts + 1, rewind=drafts + 1 if drafts else 0)
    raw, weight, bias = torch.randn(60, layout.channels), torch.randn(layout.channels, 4), torch.randn(layout.channels)
    want = short_conv(raw[None], weight, bias)[0]
    slots = SlotTensors.allocate(layout, 1)
    slots.conv.fill_(float("nan"))
    position = 0
    for tokens in (1, 20, 2, 1, *[drafts + 1] * 8):
        got = short_conv_step(
            slots, layout, StepRows.of([0], [position], [tokens]), raw[position : position + tokens], weight, bias
        )
        torch.testing.assert_close(got, want[position : position + tokens], rtol=1e-5, atol=1e-5)
        accepted = max(1, tokens - 2) if tokens == drafts + 1 else tokens  # the next step takes the rest back
        position += accepted


@pytest.mark.triton
@pytest.mark.parametrize("drafts,dtype", [(0, torch.float32), (3, torch.float32), (3, torch.float16)])
def test_triton_steps_equal_the_reference(drafts, dtype):
    rng = random.Random(drafts)
    torch.manual_seed(drafts)
    layout = SlotLayout(
        2, 2, 2, 16, 24, 8, conv=4, dtype=dtype, step=drafts + 1, rewind=drafts + 1 if drafts else 0
    )  # fmt: skip
    C = layout.channels
    weight, bias = torch.randn(C, 4, device=DEVICE), torch.randn(C, device=DEVICE)
    room = torch.full((3, layout.conv_ring * C + 5), float("nan"), dtype=dtype, device=DEVICE)
    slots = SlotTensors.allocate(layout, 3, DEVICE)
    slots.conv = room[:, : layout.conv_ring * C].view(3, layout.conv_ring, C)
    want = SlotTensors(**{name: t.clone() for name, t in vars(slots).items() if t is not None})
    starts = [0, 0]
    for _ in range(12):
        lengths = [rng.choice([1, 2, drafts + 1, 17, 40]) for _ in starts]
        raw = torch.randn(sum(lengths), C + 3, device=DEVICE).to(dtype)[:, :C]
        args = (StepRows.of([2, 0], starts, lengths, DEVICE), raw, weight, bias)
        got = short_conv_step(slots, layout, *args, backend="triton")
        expected = short_conv_step(want, layout, *args, backend="reference")
        torch.testing.assert_close(got, expected, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)
        assert torch.equal(slots.conv.nan_to_num(7), want.conv.nan_to_num(7))
        kept = [T if layout.step < T else rng.randint(1, T) for T in lengths]  # drafts may be taken back
        starts = [start + n for start, n in zip(starts, kept, strict=True)]
    with pytest.raises(ValueError, match="nonsense"):
        short_conv_step(slots, layout, *args, backend="nonsense")
