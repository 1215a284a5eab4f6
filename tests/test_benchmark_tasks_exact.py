"""The tasks whose optimum is known: what the benchmark says of a policy, against sums by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cpu_args
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.task import TASKS, Task, load_task
from trl_lol import CoPGTrainer
from trl_lol.data import tokenize_row
from trl_lol.generation import generate_completions


NAMES = ["bandit", "two_steps"]


class TableModel(nn.Module):
    """A language model whose logits depend on the last token alone."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def table_of(task: Task, logits: dict[str, dict[str, float]], other: float = -40.0) -> Tensor:
    """Logits of the next token by the last one, `other` for those not named."""
    ids = task.tokenizer.get_vocab()
    table = torch.full((len(ids), len(ids)), other)
    for last, row in logits.items():
        for token, logit in row.items():
            table[ids[last], ids[token]] = logit
    return table


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("exact")
    tasks = {name: load_task(name, folder) for name in NAMES}
    for task in tasks.values():
        task.prepare(0)
    return tasks


# --- The reference, and what belongs to it


@pytest.mark.parametrize("name, best, reward", [("bandit", 2.1252, 5.5 / 3), ("two_steps", 0.7415, 2.2 / 4)])
def test_reference_is_uniform_over_the_arms(tasks: dict[str, Task], name: str, best: float, reward: float) -> None:
    """
    J* = β ln mean e^{R/β}. Bandit: ½ ln((e⁵ + e⁴ + e²)/3) = ½ ln 70.134 = 2.1252. Two steps:
    ¼ ln((e⁴ + 1 + 2 e^2.4)/4) = ¼ ln 19.411 = .7415. At the reference J is the mean of R.
    """
    task = tasks[name]
    reference = task.reference()
    found = task.evaluate(reference, reference, "test")
    k = len(task.rewards)
    assert found["policy"] == pytest.approx([1 / k] * k, abs=1e-6)
    assert found["regret"] + reward == pytest.approx(best, abs=1e-4)
    assert found["reward"] == found["train_reward"] == pytest.approx(reward, abs=1e-6)
    assert found["kl"] == 0.0
    assert found["entropy"] == pytest.approx(math.log(k) / task.max_completion_length, abs=1e-6)
    assert found["length"] == pytest.approx(task.max_completion_length, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_completion_is_counted_once(tasks: dict[str, Task], name: str) -> None:
    """
    With v tokens there are v completions of one, and (v − 1) v of two beside the EOS alone. Whatever the policy, their
    probabilities sum to one. Control: without those that begin with EOS they do not.
    """
    task = tasks[name]
    v, eos = len(task.tokenizer), task.tokenizer.eos_token_id
    completions = task.completions()
    assert len({tuple(ids) for ids in completions}) == len(completions)
    assert len(completions) == (v if name == "bandit" else (v - 1) * v + 1)
    policy = TableModel(torch.randn(v, v, generator=torch.Generator().manual_seed(0)))
    assert task._logps(policy, completions).exp().sum().item() == pytest.approx(1, abs=1e-6)
    rest = [ids for ids in completions if ids[0] != eos]
    assert task._logps(policy, rest).exp().sum().item() < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_writes_are_arms(tasks: dict[str, Task], name: str) -> None:
    """Of as many tokens, and as text those of the table."""
    task = tasks[name]
    prompts = task.prompts("test")["prompt"][:] * 64
    length = task.max_completion_length
    written, _, ids = generate_completions(
        task.reference(), task.tokenizer, prompts, max_new_tokens=length, batch_size=64
    )
    assert {completion[0]["content"] for completion in written} == set(task.rewards)
    assert {len(row) for row in ids} == {length}


# --- Judging


def test_no_regret_at_the_bandits_optimum(tasks: dict[str, Task]) -> None:
    """
    π* ∝ e^{R/β} = e⁵, e⁴, e² → (.7054, .2595, .0351). Score is what the harness makes of reward and KL, J. Control:
    the arm with the largest reward alone has J = 2.5 − ½ ln 3 = 1.9507, a regret of .1745.
    """
    task, reference = tasks["bandit"], tasks["bandit"].reference()
    optimum = TableModel(table_of(task, {"?": {"a": 5.0, "b": 4.0, "c": 2.0}}))
    found = task.evaluate(optimum, reference, "test")
    assert found["policy"] == pytest.approx([0.7054, 0.2595, 0.0351], abs=1e-4)
    assert found["regret"] == pytest.approx(0, abs=1e-5)
    assert found["reward"] - task.beta * found["kl"] == pytest.approx(2.1252, abs=1e-4)
    greedy = TableModel(table_of(task, {"?": {"a": 60.0, "b": 0.0, "c": 0.0}}))
    assert task.evaluate(greedy, reference, "test")["regret"] == pytest.approx(2.1252 - 1.9507, abs=2e-4)


def test_no_regret_at_the_optimum_of_two_steps(tasks: dict[str, Task]) -> None:
    """
    π* ∝ e^{4 R} = e⁴, 1, e^2.4, e^2.4, of sum 77.64: (.7032, .0129, .1419, .1419). As two steps: the logit of the
    first letter is the soft value over β, ln(e⁴ + 1) against ln(2 e^2.4). Control: the hard values of papers.md, p(a)
    = .8217 and p(a|a) = .9820, of reward .8217 · .9820 + .1783 · .6 = .9139 and entropy .4688 + .8217 · .0901 + .1783
    · .6931 = .6664, so that J = .9139 − ¼ (ln 4 − .6664) = .7339, .0075 below J* = .7415.
    """
    task, reference = tasks["two_steps"], tasks["two_steps"].reference()
    soft = {"a": math.log(math.exp(4) + 1), "b": math.log(2) + 2.4}
    optimum = {"?": soft, "a": {"a": 4.0, "b": 0.0}, "b": {"a": 2.4, "b": 2.4}}
    found = task.evaluate(TableModel(table_of(task, optimum)), reference, "test")
    assert found["policy"] == pytest.approx([0.7032, 0.0129, 0.1419, 0.1419], abs=1e-4)
    assert found["regret"] == pytest.approx(0, abs=1e-5)
    hard = {"a": math.log(0.8217), "b": math.log(0.1783)}
    found = task.evaluate(TableModel(table_of(task, optimum | {"?": hard})), reference, "test")
    assert found["regret"] == pytest.approx(0.0075, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_completions_agree_with_the_chain_rule(tasks: dict[str, Task], name: str) -> None:
    """
    Of a policy and a reference that write anything: KL and entropy are those of the first token plus the mean, over
    first tokens that are not EOS, of those of the second; the length is 1 + p(first is not EOS).
    """
    task, ids = tasks[name], tasks[name].tokenizer.get_vocab()
    generator = torch.Generator().manual_seed(1)
    policy, reference = (TableModel(torch.randn(len(ids), len(ids), generator=generator)) for _ in range(2))
    p, q = (model.table.detach().double().softmax(-1).numpy() for model in (policy, reference))
    kl, entropy = (p * np.log(p / q)).sum(1), -(p * np.log(p)).sum(1)
    first = p[ids["?"]].copy()
    first[ids["</s>"]] = 0  # nothing follows
    two = name == "two_steps"
    length = 1 + two * first.sum()
    expected = {
        "kl": kl[ids["?"]] + two * first @ kl,
        "entropy": (entropy[ids["?"]] + two * first @ entropy) / length,
        "length": length,
        "policy": [p[ids["?"], ids[arm[0]]] * (p[ids[arm[0]], ids[arm[1]]] if two else 1) for arm in task.rewards],
    }
    found = task.evaluate(policy, reference, "validation")
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-5), metric
    assert found["reward"] == pytest.approx(np.dot(found["policy"], list(task.rewards.values())), abs=1e-6)
    # Completions without reward belong to J* as well: e⁰ each
    arms = [q[ids["?"], ids[arm[0]]] * (q[ids[arm[0]], ids[arm[1]]] if two else 1) for arm in task.rewards]
    weights = np.exp(np.array(list(task.rewards.values())) / task.beta)
    best = task.beta * math.log(np.dot(arms, weights) + 1 - sum(arms))
    assert found["regret"] == pytest.approx(best - found["reward"] + task.beta * found["kl"], abs=1e-5)


def test_rewards_of_text_and_of_messages(tasks: dict[str, Task]) -> None:
    """The table's, and 0 for what is not in it: too short, too long, of other tokens."""
    texts, scores = ["ab", "ba", "aa", "a", "aab", "", "?a"], [0.0, 0.6, 1.0, 0.0, 0.0, 0.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        found = tasks["two_steps"].reward(prompts=["?"] * 7, completions=completions, completion_ids=[[0]] * 7)
        assert found == scores
    assert tasks["bandit"].reward(["?"] * 3, ["a", "b", "c"]) == [2.5, 2.0, 1.0]


# --- Logged data


@pytest.mark.parametrize("name", NAMES)
def test_logged_groups_follow_the_behaviours(tasks: dict[str, Task], name: str) -> None:
    """Shares of 2048 draws are within .035 of their probabilities, three standard errors; rewards are the table's."""
    task, rows = tasks[name], tasks[name].rows(0)
    arms = list(task.rewards)
    drawn = [[completion[0]["content"] for completion in group] for group in rows["completions"]]
    for member, behaviour in enumerate(task.behaviours):
        names = [group[member] for group in drawn]
        assert [names.count(arm) / 2048 for arm in arms] == pytest.approx(behaviour, abs=0.035)
    assert rows["rewards"][:] == [[task.rewards[arm] for arm in group] for group in drawn]
    again, other = (task.make_rows(seed)["rewards"][:] for seed in (0, 1))
    assert again == rows["rewards"][:] != other


@pytest.mark.parametrize("name", NAMES)
def test_logged_completions_are_their_letters_alone(tasks: dict[str, Task], name: str) -> None:
    """As many tokens as letters, without an EOS, behind the prompt that policies are judged on."""
    task = tasks[name]
    row = tokenize_row(task.rows(0)[0], 0, task.tokenizer, task.tokenizer.eos_token)
    letters = [task.tokenizer.convert_ids_to_tokens(ids) for ids in row["completion_ids"]]
    assert letters == [list(completion[0]["content"]) for completion in task.rows(0)[0]["completions"]]
    assert task.tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", "?"]


def test_preferences_are_drawn(tasks: dict[str, Task]) -> None:
    """
    σ(2.5 − 1) = .8176, σ(2 − 2.5) = .3775 and, of two steps, σ(0) = ½, of 2000 groups each: three standard errors are
    at most .034. Twice the same arm is no preference. Control: the shares of certain preferences would be 1 and 0.
    """

    def share_of_first(task: Task, first: str, second: str) -> float:
        rewards = [task.rewards[first], task.rewards[second]]
        completions = [[{"role": "assistant", "content": arm}] for arm in (first, second)]
        row = {"prompt": [{"role": "user", "content": "?"}], "completions": completions, "rewards": rewards}
        pairs = task.pairs(Dataset.from_list([row] * 2000), seed=0)
        assert pairs.column_names == ["prompt", "chosen", "rejected"] and len(pairs) == 2000
        assert all([row["chosen"], row["rejected"]] in (completions, completions[::-1]) for row in pairs)
        return sum(chosen == completions[0] for chosen in pairs["chosen"]) / 2000

    assert share_of_first(tasks["bandit"], "a", "c") == pytest.approx(0.8176, abs=0.034)
    assert share_of_first(tasks["bandit"], "b", "a") == pytest.approx(0.3775, abs=0.034)
    assert share_of_first(tasks["two_steps"], "ba", "bb") == pytest.approx(0.5, abs=0.034)
    groups = tasks["bandit"].rows(0)
    different = sum(first != second for first, second in groups["completions"])
    assert 0 < different < len(groups)
    assert len(tasks["bandit"].pairs(groups, seed=0)) == different


# --- As the harness takes them


@pytest.mark.parametrize("name", NAMES)
def test_task_is_made_once_and_read_from_its_folder(tasks: dict[str, Task], name: str) -> None:
    """A task of the same folder, without its recipes, has the same reference, tokenizer and rows."""
    task = tasks[name]
    again = load_task(name, task.folder.parent)
    again.make_reference = again.make_rows = None
    again.prepare(0)
    assert again.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    assert again.rows(0)[:] == task.rows(0)[:]
    weights, others = again.reference().state_dict(), task.make_reference()[0].state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in others)
    with pytest.raises(TypeError):
        again.prepare(1)  # which is not there
    assert name in TASKS


@pytest.mark.parametrize("name", NAMES)
def test_every_method_gets_the_same_learning_rates(tasks: dict[str, Task], name: str) -> None:
    """And the problem's β, if it has one."""
    task = tasks[name]
    for is_online in (False, True):
        grid = task.grid(True, is_online)
        assert {setting["beta"] for setting in grid} == {task.beta}
        assert [setting["learning_rate"] for setting in grid] == list(task.learning_rates)
    assert task.grid(False, False) == [{"learning_rate": value} for value in task.learning_rates]


@pytest.mark.parametrize("name", NAMES)
def test_copg_finds_the_optimum(tasks: dict[str, Task], tmp_path: Path, name: str) -> None:
    """Theorem 1, with the trainer. Control: the regret that it begins with is above .19."""
    task = tasks[name]
    policy: PreTrainedModel = task.reference()
    args = cpu_args(
        CoPGTrainer._config_class,
        tmp_path,
        beta=task.beta,
        learning_rate=1e-2,
        max_steps=80,
        per_device_train_batch_size=32,
        precompute_ref_log_probs=True,
    )
    CoPGTrainer(policy, args=args, train_dataset=task.rows(0), processing_class=task.tokenizer).train()
    reference = task.reference()
    assert task.evaluate(reference, reference, "test")["regret"] > 0.19
    assert task.evaluate(policy, reference, "test")["regret"] < 0.005
