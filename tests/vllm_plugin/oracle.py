"""A proposer for vLLM's `custom_class` speculation that knows the reference and errs on purpose, so that a verify
step accepts any number of drafts from none to all.

ORACLE_JOB names a file with `sequences` (prompt and continuation, token ids) and `vocab`.
"""

import json
import os
import random


class Oracle:
    def __init__(self, vllm_config):
        self.drafts = vllm_config.speculative_config.num_speculative_tokens
        with open(os.environ["ORACLE_JOB"]) as f:
            job = json.load(f)
        self.sequences, self.vocab = job["sequences"], job["vocab"]
        self.random = random.Random(0)

    def load_model(self, *args, **kwargs):
        """Nothing to load."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        drafts = []
        for row, sampled in enumerate(sampled_token_ids):
            n = int(num_tokens_no_spec[row])
            seen = token_ids_cpu[row, :n].tolist()
            known = next((s for s in self.sequences if s[:n] == seen), None) if sampled else None
            count = self.random.choice([0, 1, self.drafts, self.drafts, self.drafts])
            right = known[n : n + count] if known else []
            drafts.append([t if self.random.random() > 0.25 else (t + 1) % self.vocab for t in right])
        return drafts
