"""torchtune recipes of all stages (alignment, selection, KD-SFT, DPO), their models, data and metrics, the planner."""
