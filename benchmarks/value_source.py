"""
The reference policy's value of a prompt, fitted on the logged completions or on completions of the policy's own: how
well do both foresee rewards, what do they keep of the data, and what does that do to the policy that is trained?

    python benchmarks/value_source.py toy
    python benchmarks/value_source.py hh --model SMOLLM2 --dataset HH_SCORED --reward_model ADAPTER
    python benchmarks/value_source.py table

On the embedded world the reference is fine-tuned on all logged answers, so that both values are of the same thing; of
the logs "best half" it could have written the other half as well. On HH the reference has written nothing of the logs.
A run that has a result is not run again.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_lol import ALoLConfig, ALoLTrainer, RewardModel, sample_completions, score_dataset, toy
from trl_lol.data import as_group, tokenize_prompt
from trl_lol.evaluation import evaluate_policy
from trl_lol.rewards import RewardFunc
from trl_lol.value import r_squared


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from common import BaseArguments, Setup, load_toy, ranking


RESULTS = Path(__file__).parent / "results" / "value_source"
SOURCES: dict[str, dict[str, Any]] = {
    "dataset": {},
    "rollouts": {"value_source": "rollouts"},
    "rollouts, 4 per prompt": {"value_source": "rollouts", "value_num_generations": 4},
}


@dataclass
class World:
    """A task: the reference, logged completions, the reward of both, and held-out prompts."""

    folder: Path
    reference: str
    tokenizer: PreTrainedTokenizerBase
    logs: dict[str, Dataset]
    test: Dataset  # held-out prompts
    reward: RewardFunc
    judge: Callable[[PreTrainedModel, PreTrainedModel | None], dict[str, float]]
    settings: dict[str, Any]  # of the trainer
    num_fresh: int  # completions per held-out prompt that stand for its true value
    sampling: dict[str, Any]
    peft_config: LoraConfig | None = None
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)


def judge_answers(
    policy: PreTrainedModel, reference: PreTrainedModel | None, prompts: list, reward: RewardFunc, **kwargs: Any
) -> dict[str, Any]:
    result = evaluate_policy(policy, prompts=prompts, reward_funcs=reward, ref_model=reference, **kwargs)
    per_prompt = torch.tensor([sample["reward"] for sample in result["samples"]]).view(len(prompts), -1).mean(1)
    names = ("reward", "kl", "length", "distinct_2", "samples")
    result = {name: result[name] for name in names if name in result}
    return result | {"reward_error": (per_prompt.std() / len(prompts) ** 0.5).item()}


def best_half(row: dict[str, Any]) -> dict[str, Any]:
    """The two answers of four that score best."""
    order = sorted(range(len(row["rewards"])), key=lambda i: -row["rewards"][i])[: len(row["rewards"]) // 2]
    return {name: [row[name][i] for i in order] for name in ("completions", "rewards")}


def make_toy(seed: int, args: argparse.Namespace) -> World:
    """The embedded world and the reference of its recipe: fine-tuned on four answers per prompt, good and bad."""
    dialogues, model, tokenizer = load_toy(BaseArguments(), seed)
    folder = args.work_dir / f"toy{seed}"
    settings = {"use_cpu": True, "bf16": False, "max_length": 256, "per_device_train_batch_size": 16}
    if not (folder / "reference").exists():
        same = {"gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none", "seed": seed}
        config = ALoLConfig(str(folder), **settings, **same)
        Setup(BaseArguments(reference_sft_steps=300), config, ModelConfig(), model, tokenizer).make_reference(
            dialogues["train"]
        )
    settings |= {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "max_steps": args.steps or 60}
    rows = score_dataset(dialogues["train"], toy.oracle_reward).remove_columns("qualities")
    sampling = {"max_new_tokens": 64, "batch_size": 100}

    def judge(policy: PreTrainedModel, reference: PreTrainedModel | None) -> dict[str, float]:
        kwargs = {"processing_class": tokenizer, "num_generations": 2, "seed": seed, **sampling}
        result = judge_answers(policy, reference, dialogues["test"]["prompt"], toy.heldout_reward, **kwargs)
        samples = result.pop("samples")
        scores = toy.oracle_reward([s["prompt"] for s in samples], [s["completion"] for s in samples])
        return result | {"train_reward": statistics.mean(scores)}

    return World(
        *(folder, str(folder / "reference"), tokenizer, {"all": rows, "best half": rows.map(best_half)}),
        *(dialogues["test"].select_columns("prompt"), toy.oracle_reward, judge, settings, 32, sampling),
    )


def make_hh(seed: int, args: argparse.Namespace) -> World:
    """Short real dialogues, scored by a reward model that was trained on others of them."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reward = RewardModel(args.reward_model, dtype=torch.bfloat16)

    def is_short(row: dict[str, Any]) -> bool:
        texts = (row["prompt"] + row[name] for name in ("chosen", "rejected"))
        return all(len(tokenizer.apply_chat_template(t, return_dict=True)["input_ids"]) <= 160 for t in texts)

    rows = load_dataset(args.dataset).filter(is_short).select_columns(["prompt", "chosen", "rejected"])
    train = rows["train"].skip(args.reward_model_rows).shuffle(seed=seed).take(args.rows)
    test = rows["test"].take(args.test_rows)
    pairs = score_dataset(test, reward, cache_dir=args.work_dir / "hh" / "_cache")
    sampling = {"max_new_tokens": 48, "batch_size": 32}

    def judge(policy: PreTrainedModel, reference: PreTrainedModel | None) -> dict[str, float]:
        kwargs = {"processing_class": tokenizer, "num_generations": 1, "seed": seed, **sampling}
        result = judge_answers(policy, reference, test["prompt"], reward, **kwargs)
        del result["samples"]
        return result | ranking(policy, None, tokenizer, pairs) if "kl" in result else result  # not the reference

    settings = {"use_cpu": True, "bf16": False, "max_length": 256, "per_device_train_batch_size": 8}
    settings |= {"gradient_accumulation_steps": 2, "learning_rate": 2e-4, "lr_scheduler_type": "constant_with_warmup"}
    settings |= {"warmup_steps": 3, "max_steps": args.steps or 10}
    return World(
        *(args.work_dir / "hh", args.model, tokenizer, {"all": train}, test.select_columns("prompt"), reward, judge),
        *(settings, 4, sampling),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        {"dtype": torch.bfloat16},
    )


WORLDS = {"toy": make_toy, "hh": make_hh}


def fresh_values(world: World, reference: PreTrainedModel, seed: int) -> tuple[Tensor, float]:
    """
    Mean reward of the reference's answers to each held-out prompt, and the R² that its true value would have with
    that: the means of few answers are noisy.
    """
    rows = sample_completions(
        *(world.test, reference, world.tokenizer, world.num_fresh),
        **{**world.sampling, "seed": 1000 + seed, "cache_dir": world.folder / "_cache"},
    )
    rewards = torch.tensor(score_dataset(rows, world.reward, cache_dir=world.folder / "_cache")["rewards"])
    means = rewards.mean(1)
    return means, 1 - (rewards.var(1).mean() / world.num_fresh / means.var()).item()


def run(world: World, logs: str, source: str, seed: int, fresh: tuple[Tensor, float]) -> dict[str, Any]:
    """Fit values, keep, train and judge."""
    rows, tokenizer = world.logs[logs], world.tokenizer
    args = ALoLConfig(
        str(world.folder),
        seed=seed,
        value_max_completion_length=world.sampling["max_new_tokens"],
        per_device_eval_batch_size=world.sampling["batch_size"],
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **world.settings,
        **SOURCES[source],
    )
    model = AutoModelForCausalLM.from_pretrained(world.reference, **world.model_init_kwargs)
    trainer = ALoLTrainer(
        *(model, None, args),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=world.peft_config,
        reward_funcs=world.reward,
    )

    def predict(rows: Dataset) -> Tensor:
        return trainer.value_estimator.predict([tokenize_prompt(row["prompt"], row, tokenizer) for row in rows])

    scored = score_dataset(rows, world.reward, processing_class=tokenizer, cache_dir=trainer.cache_dir)
    rewards = torch.tensor([as_group(row).rewards for row in scored])
    values, held_out = predict(rows), predict(world.test)
    means, ceiling = fresh
    result = {
        **{"logs": logs, "source": source, "seed": seed},
        "rewards_mean": rewards.mean().item(),
        "values_mean": values.mean().item(),
        "values_std": values.std().item(),
        "r2_logged": r_squared(values[:, None].expand_as(rewards), rewards),
        "r2_fresh": r_squared(held_out, means),
        "r2_fresh_possible": ceiling,
        "correlation_fresh": torch.corrcoef(torch.stack([held_out, means]))[0, 1].nan_to_num().item(),
        "bias_fresh": (held_out - means).mean().item(),
        "fresh_mean": means.mean().item(),
        "kept": (rewards > values[:, None]).float().mean().item(),
        "kept_by_fresh_mean": (rewards > means.mean()).float().mean().item(),
        "reported_kept": trainer.advantage_report.kept_fraction,
        "kept_bits": "".join(str(int(x)) for x in (rewards > values[:, None]).flatten()),
    }
    trainer.train()
    is_peft = world.peft_config is not None
    reference = None if is_peft else AutoModelForCausalLM.from_pretrained(world.reference)
    return result | {"policy": world.judge(trainer.model, reference)}


def run_world(name: str, args: argparse.Namespace) -> None:
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {"world": name, "references": {}, "runs": []}
    result["versions"] = {n: version(n) for n in ("trl-lol", "trl", "transformers", "peft", "torch", "datasets")}
    result["threads"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    for seed in args.seeds:
        world = WORLDS[name](seed, args)
        reference = AutoModelForCausalLM.from_pretrained(world.reference, **world.model_init_kwargs)
        fresh = fresh_values(world, reference, seed)
        if str(seed) not in result["references"]:
            result["references"][str(seed)] = world.judge(reference, None)
        result["settings"] = {**world.settings, **world.sampling, "fresh_completions": world.num_fresh}
        result["settings"] |= {"train_rows": len(world.logs["all"]), "test_rows": len(world.test)}
        for logs in world.logs:
            for source in args.sources:
                key = {"logs": logs, "source": source, "seed": seed}
                if any(key.items() <= done.items() for done in result["runs"]):
                    continue
                done = run(world, logs, source, seed, fresh)
                result["runs"].append(done)
                path.write_text(json.dumps(result) + "\n")
                print({k: v for k, v in done.items() if k != "kept_bits"}, flush=True)
    table()


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table() -> None:
    """Means and standard deviations over the seeds."""
    lines = ["Mean ± standard deviation over seeds."]
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        result = json.loads(path.read_text())
        kept = {(r["logs"], r["source"], r["seed"]): r["kept_bits"] for r in result["runs"]}
        for run in result["runs"]:
            pairs = zip(run["kept_bits"], kept[run["logs"], "dataset", run["seed"]], strict=True)
            run["same_as_dataset"] = statistics.mean(a == b for a, b in pairs)
        lines += ["", f"## {result['world']}", "", f"Settings: {result['settings']}"]
        for logs in dict.fromkeys(run["logs"] for run in result["runs"]):
            runs = [run for run in result["runs"] if run["logs"] == logs]
            names = [
                "values_std",
                "r2_logged",
                "r2_fresh",
                "correlation_fresh",
                "bias_fresh",
                "kept",
                "same_as_dataset",
            ]
            metrics = [name for name in runs[0]["policy"] if name != "reward_error"]
            shared = ("rewards_mean", "fresh_mean", "r2_fresh_possible", "kept_by_fresh_mean")
            lines += [
                "",
                f"Logs: {logs}. "
                + ", ".join(f"{n} {cell([*{r['seed']: r[n] for r in runs}.values()])}" for n in shared),
            ]
            for shown, get in ((names, lambda r: r), (metrics, lambda r: r["policy"])):
                lines += ["", "| value source | " + " | ".join(shown) + " |", "| --- |" + " ---: |" * len(shown)]
                if get(runs[0]) is not runs[0]:
                    references = list(result["references"].values())
                    cells = [cell([r[n] for r in references]) if n in references[0] else "" for n in shown]
                    lines.append("| the reference | " + " | ".join(cells) + " |")
                for source in dict.fromkeys(r["source"] for r in runs):
                    found = [get(r) for r in runs if r["source"] == source]
                    lines.append(f"| {source} | " + " | ".join(cell([r[n] for r in found]) for n in shown) + " |")
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[*WORLDS, "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--steps", type=int, help="number of training steps")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/value_source"))
    parser.add_argument("--model", help="for HH: SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", help="for HH: preferences with train and test splits")
    parser.add_argument("--reward_model", help="for HH: what `recipes/reward_model.py` has trained")
    parser.add_argument(
        "--reward_model_rows", type=int, default=1400, help="the first rows, which that was trained on"
    )
    parser.add_argument("--rows", type=int, default=128, help="for HH: number of training pairs")
    parser.add_argument("--test_rows", type=int, default=40, help="for HH: number of held-out pairs")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.world == "table":
        table()
    else:
        run_world(args.world, args)


if __name__ == "__main__":
    main()
