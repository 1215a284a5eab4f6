"""
A recipe over several seeds: one result file per seed, and a table of means and standard deviations.

Seeds that already have a result are not run again.

    python benchmarks/recipe_seeds.py --recipe alol_hh --seeds 0 1 2 3 4
    python benchmarks/recipe_seeds.py --recipe copg_gsm8k --seeds 0 1 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parent.parent
METHODS = {"alol_hh": "A-LoL", "copg_gsm8k": "CoPG", "ppo_hh": "PPO", "apa_hh": "APA", "drpo_tldr": "DR-PO"}


def run(recipe: str, seed: int, options: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--seed", str(seed), "--output_dir", folder]
        subprocess.run([*command, "--disable_tqdm", "true", *options], check=True)
        result = {
            "seed": seed,
            "options": options,
            "policies": json.loads((Path(folder) / "results.json").read_text()),
            "versions": {name: version(name) for name in ("trl-lol", "trl", "transformers", "torch")},
            "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        }
        report = Path(folder) / "advantage_report.json"
        if report.exists():
            result["advantage_report"] = json.loads(report.read_text())
    path.write_text(json.dumps(result, indent=2) + "\n")


def table(results: list[dict], method: str) -> str:
    """Mean ± standard deviation over the seeds, and in how many of them the method gets more reward than a policy."""
    metrics = ["reward", "kl", "length", "distinct_1", "distinct_2", "distinct_3", "train_reward"]
    metrics = [name for name in metrics if name in results[0]["policies"][method]]  # the first results lack the last
    lines = [
        f"{len(results)} seeds: {', '.join(str(r['seed']) for r in results)}. Mean ± standard deviation over seeds.",
        "",
        "| policy | " + " | ".join(metrics) + f" | {method} has more reward |",
        "| --- |" + " ---: |" * (len(metrics) + 1),
    ]
    for policy in results[0]["policies"]:
        cells = []
        for metric in metrics:
            values = [r["policies"][policy][metric] for r in results]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        wins = sum(r["policies"][method]["reward"] > r["policies"][policy]["reward"] for r in results)
        cells.append("" if policy == method else f"{wins} / {len(results)}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipe", choices=list(METHODS), default="alol_hh")
    parser.add_argument("--name", help="folder under benchmarks/results, by default the recipe and 'toy'")
    args, options = parser.parse_known_args()
    folder = Path(__file__).parent / "results" / (args.name or f"{args.recipe}_toy")
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if not (folder / f"seed{seed}.json").exists():
            run(args.recipe, seed, options, folder / f"seed{seed}.json")
    results = [json.loads((folder / f"seed{seed}.json").read_text()) for seed in args.seeds]
    text = table(results, METHODS[args.recipe])
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
