"""Stories of a small real language model, rewarded for their sentiment."""

import os
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_lol import score_dataset
from trl_lol.generation import generate_completions

from ..task import Task


# Stories are cut, so that no EOS belongs behind them: messages are written one after the other
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@cache
def openings() -> dict[str, list[str]]:
    """Distinct beginnings of stories, of 4 to 8 words."""
    names = ("Lily", "Tom", "Ben", "Mia", "Sara", "Max", "Anna", "Tim", "Sue", "Jack")
    things = ("dog", "cat", "bird", "bear", "car", "tree", "ball", "fish", "frog", "toy")
    kinds = ("little", "big", "old", "red", "sad", "happy", "funny", "small")
    places = ("park", "beach", "shop", "forest", "farm", "garden")
    frames = (
        "Once upon a time there was a {kind} {thing}",
        "One day {name} went to the {place}",
        "{name} had a {kind} {thing}",
        "{name} and {other} were in the {place}",
        "There was a {kind} {thing} named {name}",
        "One day a {kind} {thing} came to {name}",
        "{name} wanted to see the {kind} {thing}",
        "The {kind} {thing} and {name} were friends",
    )
    rng = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < 340:
        name, other = rng.sample(names, 2)
        slots = {"name": name, "other": other, "kind": rng.choice(kinds), "thing": rng.choice(things)}
        texts[rng.choice(frames).format(**slots, place=rng.choice(places))] = None
    shuffled = rng.sample(list(texts), len(texts))
    return {"train": shuffled[:240], "validation": shuffled[240:280], "test": shuffled[280:]}


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: list, completions: list, **columns: Any) -> list[float]:
    """VADER's compound score of the completion, from -1 to 1."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [_analyzer().polarity_scores(text)["compound"] for text in texts]


class Stories(Task):
    """Stories sampled from the reference policy itself, with their sentiment."""

    name = "stories"
    description = (
        "A language model of 260 thousand parameters that was trained on children's stories: eight stories of 48 "
        "tokens for each of 240 openings, drawn from it, rewarded by their sentiment (VADER's compound score, from -1 "
        "to 1). Training and judging take the same reward, on other openings."
    )
    importable_reward = "benchmarks.trl_ppo:sentiment"
    seeds = (0, 1, 2)
    num_sequences, batch_size = 1920, 32
    num_completions = 1920
    num_generations = 8
    learning_rates = (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3)
    betas = (0.05, 0.1, 0.2, 0.5, 1.0, 3.0)  # of CoPG the small ones matter, of DPO and IPO the large ones
    beta_learning_rates = (1e-4,)
    online_betas = (0.05, 0.2, 1.0)
    online_learning_rates = (1e-4,)
    group_size = 8

    @property
    def missing(self) -> str | None:
        if not Path(os.environ.get("STORIES260K", "missing")).exists():
            return f"`{self.name}` needs STORIES260K, the folder of the model."
        return None if find_spec("vaderSentiment") else f"`{self.name}` needs `pip install vaderSentiment`."

    def make_reference(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        path = os.environ["STORIES260K"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = TEMPLATE
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), tokenizer

    def make_rows(self, seed: int) -> Dataset:
        prompts = openings()["train"]
        stories, _, _ = generate_completions(
            self.reference(),
            self.tokenizer,
            [prompt for prompt in prompts for _ in range(self.group_size)],
            max_new_tokens=self.max_completion_length,
            batch_size=480,
            seed=1000 + seed,  # not the seed of the judging
        )
        answers = iter([{"role": "assistant", "content": story}] for story in stories)
        rows = {
            "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
            "completions": [[next(answers) for _ in range(self.group_size)] for _ in prompts],
        }
        return score_dataset(Dataset.from_dict(rows), sentiment)

    def prompts(self, split: str) -> Dataset:
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in openings()[split]]})

    def reward(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        return sentiment(prompts, completions)


class StoriesOf2(Stories):
    """The same with two stories for each opening."""

    name = "stories_k2"
    group_size = 2


class StoriesOf4(Stories):
    """The same with four stories for each opening."""

    name = "stories_k4"
    group_size = 4
