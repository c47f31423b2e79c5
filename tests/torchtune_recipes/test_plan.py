import csv
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mamba_hybrid.cli import main
from mamba_hybrid.model import HybridMambaForCausalLM
from torchtune_recipes.parameters import Parameters
from torchtune_recipes.plan import Speeds, format_plan, needed, plan, read_config
from torchtune_recipes.stage import optimizer_bytes
from torchtune_recipes.stages import STAGES
from torchtune_recipes.traffic import Exchange, Layout

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMOLLM2 = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    tie_word_embeddings=True, rms_norm_eps=1e-5, hidden_act="silu", dtype="float32",
)  # fmt: skip
TINY = SMOLLM2 | dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
SMALL = ["dataset.max_seq_len=128", "batch_size=2", "loss.chunk_tokens=64"]


def save(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def tiny(tmp_path) -> dict:
    file = save(tmp_path / "config.json", TINY)
    return {"student_config": file, "teacher_config": file}


def stage(name, file, tiny, gpus=1, **overrides):
    cfg = OmegaConf.load(CONFIGS / file)
    for key, value in {"dataset.max_seq_len": 128, "batch_size": 2, **overrides}.items():
        OmegaConf.update(cfg, key, value)
    student = read_config(tiny["student_config"], STAGES[name].keep)
    return STAGES[name](cfg, student, read_config(tiny["teacher_config"]), Layout(gpus, gpus, 8))


@pytest.mark.parametrize("system", ["distill-eager", "distill-kept", "align"])
def test_it_finds_what_an_h100_allocated(tmp_path, system):
    """Peaks of torch.cuda.max_memory_allocated of the training benchmark's runs, at the shapes of a 1B."""
    with (ROOT / "benchmarks/results/training_h100.csv").open() as f:
        peaks = {row["system"]: float(row["peak_memory_gib"]) for row in csv.DictReader(f)}
    shape = dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    file = save(tmp_path / "config.json", SMOLLM2 | shape)
    cfg = OmegaConf.create(
        {
            "dataset": {"max_seq_len": 2048}, "batch_size": 4, "dtype": "bf16", "loss": {"chunk_tokens": 2048},
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
            "enable_activation_checkpointing": system == "distill-kept",
        }
    )  # fmt: skip
    name = "align_hybrid" if system == "align" else "distill_hybrid"
    peak = STAGES[name](cfg, read_config(file, 0.5), read_config(file), Layout(1, 1, 8)).peak(4)
    assert peak.total / 2**30 == pytest.approx(peaks[system], rel=0.1)


@pytest.mark.parametrize("frozen", [[], ["embeddings", "mlp"]])
def test_parameters_are_those_of_the_model(tiny, frozen):
    config = read_config(tiny["student_config"], 0.5)
    model, count = HybridMambaForCausalLM(config), Parameters(config, frozen)
    assert config.mixer_layers and count.count() == sum(p.numel() for p in model.parameters())
    mlp = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    embeddings = model.model.embed_tokens.weight.numel()
    assert count.count(trained=True) == count.count() - (mlp + embeddings if frozen else 0)
    assert sum(count.layer(i) for i in range(4)) + count.root() == count.count()


@pytest.mark.parametrize(
    "node, expected",
    [
        ({"_component_": "torch.optim.AdamW", "fused": True}, (8, 0)),
        ({"_component_": "torch.optim.AdamW"}, (8, 4)),
        ({"_component_": "torch.optim.SGD", "momentum": 0.9, "fused": True}, (4, 0)),
        ({"_component_": "torch.optim.SGD", "fused": True}, (0, 0)),
        ({"_component_": "torchtune_recipes.adamw.CompiledAdamW"}, (8, 0)),
        ({"_component_": "torchao.optim.AdamW8bit"}, (2 + 2 * 4 / 256, 0)),
    ],
)
def test_an_optimisers_bytes(node, expected):
    kept, stepping = optimizer_bytes(OmegaConf.create(node))
    assert kept == pytest.approx(expected[0], abs=0.02)
    assert stepping >= expected[1] if expected[1] else stepping == 0


def test_gpus_share_what_is_sharded_and_not_what_is_gathered(tiny):
    one, two, four = (stage("distill_hybrid", "1b.yaml", tiny, gpus) for gpus in (1, 2, 4))
    for key, value in one.always().items():
        assert four.always()[key] == pytest.approx(value / 4, abs=4)
    a, b = (next(m for m in s.moments(2) if m.name == "loss").bytes for s in (two, four))
    assert a["loss, forward pass"] == b["loss, forward pass"]
    assert one.layout.load(one.exchange()).within == 0 < four.layout.load(four.exchange()).within


def test_checkpointing_keeps_inputs_only(tiny):
    def kept(**more):
        s = stage("distill_hybrid", "1b.yaml", tiny, **more)
        loss = next(m for m in s.moments(2) if m.name == "loss")
        return next(v for k, v in loss.bytes.items() if k.endswith("kept"))

    assert 5 * kept() < kept(enable_activation_checkpointing=False)


def test_frozen_parts_need_no_gradients_and_moments(tiny):
    part, whole = (stage("distill_hybrid", "1b.yaml", tiny, freeze=f) for f in (["embeddings", "mlp"], []))
    assert part.always()["optimiser's moments"] < whole.always()["optimiser's moments"]
    assert part.peak(2).total < whole.peak(2).total and part.flops() < whole.flops()


def test_alignment_is_cheaper_than_distillation(tiny):
    align, distill = stage("align_hybrid", "8b_align.yaml", tiny), stage("distill_hybrid", "8b.yaml", tiny)
    assert align.flops() < 0.6 * distill.flops()
    assert align.peak(2).total < distill.peak(2).total


def test_the_largest_batch_fits_and_one_more_row_does_not(tiny):
    s = stage("distill_hybrid", "1b.yaml", tiny)
    gpu_gb = (needed(s.peak(5)) + 1) / 1e9
    figures = plan(CONFIGS / "1b.yaml", ["dataset.max_seq_len=128"], gpu_gb=gpu_gb, **tiny)
    assert figures.largest == 5 and needed(s.peak(6)) > figures.gpu
    assert "fits into" not in format_plan(figures, Speeds()).split("does not fit")[0]  # 8 rows
    assert plan(CONFIGS / "1b.yaml", SMALL, gpu_gb=0.5, **tiny).largest == 0


def test_the_command_reads_directories_and_the_header(tmp_path, tiny, capsys):
    kept = tmp_path / "hybrid"
    kept.mkdir()
    read_config(tiny["student_config"], 0.25).save_pretrained(kept)
    words = [str(CONFIGS / "8b.yaml"), f"student={kept}", f"teacher={kept}", SMALL[0], "--gpu-mem", "2", *SMALL[1:]]
    # as `tune run` takes them too
    assert main(["plan", *words, "optimizer=torchao.optim.AdamW8bit", "~optimizer.fused"]) == 0
    out = capsys.readouterr().out
    assert "distill_hybrid on 8 GPUs, 2 x 128 tokens each, bf16" in out and "fits into 2 GB" in out
    rows = {line[:40].strip(): float(line.split()[-1]) for line in out.splitlines() if line[-3:-2] == "."}
    (context,) = (v for k, v in rows.items() if "context" in k)
    assert rows["total"] == pytest.approx(context + 1.1 * rows["allocated"], abs=0.02)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.yaml"], "nowhere.yaml cannot be read"),
        ([str(CONFIGS / "8b.yaml"), "student=nowhere"], "nowhere has no config.json; name a file like it"),
        ([str(CONFIGS / "8b.yaml"), "--recipe", "other"], "recipe 'other' is none of distill_hybrid, align_hybrid"),
        ([str(CONFIGS / "8b_select.yaml"), "method=uniform"], "method 'uniform': what is planned are steps of gates"),
        ([str(CONFIGS / "8b_select.yaml"), "--keep", "0.5"], "it must be all and none: convert with --keep 0"),
        ([str(CONFIGS / "8b_dpo.yaml"), "teacher=null"], "lacks teacher, the reference; reference=student needs none"),
        ([str(CONFIGS / "8b_align.yaml"), "inputs=student"], "set inputs=teacher"),
        ([str(CONFIGS / "8b.yaml"), "student=null"], "8b.yaml lacks student"),
        ([str(CONFIGS / "8b.yaml"), "--gpus", "12"], "--gpus-per-node 8 does not divide the 12 GPUs"),
        (
            [str(CONFIGS / "8b.yaml"), "--gpus", "24", "data_parallel_shard=12"],
            "data_parallel_shard 12: of it and --gpus-per-node 8 one must divide the other",
        ),
        ([str(CONFIGS / "8b.yaml"), "--node-link", "0"], "--node-link 0.0 must be above 0"),
        ([str(CONFIGS / "8b.yaml"), "--gpus", "0"], "--gpus 0"),
        ([str(CONFIGS / "8b.yaml"), "data_parallel_shard=3"], "data_parallel_shard 3 does not divide the 8 GPUs"),
        ([str(CONFIGS / "8b.yaml"), "sequence_chunk=1024"], "sequence_chunk 1024: what is planned are whole rows"),
        (
            [str(CONFIGS / "8b_align.yaml"), "target=matrices"],
            "target matrices: what is planned is alignment to outputs",
        ),
        ([str(CONFIGS / "8b.yaml"), "bathc_size=2"], "unknown config key bathc_size"),
        ([str(CONFIGS / "8b.yaml"), "batch_size=many"], "batch_size 'many' must be a whole number"),
        ([str(CONFIGS / "smollm2_135m_cpu.yaml")], "add device=cuda"),
    ],
)
def test_what_is_wrong_is_named(words, message, tiny, capsys):
    files = [] if "student=nowhere" in words else ["--student-config", str(tiny["student_config"])]
    assert main(["plan", *words, *files, "--teacher-config", str(tiny["teacher_config"])]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_dtype_counts(tiny):
    half, single = (stage("distill_hybrid", "1b.yaml", tiny, dtype=d) for d in ("bf16", "fp32"))
    assert single.always()["teacher"] == 2 * half.always()["teacher"]
    assert torch.float32 == single.dtype


def test_a_reference_that_there_is_not_costs_nothing(tiny):
    def of(*overrides):
        return plan(CONFIGS / "8b_dpo.yaml", [*SMALL[:2], *overrides], **tiny)

    simpo = "loss._component_=torchtune_recipes.preference_loss.SimPOLoss"
    teacher, itself, none = of(), of("reference=student"), of(simpo, "loss.beta=2.0", "teacher=null")
    assert none.peak.bytes["teacher"] == 0 < teacher.peak.bytes["teacher"] < itself.peak.bytes["teacher"]
    assert none.loaded < teacher.loaded and none.flops < teacher.flops
    assert "teacher" not in "".join(m.name for m in none.moments)


def test_trials_take_more_steps_through_less(tiny):
    gates, trials = (stage("select_layers", "8b_select.yaml", tiny, method=m) for m in ("gates", "leave_one_out"))
    assert trials.peak(2).total < gates.peak(2).total
    # four layers: five passes without a way back; two with one
    assert (trials.exchange().gathers, gates.exchange().gathers) == (4 + 5 * 8, 4 + 2 * (2 * 8 + 1))


def brute(layout: Layout, unit: float, summed: bool) -> tuple[float, float]:
    """(all, from other nodes) of a GPU, from the edges of rings that pass through each node once."""
    N, s, node = layout.gpus, layout.shard, layout.node

    def ring(members: list[int], size: float, rounds: int) -> tuple[float, float]:
        n = len(members)
        crossing = sum(a // node != b // node for a, b in zip(members, members[1:] + members[:1], strict=True))
        come = rounds * size * (n - 1) / n  # over each edge of the ring
        return come, come * crossing / n  # each member's link has as many of the rings

    total, between = ring(list(range(s)), unit, 1)
    if summed:
        more = ring(list(range(0, N, s)), unit / s, 2)
        total, between = total + more[0], between + more[1]
    return total, between


@pytest.mark.parametrize("gpus, shard, node", [(8, 8, 8), (64, 8, 8), (64, 64, 8), (64, 16, 8), (16, 4, 8), (8, 2, 8)])
@pytest.mark.parametrize("summed", [False, True])
def test_what_comes_to_a_gpu(gpus, shard, node, summed):
    layout = Layout(gpus, shard, node)
    load = layout.load(Exchange(summed=1e9, sums=1) if summed else Exchange(gathered=1e9, gathers=1))
    total, between = brute(layout, 1e9, summed)
    assert (load.within + load.between, load.between) == pytest.approx((total, between))
    assert load.hops == shard - 1 + (2 * (gpus // shard - 1) if summed else 0)


def test_a_step_is_between_all_hidden_and_nothing(tiny, capsys):
    words = [str(CONFIGS / "8b.yaml"), *SMALL, *(f"--{k}-config={tiny[f'{k}_config']}" for k in ("student", "teacher"))]
    assert main(["plan", *words, "--gpus", "64", "data_parallel_shard=8", "--node-link", "0.001", "--hop", "1"]) == 0
    out = capsys.readouterr().out
    assert "on 64 GPUs of 8 a node, 8 copies of 8" in out
    waits, alone = (float(v) for v in re.findall(r"waits +([\d.]+) s, of which ([\d.]+) s", out)[0])
    best, worst = (float(v) for v in re.findall(r"a step +([\d.]+) to ([\d.]+) s for 16384 tokens", out)[0])
    assert 0 < alone < waits <= best <= worst
