"""ICPO inside verl (0.9.1), as an advantage estimator, with verify.py as the reward.

    export PYTHONPATH=$PWD:$PWD/examples VERL_USE_EXTERNAL_MODULES=verl_icpo
    python -m verl.trainer.main_ppo algorithm.adv_estimator=icpo +algorithm.icpo.alpha=0.1 \
        reward.custom_reward_function.path=verify.py actor_rollout_ref.rollout.n=8 ...

verl imports the named module in each of its processes. Run on a CPU: the registration, and verl's own
compute_advantage on a batch of tensors. Not run: a training, for which verl needs a GPU and vLLM or SGLang.
"""

import functools

import torch
from verl.trainer.ppo import core_algos, ray_trainer

from icpo import icpo_advantage, sequence_log_prob


def icpo(token_level_rewards, response_mask, index, old_log_probs, config=None, **kwargs):
    """Advantages and returns (B, T), like verl's estimators. The prompt ids in index (B,) make the groups.

    Groups may be of any size: a failed rollout leaves one short, and verl's padding has an id of its own.
    """
    rewards, confidence = token_level_rewards.sum(dim=1), sequence_log_prob(old_log_probs, response_mask)
    settings = dict(alpha=0.1, beta=10.0) | dict((config or {}).get("icpo") or {})
    advantages = torch.empty_like(confidence)
    for prompt in set(index):
        group = torch.as_tensor(index == prompt, device=response_mask.device)
        advantages[group] = icpo_advantage(rewards[group], confidence[group], **settings)
    return (advantages[:, None] * response_mask,) * 2


compute_advantage = ray_trainer.compute_advantage


@functools.wraps(compute_advantage)
def with_old_log_probs(data, *args, **kwargs):
    """verl gives estimators no log-probs: this binds those of the batch before it looks the estimator up."""
    estimator = functools.partial(icpo, old_log_probs=data.batch["old_log_probs"])
    core_algos.ADV_ESTIMATOR_REGISTRY["icpo"] = estimator
    return compute_advantage(data, *args, **kwargs)


# In time: verl imports this module before its trainers import the function.
ray_trainer.compute_advantage = with_old_log_probs
