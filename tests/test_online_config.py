"""Configs of the online trainers, and what their constructors and reward functions are not to be given."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cpu_args, distance, weights
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedTokenizerFast
from trl import GRPOConfig

from trl_lol import APAConfig, APATrainer, DRPOConfig, DRPOTrainer, PPOConfig, PPOTrainer
from trl_lol.online.base_config import _ActorCriticConfig
from trl_lol.online.ppo_config import RENAMED_ARGUMENTS, RENAMED_FIELDS


TRAINERS = {PPOConfig: PPOTrainer, APAConfig: APATrainer, DRPOConfig: DRPOTrainer}
CONFIGS = list(TRAINERS)


def make(config_class: type, **kwargs: Any) -> Any:
    return cpu_args(config_class, "unused", **kwargs)


# ---- Configs ----


def test_documented_defaults():
    shared = {
        "advantage_estimator": "gae",
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "value_learning_rate": None,
        "missing_eos_penalty": None,
        "num_generations": 1,
        "disable_dropout": True,
    }
    own = {
        PPOConfig: {
            "beta": 0.05,
            "epsilon": 0.2,
            "num_iterations": 4,
            "vf_coef": 0.1,
            "value_epsilon": 0.2,
            "whiten_advantages": True,
            "loss_type": "ppo",
        },
        APAConfig: {
            "beta": 0.1,
            "num_iterations": 1,
            "vf_coef": 1.0,
            "value_epsilon": None,
            "whiten_advantages": False,
            "loss_type": "apa",
            "reset_ref_patience": None,
        },
    }
    own[DRPOConfig] = own[PPOConfig] | {
        "reset_prob": 1.0,
        "min_roll_in": 0,
        "train_on_roll_in_values": False,
        "reference_column": None,
    }
    for config_class, expected in own.items():
        config = make(config_class)
        assert {name: getattr(config, name) for name in shared | expected} == shared | expected


@pytest.mark.parametrize("config_class", CONFIGS)
def test_one_generation_per_prompt(config_class: type):
    """1 is what GRPOConfig refuses; afterwards it is a plain integer."""
    with pytest.raises(ValueError, match="at least 2 generations"):
        make(GRPOConfig, num_generations=1)
    config = make(config_class, num_generations=1, num_generations_eval=1, eval_strategy="steps", eval_steps=1)
    assert config.num_generations == 1 and type(config.num_generations) is int
    assert make(config_class, num_generations=4).num_generations == 4
    with pytest.raises(ValueError, match="divisible by num_generations"):
        make(config_class, num_generations=3)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_command_line(config_class: type):
    parser = HfArgumentParser(config_class)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--use_cpu", "--bf16", "False", "--lam", "0.9", "--value_epsilon", "0.3"]
    )
    assert (config.lam, config.value_epsilon, config.num_generations) == (0.9, 0.3, 1)


GRPO_ONLY = {
    "delta": 2.0,
    "epsilon_high": 0.28,
    "importance_sampling_level": "sequence",
    "loss_type": "dr_grpo",
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5,
    "sapo_temperature_neg": 2.0,
    "scale_rewards": "none",
    "sync_ref_model": True,
    "top_entropy_quantile": 0.2,
    "use_adaptive_entropy": True,
    "vespo_k_pos": 1.0,
}


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(("name", "value"), GRPO_ONLY.items())
def test_what_means_something_to_grpo_only(config_class: type, name: str, value: Any):
    with pytest.raises(ValueError, match=f"`{name}="):
        make(config_class, **{name: value})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_grpo_defaults_are_no_error(config_class: type):
    """Also as they are written in scripts: `scale_rewards=True` is GRPO's "group"."""
    defaults = {name: getattr(GRPOConfig, name) for name in _ActorCriticConfig._grpo_only}
    config = make(config_class, **(defaults | {"scale_rewards": True}))
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.scale_rewards == "group"


@pytest.mark.parametrize(
    ("config_class", "kwargs", "message"),
    [
        (PPOConfig, {"beta": -0.1}, "must not be negative"),
        (PPOConfig, {"epsilon": 0.0}, "must be positive"),
        (PPOConfig, {"loss_type": "apa"}, "PPOConfig accepts 'ppo'"),
        (APAConfig, {"beta": 0.0}, "must be positive"),
        (APAConfig, {"epsilon": 0.1}, "`epsilon=0.1` is an argument of GRPO that has no meaning here"),
        (APAConfig, {"loss_type": "ppo"}, "accepts 'apa' or 'awr'"),
        (APAConfig, {"reset_ref_patience": 0, "eval_strategy": "steps", "eval_steps": 1}, "at least 1"),
        (APAConfig, {"reset_ref_patience": 2}, "eval_strategy='no'"),
        (APAConfig, {"reset_ref_patience": 2, "loss_type": "awr"}, "AWR has none"),
        (DRPOConfig, {"loss_type": "drpo"}, "DRPOConfig accepts 'ppo'"),
        (DRPOConfig, {"reset_prob": 1.5}, "between 0 and 1: it is a probability"),
        (DRPOConfig, {"min_roll_in": -1}, "`min_roll_in=-1` must be at least 0"),
        (DRPOConfig, {"min_roll_in": 8, "max_completion_length": 8}, "less than `max_completion_length=8`"),
        (
            DRPOConfig,
            {"advantage_estimator": "leave_one_out", "num_generations": 2, "train_on_roll_in_values": True},
            "`train_on_roll_in_values=True` does nothing",
        ),
        *[
            (config_class, kwargs, message)
            for config_class in CONFIGS
            for kwargs, message in [
                ({"advantage_estimator": "reinforce"}, "Use 'gae' or 'leave_one_out'"),
                ({"advantage_estimator": "leave_one_out"}, "`num_generations=1`"),
                ({"advantage_estimator": "leave_one_out", "num_generations": 2, "lam": 0.9}, "`lam=0.9` does nothing"),
                ({"advantage_estimator": "leave_one_out", "num_generations": 2, "vf_coef": 0.5}, "`vf_coef=0.5`"),
                ({"gamma": 1.1}, "between 0 and 1"),
                ({"lam": -0.1}, "between 0 and 1"),
                ({"missing_eos_penalty": -1.0}, "must be positive"),
                ({"value_epsilon": 0.0}, "must be positive"),
                ({"value_learning_rate": 0.0}, "must be positive"),
                ({"vf_coef": -1.0}, "must not be negative"),
            ]
        ],
    ],
)
def test_bad_values(config_class: type, kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(config_class, **kwargs)


def test_awr_at_a_small_temperature_warns(caplog: pytest.LogCaptureFixture):
    make(APAConfig, loss_type="awr", beta=1.0)
    assert "explodes" not in caplog.text
    make(APAConfig, loss_type="awr")
    assert "explodes" in caplog.text


def test_a_first_token_that_is_never_trained_warns(caplog: pytest.LogCaptureFixture):
    make(DRPOConfig, min_roll_in=0)
    make(DRPOConfig, min_roll_in=1, reset_prob=0.9)
    assert "never trained" not in caplog.text
    make(DRPOConfig, min_roll_in=1)
    assert "what comes first is never trained" in caplog.text


def test_names_of_the_ppo_that_trl_had(tiny_model: Callable[..., Any], prompts: Dataset):
    """Every name that the page for its users lists as another one here."""
    page = (Path(__file__).parent.parent / "docs" / "from_trl_ppo.md").read_text()
    for name, new in [
        ("kl_coef", "`beta`"),
        ("cliprange", "`epsilon`"),
        ("response_length", "`max_completion_length`"),
    ]:
        with pytest.raises(TypeError, match=f"`{name}`.* is {new} here"):
            make(PPOConfig, **{name: 1})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'kl_coeff'"):
        make(PPOConfig, kl_coeff=1)
    for name in RENAMED_FIELDS | RENAMED_ARGUMENTS:
        assert f"`{name}`" in page, name
    with pytest.raises(TypeError, match=r"`value_model`.* is a head on the policy"):
        PPOTrainer(model=tiny_model(), reward_funcs=constant, train_dataset=prompts, value_model=tiny_model())
    config = make(PPOConfig, beta=0.2)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


# ---- Trainers ----


@pytest.fixture(scope="module")
def prompts(dialogues: Dataset) -> Dataset:
    return Dataset.from_dict({"prompt": dialogues["prompt"][:16], "reference": ["Yes, of course."] * 16})


@pytest.fixture
def build(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_model: Callable[..., Any], prompts: Dataset
) -> Callable[..., Any]:
    def make_trainer(config_class: type, reward_funcs: Any = None, train_dataset: Any = prompts, **kwargs: Any) -> Any:
        names = ("eval_dataset", "tools", "rollout_func", "environment_factory")
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        args = cpu_args(config_class, tmp_path, **({"max_completion_length": 4} | kwargs))
        return TRAINERS[config_class](
            tiny_model(), reward_funcs, args, train_dataset, processing_class=tokenizer, **given
        )

    return make_trainer


def constant(completions: list, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_what_is_no_config_of_ours(
    config_class: type, tmp_path: Path, tiny_model: Callable[..., Any], prompts: Dataset
):
    args = cpu_args(GRPOConfig, tmp_path, num_generations=2)
    with pytest.raises(TypeError, match=rf"GRPOConfig\. .* expects {config_class.__name__}.*replacing the class name"):
        TRAINERS[config_class](tiny_model(), constant, args, prompts)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    "given", [{"tools": [constant]}, {"rollout_func": constant}, {"environment_factory": constant}]
)
def test_tokens_of_others_are_refused(build: Callable[..., Any], config_class: type, given: dict[str, Any]):
    with pytest.raises(ValueError, match=f"does not support `{next(iter(given))}`"):
        build(config_class, constant, **given)


def test_no_reward_function(build: Callable[..., Any]):
    for nothing in (None, [], [constant, None], 5):
        with pytest.raises((TypeError, ValueError), match=r"`reward_funcs` holds|No reward source"):
            build(PPOConfig, nothing)


def test_a_language_model_is_no_reward_model(
    build: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
):
    """TRL would give it a random head, and train on that."""
    tiny_model().save_pretrained(tmp_path / "model")
    for model in (tiny_model(), str(tmp_path / "model")):
        with pytest.raises(ValueError, match="is a LlamaForCausalLM, a language model"):
            build(PPOConfig, [constant, model])


def test_datasets_that_will_not_do(build: Callable[..., Any], prompts: Dataset):
    with pytest.raises(ValueError, match=r"train dataset has the columns question, answer.*`prompt`"):
        build(PPOConfig, constant, Dataset.from_dict({"question": ["a"] * 4, "answer": ["b"] * 4}))
    with pytest.raises(ValueError, match="test dataset has the columns text"):
        build(PPOConfig, constant, eval_dataset={"test": Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(ValueError, match="`images`"):
        build(PPOConfig, constant, prompts.add_column("images", [None] * len(prompts)))
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset has the `prompt` \[1, 2\]"):
        build(PPOConfig, constant, Dataset.from_dict({"prompt": [[1, 2]] * 4}))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build(PPOConfig, constant, None)
    # TRL would train on nothing, and say so nowhere
    with pytest.raises(ValueError, match="16 prompts, and a generation batch takes 32"):
        build(PPOConfig, constant, per_device_train_batch_size=32)
    build(PPOConfig, constant, per_device_train_batch_size=32, num_generations=2)


def test_reset_needs_one_eval_dataset(build: Callable[..., Any], prompts: Dataset):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "reset_ref_patience": 1}
    with pytest.raises(ValueError, match="there are 2: a, b"):
        build(APAConfig, constant, eval_dataset={"a": prompts, "b": prompts}, **evaluated)


def test_references_that_will_not_do(build: Callable[..., Any], prompts: Dataset):
    without = prompts.remove_columns("reference")
    with pytest.raises(ValueError, match=r"'completion' or 'chosen' or 'reference', .* has the columns 'prompt'"):
        build(DRPOConfig, constant, without)
    with pytest.raises(ValueError, match=r"looked for in 'answer', .* columns 'prompt', 'reference'"):
        build(DRPOConfig, constant, reference_column="answer")
    build(DRPOConfig, constant, without, reset_prob=0.0).train()  # PPO needs none
    conversation = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    for reference in (conversation, ["a text", "another"], 7):
        rows = Dataset.from_dict({"prompt": prompts["prompt"][:], "chosen": [reference] * 16})
        with pytest.raises(ValueError, match=r"The reference completion .* a text, messages of which the first is"):
            build(DRPOConfig, constant, rows)
    texts = Dataset.from_dict({"prompt": ["How?"] * 16, "reference": [conversation[1:]] * 16})
    with pytest.raises(ValueError, match=r"The reference completion .* must be a text, as the prompt is"):
        build(DRPOConfig, constant, texts)
    with pytest.raises(ValueError, match="'reference' repeat their prompts"):
        build(DRPOConfig, constant, Dataset.from_dict({"prompt": ["How?"] * 16, "reference": ["How? So."] * 16}))
    # Wherever it stands, and not only when its turn comes
    late = Dataset.from_dict({"prompt": prompts["prompt"][:], "chosen": [conversation[1:]] * 15 + [conversation]})
    with pytest.raises(ValueError, match=r"The reference completion .* a text, messages of which the first is"):
        build(DRPOConfig, constant, late)
    # An answer may begin as its prompt does
    alike = Dataset.from_dict({"prompt": ["How?"] * 16, "reference": [" So."] * 15 + ["How? So."]})
    build(DRPOConfig, constant, alike)
    with pytest.raises(ValueError, match="None of the 16 rows has a reference in the column 'reference'"):
        build(DRPOConfig, constant, Dataset.from_dict({"prompt": ["How?"] * 16, "reference": [None, ""] * 8}))
    # Unpaired preferences have bad completions among them
    labelled = Dataset.from_dict({"prompt": ["How?"] * 16, "completion": [" So."] * 16, "label": [True, False] * 8})
    with pytest.raises(ValueError, match=r"a column 'label', .* `reference_column='completion'`"):
        build(DRPOConfig, constant, labelled)
    build(DRPOConfig, constant, labelled, reference_column="completion")


@pytest.mark.parametrize("config_class", CONFIGS)
def test_reward_functions_that_fail_are_named(build: Callable[..., Any], config_class: type):
    def raises(**kwargs: Any) -> list[float]:
        raise KeyError("score")

    async def raises_later(**kwargs: Any) -> list[float]:
        raise KeyError("score")

    def too_few(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * (len(completions) - 1)

    def infinite(completions: list, **kwargs: Any) -> list[float]:
        return [float("inf")] * len(completions)

    def nan(completions: list, **kwargs: Any) -> list[float]:
        return [float("nan")] * len(completions)

    for func, error, message in (
        (raises, RuntimeError, "'raises' raised KeyError"),
        (raises_later, RuntimeError, "'raises_later' raised KeyError"),
        (too_few, ValueError, "'too_few' returned 3 rewards for 4 completions"),
        (infinite, ValueError, "'infinite' returned inf"),
        (nan, ValueError, "'nan' returned nan"),
    ):
        trainer = build(config_class, [constant, func])
        before = weights(trainer)
        with pytest.raises(error, match=message):
            trainer.train()
        assert distance(before, weights(trainer)) == 0


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("estimator", ["gae", "leave_one_out"])
def test_completions_that_no_one_scores(build: Callable[..., Any], config_class: type, estimator: str):
    """None for some trains on the others; None for all changes nothing."""
    kwargs = {"advantage_estimator": estimator, "num_generations": 2, "learning_rate": 1e-2}

    def none(completions: list, **_: Any) -> list[None]:
        return [None] * len(completions)

    def some(completions: list, completion_ids: list, **_: Any) -> list[float | None]:
        return [None if i == 1 else float(i) for i in range(len(completions))]

    trainer = build(config_class, none, **kwargs)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) == 0
    trainer = build(config_class, some, **kwargs)
    trainer.train()
    assert 0 < distance(before, weights(trainer)) < 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_one_function_may_leave_it_to_another(build: Callable[..., Any]):
    """A weighted sum over those that score, as TRL sums."""

    def even(completions: list, **kwargs: Any) -> list[float | None]:
        return [1.0 if i % 2 == 0 else None for i in range(len(completions))]

    trainer = build(PPOConfig, [constant, even], reward_weights=[1.0, 3.0], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx((4 + 1) / 2)
