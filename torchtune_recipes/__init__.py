"""torchtune recipes: `distill_hybrid` (KD-SFT), its models, data, checkpoints and metrics.

These files are in use and committed: extend them rather than write them anew.
"""
