"""How far students are from their teacher on a text: KL per token, agreement, perplexity, passage by passage.

Shapes: L tokens of one sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import ttest_rel
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_model
from .device import check_device
from .errors import UserError
from .model import HybridMambaForCausalLM
from .source import load_tokenizer, open_source
from .text import read_texts, token_stream


@dataclass
class Distance:
    """A student's distance from the teacher.

    Args:
        kl: mean KL(teacher || student) in nats per token.
        agreement: share of tokens at which both rank the same token first.
        perplexity_ratio: the student's perplexity over the teacher's.
        tokens: how many were scored.
        passage_kl: mean KL of each passage's tokens, in the order of the text.
    """

    kl: float
    agreement: float
    perplexity_ratio: float
    tokens: int
    passage_kl: list[float]


@torch.no_grad()
def compare(
    teacher: str | Path,
    students: list[str],
    text: str | Path,
    *,
    tokens: int = 20_000,
    length: int = 1024,
    column: str = "text",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Distance]:
    """Score students against a teacher on the first `tokens` tokens of a text.

    Args:
        teacher, students: checkpoints with one vocabulary.
        text: .txt or .jsonl; its passages are joined and cut into sequences of `length` tokens.
        tokens, length: how much, and how long a sequence is.
        column: of a .jsonl text.
        dtype, device: to compute in and on.

    Returns:
        Student -> distance.

    Raises:
        UserError: a checkpoint or the text cannot be read or is too short, or vocabularies differ.
    """
    if min(tokens, length) < 2:  # a token alone has none after it
        raise UserError(f"--tokens {tokens} and --length {length} must be at least 2")
    check_device(device)
    source = open_source(teacher)
    stream_T, passage_T = token_stream(read_texts(text, column), load_tokenizer(source.path), tokens)
    if len(stream_T) < 2:
        raise UserError(f"text {text} has {len(stream_T)} tokens, at least 2 are needed")
    model = load_model(teacher, dtype).to(device)
    rows = stream_T.to(device).split(length)
    hidden = [_hidden(model, row) for row in tqdm(rows, desc="scoring the teacher", unit="seq", disable=None)]
    result = {}
    for student in students:
        other = load_model(student, dtype).to(device)
        check_vocabularies(source.path, model, Path(student), other)
        result[student] = _distance(model, hidden, other, rows, passage_T, Path(student).name)
        del other  # before the next one is loaded
    return result


def check_vocabularies(a: Path, model_a: HybridMambaForCausalLM, b: Path, model_b: HybridMambaForCausalLM) -> None:
    """Two models must have one vocabulary, or a KL between them means nothing.

    Raises:
        UserError: other sizes, tokenizers that number tokens differently, or none.
    """
    if model_a.vocab_size != model_b.vocab_size:
        raise UserError(f"{a} has {model_a.vocab_size} tokens and {b} has {model_b.vocab_size}; they must be the same")
    if a.is_dir() and b.is_dir():
        # only where both name a token: a tokenizer's class may add names behind the vocabulary's end
        names_a, names_b = ({i: t for t, i in load_tokenizer(p).get_vocab().items()} for p in (a, b))
        odd = next((i for i in sorted(names_a.keys() & names_b.keys()) if names_a[i] != names_b[i]), None)
        if odd is not None:
            raise UserError(
                f"the tokenizers of {a} and {b} differ: token {odd} is {names_a[odd]!r} and {names_b[odd]!r}; "
                "teacher and student must share one"
            )


def _hidden(model: HybridMambaForCausalLM, row_L: Tensor) -> Tensor:
    """Last hidden states of a sequence (L, D)."""
    return model.model(row_L[None]).last_hidden_state[0]


def _distance(
    teacher: HybridMambaForCausalLM,
    teacher_hidden: list[Tensor],
    student: HybridMambaForCausalLM,
    rows: Sequence[Tensor],
    passage_T: Tensor,
    name: str,
) -> Distance:
    kl_T, agree, surprise = [], 0, 0.0
    for row, t_LD in zip(tqdm(rows, desc=f"scoring {name}", unit="seq", disable=None), teacher_hidden, strict=True):
        s_LD = _hidden(student, row)
        for at in range(0, len(row), 256):  # never length x vocabulary
            p_LV = teacher.lm_head(t_LD[at : at + 256]).float().log_softmax(-1)
            q_LV = student.lm_head(s_LD[at : at + 256]).float().log_softmax(-1)
            kl_T.append((p_LV.exp() * (p_LV - q_LV)).sum(-1).cpu())
            agree += int((p_LV.argmax(-1) == q_LV.argmax(-1)).sum())
            following = row[at + 1 : at + 257, None]
            surprise += float((p_LV - q_LV)[: len(following)].gather(-1, following).sum())
    kl = torch.cat(kl_T).double()
    scored = len(kl) - len(rows)  # the last token of a sequence has none after it
    counts = torch.bincount(passage_T).double()
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, passage_T, kl)
    return Distance(
        kl=float(kl.mean()),
        agreement=agree / len(kl),
        perplexity_ratio=math.exp(surprise / scored),
        tokens=len(kl),
        passage_kl=(sums / counts)[counts > 0].tolist(),
    )


def paired_p(before: Distance, after: Distance) -> float:
    """Two-sided p of a paired t-test of two students' KL over passages."""
    return float(ttest_rel(before.passage_kl, after.passage_kl).pvalue)


def format_distances(distances: dict[str, Distance]) -> str:
    """The table that `mamba-hybrid compare` prints; later students are compared with the first."""
    width = max(len(s) for s in distances)
    lines = [f"{'student':{width}}  KL nats/token  top-1 agreement  perplexity ratio  change    paired p"]
    first = next(iter(distances.values()))
    for name, d in distances.items():
        change = "" if d is first else f"{100 * (d.kl / first.kl - 1):+6.1f} %  {paired_p(first, d):9.2g}"
        row = f"{name:{width}}  {d.kl:13.4f}  {d.agreement:15.3f}  {d.perplexity_ratio:16.3f}  {change}"
        lines.append(row.rstrip())
    lines.append(f"{first.tokens} tokens of {len(first.passage_kl)} passages")
    return "\n".join(lines)
