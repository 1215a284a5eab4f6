import textwrap

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..data import group_mask
from ..losses import copg_loss
from .copg_config import CoPGConfig
from .trainer import _OfflineRewardTrainer


logger = get_logger(__name__)


class CoPGTrainer(_OfflineRewardTrainer):
    """
    Trainer for Contrastive Policy Gradient (CoPG), introduced in [Contrastive Policy Gradient: Aligning LLMs on
    sequence-level scores in a supervised-friendly fashion](https://huggingface.co/papers/2406.19185).

    Completions of one prompt are contrasted by their rewards. Whoever wrote them, the optimum is that of the
    KL-regularised reward, π ∝ π_ref e^{R/β}, without importance weights, clipping or a critic.

    It takes the place of [`~trl.DPOTrainer`]: the constructor, the datasets and the arguments are the same, and
    `reward_funcs` is new. A row with several completions is a group, a preference is a group of two, and rows with one
    completion are grouped by their prompts. See the README for the row formats.

    Example:

    ```python
    from datasets import Dataset
    from trl_lol import CoPGConfig, CoPGTrainer

    dataset = Dataset.from_dict({"prompt": ["1 + 1 ="], "completions": [[" 2", " 3"]], "rewards": [[1.0, 0.0]]})
    trainer = CoPGTrainer("Qwen/Qwen3-0.6B", args=CoPGConfig("out"), train_dataset=dataset)
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference policy. If `None`, it is the initial policy: the model without its adapter when training one,
            else a copy in memory, which `args.precompute_ref_log_probs=True` makes unnecessary.
        args ([`CoPGConfig`], *optional*):
            Configuration of the trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function that makes a batch. Defaults to [`~trl_lol.data.DataCollatorForGroups`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of prompts, completions and rewards, in any of the accepted row formats. A prompt with a single
            scored completion is dropped.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset used for evaluation.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        compute_metrics (`Callable`, *optional*):
            Not supported: it would get one sequence per row.
        callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.DPOTrainer`].
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions in the signature of [`~trl.GRPOTrainer`], which score the completions before training.
            They take precedence over reward columns.
    """

    _config_class = CoPGConfig
    _min_completions = 2
    _name = "CoPG"
    _tag_names = ["trl", "trl-lol", "copg"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",  # noqa: E501
        "id": "2406.19185",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{fletberliac2024contrastive,
                title        = {{Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion}},
                author       = {Yannis Flet-Berliac and Nathan Grinsztajn and Florian Strub and Eugene Choi and Bill Wu and Chris Cremer and Arash Ahmadian and Yash Chandak and Mohammad Gheshlaghi Azar and Olivier Pietquin and Matthieu Geist},
                year         = 2024,
                booktitle    = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing, {EMNLP} 2024},
            }"""),  # noqa: E501
    }

    def _add_advantages(
        self, dataset: Dataset | IterableDataset, name: str, is_train: bool = False
    ) -> Dataset | IterableDataset:
        if is_train and isinstance(dataset, Dataset) and all(len(set(group)) == 1 for group in dataset["rewards"]):
            logger.warning(
                "In every group the rewards are equal: there is nothing to learn but to stay near the reference. "
                "Check the rewards, or use prompts on which the completions differ."
            )
        return dataset

    def _loss(
        self, logps: Tensor, ref_logps: Tensor, mask: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        members = group_mask(inputs["group_ids"])

        def by_group(x: Tensor) -> Tensor:  # (batch,) -> (num_groups, k)
            return x.new_zeros(members.shape).masked_scatter(members, x)

        rewards = by_group(inputs["rewards"])
        logps, ref_logps = by_group(logps.sum(1)), by_group(ref_logps.sum(1))
        loss = copg_loss(logps, ref_logps, rewards, beta=self.args.beta, mask=members).mean()

        log_ratio = (logps - ref_logps).detach()
        better = (rewards.unsqueeze(2) > rewards.unsqueeze(1)) & members.unsqueeze(2) & members.unsqueeze(1)
        margins = (log_ratio.unsqueeze(2) - log_ratio.unsqueeze(1))[better]
        k = members.sum(1, keepdim=True)
        deviations = (rewards - rewards.sum(1, keepdim=True) / k) * members
        return loss, {
            "rewards/spread": (deviations.square().sum(1) / (k.squeeze(1) - 1)).sqrt(),
            "rewards/accuracies": (margins.sign() + 1) / 2,  # pairs of equal log-ratio count as half right
        }
