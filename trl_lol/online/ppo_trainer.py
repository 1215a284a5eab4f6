import textwrap
from typing import Any

from torch import Tensor

from ..losses import ppo_policy_loss
from .ppo_config import RENAMED_ARGUMENTS, PPOConfig, refuse_old_names
from .trainer import _ActorCriticTrainer


class PPOTrainer(_ActorCriticTrainer):
    """
    Trainer for Proximal Policy Optimization (PPO), as introduced in [Proximal Policy Optimization
    Algorithms](https://huggingface.co/papers/1707.06347) and used on language models since [Fine-Tuning Language
    Models from Human Preferences](https://huggingface.co/papers/1909.08593): a KL penalty per token in the reward,
    GAE, a clipped surrogate.

    It takes the place of the PPOTrainer that TRL had until 1.12, with the constructor, datasets, reward functions and
    generation of [`~trl.GRPOTrainer`]. There is no separate value model: the critic is a head on the policy.

    Example:

    ```python
    from datasets import Dataset
    from trl_lol import PPOConfig, PPOTrainer


    def reward_len(completions, **kwargs):
        return [-abs(20 - len(completion)) / 20 for completion in completions]


    trainer = PPOTrainer(
        "Qwen/Qwen3-0.6B",
        reward_funcs=reward_len,
        args=PPOConfig("out", per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is"]}),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.GRPOTrainer`]. The reference of a model in memory is a copy of it.
        reward_funcs (`Callable`, [`~transformers.PreTrainedModel`], `str` or a list of these):
            Reward functions or sequence-classification reward models, as for [`~trl.GRPOTrainer`]. A completion for
            which all of them return `None` is left out of both losses.
        args ([`PPOConfig`], *optional*):
            Configuration of the trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a column `"prompt"`, of strings or of message lists. Other columns go to the reward functions.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset used for evaluation.
        processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.GRPOTrainer`].
        tools, rollout_func, environment_factory:
            Not supported.
    """

    _config_class = PPOConfig
    _kl_in_reward = True
    _name = "PPO"
    _tag_names = ["trl", "trl-lol", "ppo"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __new__(cls, *args: Any, **kwargs: Any) -> "PPOTrainer":
        refuse_old_names(kwargs, RENAMED_ARGUMENTS)
        return super().__new__(cls)

    def _policy_loss(self, logps: Tensor, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        old_logps, advantages, epsilon = inputs["old_per_token_logps"], inputs["advantages"], self.args.epsilon
        advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        ratio = (logps.detach() - old_logps).exp()
        is_low_clipped = (ratio < 1 - epsilon) & (advantages < 0)
        is_high_clipped = (ratio > 1 + epsilon) & (advantages > 0)
        clipped = {"low_mean": is_low_clipped, "high_mean": is_high_clipped}
        clipped["region_mean"] = is_low_clipped | is_high_clipped
        self._log_means({f"clip_ratio/{name}": (x.float(), mask) for name, x in clipped.items()})
        return ppo_policy_loss(logps, old_logps, mask, advantages, epsilon=epsilon)
