"""torchtune recipes: `distill_hybrid` (KD-SFT), with its models, data, checkpoints and metrics."""
