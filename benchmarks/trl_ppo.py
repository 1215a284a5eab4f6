"""
One run of the PPO trainer that TRL had until 1.12. [`train_old_ppo`] starts this file in an environment with that
version, and its caller judges the policies that it saves.

    python -m benchmarks.trl_ppo SPEC

Nothing here imports what needs a newer TRL; the reward function that a spec names must not, either (that of
`trl_lol.toy` does not).
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from .meter import Meter


def train_old_ppo(environment_python: Path, spec: Mapping[str, Any], folder: Path, threads: int = 1) -> dict[str, Any]:
    """
    Train with TRL 1.12's PPO, in a process of its environment.

    Args:
        environment_python (`Path`):
            Python of an environment with TRL 1.12 and what the reward function imports.
        spec (`dict[str, Any]`):
            What to run:

            - `model` (`str`): folder of the policy, with its tokenizer; reference and value model are made of it, too
            - `prompts` (`list`), `prompt_ids` (`list[list[int]]`): training prompts, as the reward function gets them
              (text or messages) and as tokens; one that comes twice has the columns of the last
            - `columns` (`dict[str, list]`, *optional*): one entry per prompt, for the reward function
            - `reward` (`str`): reward function, as `"module:function"`
            - `seed` (`int`), `num_completions` (`int`), `batch_size` (`int`, completions generated at a time),
              `max_new_tokens` (`int`), `dtype` (`str`)
            - `judged_batches` (`list[int]`): numbers of batches after which to save the policy
            - `arguments`, `settings` (`dict[str, Any]`): fields of the config
        folder (`Path`):
            Folder to work in. The spec, the log and the policies are written there.
        threads (`int`, *optional*, defaults to `1`):
            Number of threads.

    Returns:
        `dict[str, Any]`: `costs` ([`~benchmarks.meter.Meter.measure`]), `updates_per_batch`, `versions` and
        `log_history`, and in `policies` the folder of each saved policy by the number of completions before it.

    Raises:
        `RuntimeError`: If the run fails, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps({**spec, "folder": str(folder)}))
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths.strip(os.pathsep)}
    with open(folder / "log.txt", "w") as log:
        command = [environment_python, "-m", "benchmarks.trl_ppo", path]
        done = subprocess.run(command, env=variables, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"TRL 1.12's PPO failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    counts = [batches * spec["batch_size"] for batches in spec["judged_batches"]]
    policies = {count: folder / str(count) for count in counts}
    return {**json.loads((folder / "measured.json").read_text()), "policies": policies}


def sentiment(prompts: list, completions: list, **columns: Any) -> list[float]:
    """VADER's compound score of the completion, from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()  # made anew for every batch, as in the other methods' reward
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


class Scorer:
    """
    Rewards what the trainer has generated, cut at EOS and padded.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a pad token that is nothing else.
        spec (`dict[str, Any]`):
            What is run, see [`train_old_ppo`].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any]) -> None:
        module, _, name = spec["reward"].partition(":")
        self.reward = getattr(importlib.import_module(module), name)
        self.tokenizer = tokenizer
        self.prompts, self.columns = spec["prompts"], spec.get("columns", {})
        self.rows = {tuple(ids): row for row, ids in enumerate(spec["prompt_ids"])}

    def __call__(self, query_responses: torch.Tensor, pad_token_id: int, context_length: int) -> torch.Tensor:
        queries, responses = query_responses[:, :context_length], query_responses[:, context_length:]
        rows = [self.rows[tuple(ids[ids != pad_token_id].tolist())] for ids in queries]
        prompts = [self.prompts[row] for row in rows]
        ids = [row[row != pad_token_id] for row in responses]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        rewards = self.reward(prompts, completions, **columns)
        return torch.tensor(rewards, dtype=torch.float, device=query_responses.device)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    # A token of its own, as in TRL's example script: this trainer takes every pad token for padding, and with EOS as
    # the pad token it would not train on EOS. The id is past the embeddings and is replaced before every forward.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    score, of_model = Scorer(tokenizer, spec), ppo_trainer.get_reward

    def get_reward(model: torch.nn.Module, *args: Any) -> tuple:
        return (None, score(*args), None) if model is reward_model else of_model(model, *args)

    ppo_trainer.get_reward = get_reward
    reward_model = torch.nn.Identity()

    set_seed(spec["seed"])
    points = {batches: batches * spec["batch_size"] for batches in spec["judged_batches"]}
    folder = Path(spec["folder"])
    meter = Meter(lambda completions: trainer.policy_model.save_pretrained(folder / str(completions)), points)
    dtype = getattr(torch, spec["dtype"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype) for _ in range(2))
    value_model = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=dtype)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=spec["folder"],
            total_episodes=spec["num_completions"],
            response_length=spec["max_new_tokens"],
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            local_rollout_forward_batch_size=min(64, spec["batch_size"]),
            **spec["arguments"],
            **spec["settings"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": spec["prompt_ids"]}),
        callbacks=[meter],
    )
    costs = meter.measure(trainer.train)
    return {
        "costs": costs,
        "updates_per_batch": trainer.args.num_ppo_epochs,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "log_history": trainer.state.log_history,
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    (Path(spec["folder"]) / "measured.json").write_text(json.dumps(train(spec)) + "\n")
