"""ICPO inside TRL's GRPOTrainer: several GPUs, DeepSpeed and vLLM by TRL's own flags.

    pip install trl==1.16.0
    python examples/trl_icpo.py --model DIR_OR_HUB_NAME --data train.jsonl --output_dir runs/trl
    accelerate launch --num_processes 2 examples/trl_icpo.py --model ... --data ... --output_dir ...

The data has a "prompt" and an "answer" in each line. --alpha and --sharpness (ICPO's beta; TRL's --beta is
the weight of the KL) are ICPO's, all other flags GRPOConfig's; but with --mask_truncated_completions a
masked response would count as certain. Run on a CPU, in one process and in two (accelerate launch
--multi_gpu, script --use_cpu), with and without TRL's old log-probs. Not run with a GPU, vLLM or DeepSpeed.
ICPOTrainer takes what GRPOTrainer takes, such as a peft_config for LoRA (not run either).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import load_dataset
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from icpo import icpo_advantage, preference_advantage, sequence_log_prob
from verify import reward_func


class ICPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are icpo_advantage(rewards, l, **icpo)."""

    def __init__(self, *args, icpo: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.icpo = icpo

    def _calculate_rewards(self, *args):
        # (B, functions), of all processes: a group may span several
        per_function = super()._calculate_rewards(*args)
        self.rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        return per_function

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        log_probs = output.get("old_per_token_logps")
        if log_probs is None:  # TRL leaves them out where every update starts from the policy that sampled
            with torch.no_grad():
                log_probs, *_ = self._get_per_token_logps_and_entropies(
                    self.model, torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                    torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1), mask.shape[1],
                    batch_size=self.args.per_device_train_batch_size)
        confidence = gather(sequence_log_prob(log_probs, mask)).view(-1, self.num_generations)
        advantages = icpo_advantage(self.rewards.view_as(confidence), confidence, **self.icpo)
        output["advantages"] = advantages.flatten().split(len(mask))[self.accelerator.process_index]
        preference = preference_advantage(confidence, self.icpo["beta"])
        for name, values in (("preference", preference), ("advantage", advantages)):
            self._metrics["train"][f"icpo/{name}_abs_mean"].append(values.abs().mean().item())
        return output


@dataclass
class Arguments:
    model: str
    data: str
    alpha: float = 0.1
    sharpness: float = 10.0


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, GRPOConfig)).parse_args_into_dataclasses()
    ICPOTrainer(model=arguments.model, reward_funcs=reward_func, args=config,
                train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
                icpo=dict(alpha=arguments.alpha, beta=arguments.sharpness)).train()
    # Joins gloo's threads: one that still frees a tensor while Python exits aborts the process.
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
