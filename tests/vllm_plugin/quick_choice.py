"""The plugin's scheduler, which tries each number of drafts for two steps."""

from vllm_plugin import draft_choice
from vllm_plugin.metrics import share_metrics
from vllm_plugin.scheduler import make_scheduler

__all__ = ["make_scheduler"]

draft_choice.TRIAL_STEPS = draft_choice.TRIAL_ROWS = 2
draft_choice.KEPT = 1
share_metrics()  # the plugin does so where no scheduler is named
