"""The verifier as OpenRLHF's reward: give this file to --reward.remote_url, with verify.py on the PYTHONPATH.

Written against OpenRLHF's interface and tested alone; OpenRLHF itself was not run.
"""

import re

import torch

from verify import verify

END = re.compile(r"(?:<\|\w+\|>|</s>|<eos>|<end_of_turn>)\s*\Z")  # queries are decoded with special tokens


def reward_func(queries, prompts, labels, **kwargs):
    """Rewards (B,) of B queries, each a prompt and its response; labels are the reference answers."""
    responses = [END.sub("", query[len(prompt):]) for query, prompt in zip(queries, prompts)]
    rewards = torch.tensor([float(verify(*pair)) for pair in zip(responses, labels)])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
