"""Workers beside whose scheduler each number of drafts is tried for two steps."""

from round_worker import RoundWorker, WithoutGraphs

from vllm_plugin import draft_choice

__all__ = ["RoundWorker", "WithoutGraphs"]

draft_choice.TRIAL_STEPS = draft_choice.TRIAL_ROWS = 2
draft_choice.KEPT = draft_choice.LONGEST = 1
