"""ICPO inside TRL's GRPOTrainer: several GPUs, DeepSpeed and vLLM by TRL's own flags.

    pip install trl==1.16.0
    python examples/trl_icpo.py --model DIR_OR_HUB_NAME --data train.jsonl --output_dir runs/trl
    accelerate launch --num_processes 2 examples/trl_icpo.py --model ... --data ... --output_dir ...

The data has a "prompt" and an "answer" in each line. --alpha and --sharpness (ICPO's beta; TRL's --beta is
the weight of the KL) are ICPO's, all other flags GRPOConfig's. Run on a CPU, in one process and in two
(accelerate launch --multi_gpu, script --use_cpu). Not run with a GPU, vLLM or DeepSpeed. ICPOTrainer takes
what GRPOTrainer takes, such as a peft_config for LoRA (not run either), but no images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from icpo import preference_advantage, sequence_log_prob, uniform_groups
from verify import reward_func


def preference(completions, **kwargs):
    """A reward that ICPOTrainer fills in."""
    return [None] * len(completions)


class ICPOTrainer(GRPOTrainer):
    """GRPOTrainer with one more reward, ICPO's s of weight alpha, which TRL itself adds, normalizes and logs.

    So scale_rewards and the like mean what they mean in TRL, whose 1e-4 beside the std is in A, too. s is 0
    where the rewards of a group tie. A response whose rewards are all None is compared with none.
    """

    def __init__(self, *args, alpha=0.1, sharpness=10.0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("ICPO needs multi_objective_aggregation='sum_then_normalize': it adds s to the reward")
        self.sharpness = sharpness
        self.reward_funcs = [*self.reward_funcs, preference]
        self.reward_func_names.append("preference")
        self.reward_processing_classes = [*self.reward_processing_classes, None]
        self.reward_weights = torch.cat([self.reward_weights, torch.tensor([alpha])])

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        return self.generated

    def _calculate_rewards(self, inputs, *args):
        # (B, functions) of all processes, since a group may span several; NaN for None
        per_function = super()._calculate_rewards(inputs, *args)
        if not self.model.training:
            return per_function
        if "image" in inputs[0] or "images" in inputs[0]:
            raise ValueError("ICPOTrainer takes no images: it scores responses without them")
        confidence = gather(self.confidence())
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        scored = ~per_function.isnan().all(dim=1)
        for group in torch.arange(len(rewards), device=rewards.device).split(self.num_generations):
            group = group[scored[group]]
            if len(group):
                s = preference_advantage(confidence[group], self.sharpness)
                per_function[group, -1] = torch.where(uniform_groups(rewards[group]), 0, s)
        return per_function

    def confidence(self):
        """l of this process's responses, by a forward pass. Tokens that come from a tool do not count."""
        device, (prompts, completions, tool_masks) = self.accelerator.device, self.generated[:3]
        ids, masks = [], []
        for rows, side in ((prompts, "left"), (completions, "right")):
            rows = [torch.tensor(row, device=device) for row in rows]
            ids.append(pad_sequence(rows, True, self._tokenizer.pad_token_id, side))
            masks.append(pad_sequence([torch.ones_like(row) for row in rows], True, 0, side))
        with torch.no_grad():
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.model, torch.cat(ids, dim=1), torch.cat(masks, dim=1), ids[1].shape[1],
                batch_size=self.args.per_device_train_batch_size)
        if tool_masks is not None:
            masks[1] = pad_sequence([torch.tensor(row, device=device) for row in tool_masks], True)
        return sequence_log_prob(log_probs, masks[1])


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
                alpha=arguments.alpha, sharpness=arguments.sharpness).train()
    # Joins gloo's threads: one that still frees a tensor while Python exits aborts the process.
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
