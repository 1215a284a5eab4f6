"""
Advantages of a file or dataset, and the report of them:

    python -m trl_lol.report answers.jsonl --prompt-column question --completion-column answer --reward-column score \\
        --model Qwen/Qwen3-0.6B
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, LargeList, List, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .._cache import written_beside
from ..advantages import BASELINES
from ..data import check_columns, read_row
from ..estimation import estimate_advantages
from ..rewards import ColumnReward, score_dataset
from . import AdvantageReport


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def make_parser() -> argparse.ArgumentParser:
    """The options, each with what it is for."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_lol.report",
        description="Estimate the advantage of each completion of a dataset over what a policy would get, and report "
        "what is worth training on.",
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="a .jsonl, .json, .csv or .parquet file (also .gz), a folder of such files or of `save_to_disk`, or the "
        "id of a dataset on the Hub",
    )
    add("--split", default="train", help="split of a folder or of a dataset on the Hub (default: %(default)s)")
    add("--prompt-column", help="column with the prompts, if it is not called `prompt`")
    add(
        "--completion-column",
        help="column with the completions, one or a list of them per row, if it is not called `completion` or "
        "`completions`",
    )
    add(
        "--reward-column",
        help="column with the rewards, a number per row or a list with one per completion, empty for what is not "
        "scored; without it, the rows' own rewards are taken, as the trainers take them: `reward`, `rewards`, "
        "`chosen_reward` and `rejected_reward`, ...",
    )
    add(
        "--subset-column",
        default="subset",
        help="column that says which part of the data a row belongs to (default: %(default)s)",
    )
    add("--model", help="the policy whose value of a prompt is subtracted: id or folder of a causal language model")
    add(
        "--baseline",
        choices=BASELINES,
        default="value",
        help="what is subtracted from a reward: `value`, what the policy is likely to get for the prompt, as a head "
        "on its hidden states foresees it; `group_mean` or `leave_one_out`, the mean reward of all completions of the "
        "prompt, or of the others; `batch_mean`, that of the whole data; or `none` (default: %(default)s)",
    )
    add("--batch-size", type=int, default=8, help="prompts that the policy reads at a time (default: %(default)s)")
    add(
        "--max-prompts",
        type=int,
        default=1024,
        help="number of prompts that the value head is fitted on at most (default: %(default)s)",
    )
    add("--max-rows", type=int, help="number of rows to take at most, chosen at random (default: all)")
    add("--seed", type=int, default=0, help="seed of the fit, and of the choice of rows (default: %(default)s)")
    add(
        "--output-dir",
        type=Path,
        default=Path("advantage_report"),
        help="folder for report.json, the plots, and scored.jsonl, the rows with their advantages (default: "
        "%(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments. If `None`, those of the process.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.baseline == "value" and args.model is None:
        others = ", ".join(name for name in BASELINES if name != "value")
        parser.error(f"the baseline `value` needs a policy: give --model, or set --baseline to one of {others}")
    with explained(f"{args.data} cannot be used"):
        dataset = load_rows(args)
        check_columns(dataset.column_names)
        dataset = drop_empty(dataset)
    if args.reward_column is not None:
        with explained(f"No rewards from the column {args.reward_column!r}"):
            dataset = score_dataset(dataset, ColumnReward(args.reward_column))
    with explained(f"The model {args.model!r} cannot be loaded"):
        model = load_policy(args)
        tokenizer = None if model is None else AutoTokenizer.from_pretrained(args.model)
    with explained("No advantages"):
        dataset = estimate_advantages(
            dataset,
            model,
            processing_class=tokenizer,
            baseline=args.baseline,
            batch_size=args.batch_size,
            max_prompts=args.max_prompts,
            seed=args.seed,
        )
        report = AdvantageReport.from_dataset(dataset, args.subset_column)
    if PartialState().is_main_process:
        write(report, dataset, args.output_dir)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say what is wrong with what was asked for, without the traceback that would hide it."""
    try:
        yield
    except StopIteration:  # what `load_dataset` raises for an empty file
        sys.exit(f"{what}: it has no rows.")
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # `datasets` and reward functions say that something went wrong, and what it was is the cause
        cause = error.__cause__ if isinstance(error, DatasetsError | RuntimeError) else None
        if cause is None and isinstance(error, RuntimeError):  # torch's own, which is another matter
            raise
        sys.exit(f"{what}: {cause or error}")


def load_rows(args: argparse.Namespace) -> Dataset:
    """The rows, with the columns called as this package calls them."""
    path = Path(args.data)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if path.is_file():
        if not suffixes or suffixes[-1] not in FORMATS:
            raise ValueError(f"accepted files end in {', '.join(FORMATS)}, or one of these and .gz.")
        kind = FORMATS[suffixes[-1]]
        # An answer "None" is an answer; what is empty is null
        options = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
        dataset = load_dataset(kind, data_files=str(path), split="train", **options)
    elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if args.split not in dataset:
                raise ValueError(f"it has no split {args.split!r}. Its splits: {', '.join(dataset)}.")
            dataset = dataset[args.split]
    elif suffixes and suffixes[-1] in FORMATS:
        raise ValueError("there is no such file.")
    else:
        dataset = load_dataset(args.data, split=args.split)
    if not len(dataset):
        raise ValueError("it has no rows.")
    if args.max_rows is not None and args.max_rows < len(dataset):
        dataset = dataset.select(sorted(random.Random(args.seed).sample(range(len(dataset)), args.max_rows)))
    return rename(dataset, args)


def drop_empty(dataset: Dataset) -> Dataset:
    """The rows that have a prompt and a completion: logs have others."""
    names = [name for name in ("prompt", "completion", "completions") if name in dataset.column_names]
    columns = dataset.select_columns(names)
    kept = [i for i, row in enumerate(columns) if None not in row.values()] if names else range(len(dataset))
    if len(kept) < len(dataset):
        print(f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows, which have no prompt or no completion.")
    if not kept:
        raise ValueError(f"no row has {' and '.join(names)}.")
    left = set(kept)
    for index, row in enumerate(dataset):  # now, while rows have the numbers that they have in the file
        if index in left:
            read_row(row, index)
    return dataset.select(kept)


def rename(dataset: Dataset, args: argparse.Namespace) -> Dataset:
    """Call the columns that were named as this package calls them. What has that name already makes way."""
    named = [args.prompt_column, args.completion_column, args.reward_column]
    for name in [*named, None if args.subset_column == "subset" else args.subset_column]:
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"it has no column {name!r}. Its columns: {', '.join(dataset.column_names)}.")
    names = {}
    if args.prompt_column is not None:
        names[args.prompt_column] = "prompt"
    if args.completion_column is not None:
        feature = dataset.features[args.completion_column]
        is_list = isinstance(feature, List | LargeList) and not isinstance(feature.feature, dict)  # of no messages
        names[args.completion_column] = "completions" if is_list else "completion"
    outdated = set(names.values()) - names.keys()
    if args.completion_column is not None:
        outdated |= {"completion", "completions", "chosen", "rejected"} - names.keys()
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in outdated])
    return dataset.rename_columns({name: new for name, new in names.items() if name != new})


def load_policy(args: argparse.Namespace) -> PreTrainedModel | None:
    """The policy, where the baseline reads it."""
    if args.baseline != "value":
        return None
    device = PartialState().device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)


def write(report: AdvantageReport, dataset: Dataset, folder: Path) -> None:
    """Write the report beside the rows, and print it."""
    report.save(folder / "report.json")
    with written_beside(folder / "scored.jsonl") as beside, open(beside, "w") as file:
        for row in dataset.with_format(None):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    names, missing = ["report.json", "scored.jsonl"], None
    try:
        names += [path.name for path in report.plot(folder)]
    except ImportError as error:
        missing = f"There are no pictures. {error}"
    console = Console()
    if console.is_terminal:  # in colour, and as wide as that is
        console.print(report)
    else:
        print(report)
    print(f"\n{folder} has {', '.join(names)}.")
    if missing:
        sys.exit(missing)


if __name__ == "__main__":
    main()
