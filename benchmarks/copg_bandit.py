"""
The bandit of the CoPG paper (section 5): regret against steps for CoPG, policy gradient and IPO on the same pairs.

Three arms, two behaviour distributions that mostly draw the worst one, and the KL-regularised return
J(π) = Σ π R − β KL(π ‖ π_ref), whose optimum π* ∝ π_ref e^{R/β} is known. Dashed lines are where each method ends with
infinitely many pairs, from its exact expected gradient. The paper stops after 100 epochs, before CoPG is at rest; this
goes on.

    python benchmarks/copg_bandit.py --output benchmarks/results/copg_bandit
"""

import argparse
import json
from pathlib import Path

import matplotlib
import scipy
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from trl_lol.losses import copg_loss


matplotlib.use("Agg")
from matplotlib import pyplot as plt


METHODS = {
    "copg": "CoPG",
    "pg_baseline": "policy gradient, value baseline",
    "pg": "policy gradient, no baseline",
    "ipo": "IPO",
}
REWARDS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
REF_LOGPS = torch.full((3,), 1 / 3, dtype=torch.float64).log()
MU1 = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
MU2 = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64)
BETA = 0.5
PAPER_EPOCHS = 100


def optimal_policy() -> Tensor:
    """π* ∝ π_ref e^{R/β}."""
    return (REF_LOGPS + REWARDS / BETA).softmax(-1)


def regret(policy: Tensor) -> Tensor:
    """J(π*) − J(π), for policies of shape `(..., 3)`. J* is β ln Σ π_ref e^{R/β}."""
    best = BETA * (REF_LOGPS + REWARDS / BETA).logsumexp(-1)
    kl = (policy.xlogy(policy) - policy * REF_LOGPS).sum(-1)
    return best - ((policy * REWARDS).sum(-1) - BETA * kl)


def pair_losses(method: str, logits: Tensor) -> Tensor:
    """
    What a method does with each pair of arms, as a loss to differentiate.

    Args:
        method (`str`):
            One of `METHODS`.
        logits (`torch.Tensor`):
            Logits of the policy, of shape `(..., 3)`.

    Returns:
        `torch.Tensor`: One loss per pair (y, y'), of shape `(..., 3, 3)`. For IPO, y is the preferred arm. The policy
        gradient treats y and y' as two samples; its weight R_β − b moves with the policy but carries no gradient.
    """
    logps = logits.log_softmax(-1)
    log_ratio = logps - REF_LOGPS
    if method == "copg":
        shape = (*logits.shape, logits.shape[-1])
        logps, ref_logps, rewards = (
            torch.stack([x.unsqueeze(-1).expand(shape), x.unsqueeze(-2).expand(shape)], dim=-1).view(-1, 2)
            for x in (logps, REF_LOGPS, REWARDS)
        )
        return copg_loss(logps, ref_logps, rewards, beta=BETA).view(shape)
    if method == "ipo":
        return (log_ratio.unsqueeze(-1) - log_ratio.unsqueeze(-2) - 1 / (2 * BETA)).square()
    value = (logps.exp() * REWARDS).sum(-1, keepdim=True) if method == "pg_baseline" else 0.0
    losses = -(REWARDS - BETA * log_ratio - value).detach() * logps
    return (losses.unsqueeze(-1) + losses.unsqueeze(-2)) / 2


def pair_weights(method: str, mu1: Tensor, mu2: Tensor) -> Tensor:
    """
    How often a method sees each pair, of shape `(3, 3)`: μ1(y) μ2(y'), and for IPO what a preference drawn with
    probability σ(R − R') makes of it.
    """
    weights = torch.outer(mu1, mu2)
    if method == "ipo":
        return (weights + weights.T) * (REWARDS.unsqueeze(1) - REWARDS).sigmoid()
    return weights


def expected_gradient(method: str, logits: Tensor, mu1: Tensor = MU1, mu2: Tensor = MU2) -> Tensor:
    """Exact expectation of a method's gradient with respect to the logits, of shape `(3,)`."""
    logits = logits.detach().requires_grad_()
    loss = (pair_weights(method, mu1, mu2) * pair_losses(method, logits)).sum()
    return torch.autograd.grad(loss, logits)[0]


def fixed_point(method: str, mu1: Tensor = MU1, mu2: Tensor = MU2) -> Tensor:
    """
    The policy that a method ends in, by following its exact expected gradient from π_ref.

    It is the gradient flow and not a minimiser that finds it, since the policy gradient with data of others is not the
    gradient of any loss.

    Args:
        method (`str`):
            One of `METHODS`.
        mu1, mu2 (`torch.Tensor`, *optional*):
            Behaviour distributions of y and y', of shape `(3,)`.

    Returns:
        `torch.Tensor`: The policy, of shape `(3,)`.

    Raises:
        `RuntimeError`: If the flow has not come to rest.
    """
    flow = solve_ivp(
        lambda _, logits: -expected_gradient(method, torch.from_numpy(logits), mu1, mu2).numpy(),
        (0.0, 1e6),
        REF_LOGPS.numpy(),
        method="LSODA",
        rtol=1e-9,
        atol=1e-12,
    )
    logits = torch.from_numpy(flow.y[:, -1].copy())
    if not flow.success or expected_gradient(method, logits, mu1, mu2).abs().max() > 1e-8:
        raise RuntimeError(f"{method} has not come to rest: {flow.message}")
    return logits.softmax(-1)


def train(
    method: str, num_seeds: int, num_pairs: int, batch_size: int, num_epochs: int, learning_rate: float
) -> Tensor:
    """
    Train on sampled pairs with Adam, all seeds at once. Every method gets the same pairs in the same order.

    Args:
        method (`str`):
            One of `METHODS`.
        num_seeds, num_pairs, batch_size, num_epochs (`int`):
            Number of seeds, of pairs of each, of pairs of a batch, and of passes over the pairs.
        learning_rate (`float`):
            Learning rate.

    Returns:
        `torch.Tensor`: The policies before the first step and after each, of shape `(steps + 1, num_seeds, 3)`.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = (mu.expand(num_seeds, 3).multinomial(num_pairs, True, generator=generator) for mu in (MU1, MU2))
    uniform = torch.rand(first.shape, generator=generator, dtype=torch.float64)
    if method == "ipo":
        prefers_first = uniform < (REWARDS[first] - REWARDS[second]).sigmoid()
        first, second = torch.where(prefers_first, first, second), torch.where(prefers_first, second, first)
    pairs = 3 * first + second

    logits = REF_LOGPS.expand(num_seeds, 3).clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    policies = [logits.detach().softmax(-1)]
    for _ in range(num_epochs):
        order = torch.rand(pairs.shape, generator=generator).argsort(dim=1)
        for batch in pairs.gather(1, order).split(batch_size, dim=1):
            weights = torch.zeros(num_seeds, 9, dtype=torch.float64)
            weights.scatter_add_(1, batch, torch.full(batch.shape, 1 / batch.size(1), dtype=torch.float64))
            optimizer.zero_grad()
            (weights.view(num_seeds, 3, 3) * pair_losses(method, logits)).sum().backward()
            optimizer.step()
            policies.append(logits.detach().softmax(-1))
    return torch.stack(policies)


def plot(regrets: dict[str, Tensor], limits: dict[str, float], paper_steps: int, path: Path) -> None:
    """Draw regret against steps: median and range over seeds, and where the exact expected gradient ends."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for method, values in regrets.items():
        low, median, high = values.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), dim=1)
        (line,) = axis.plot(median, label=METHODS[method])
        axis.fill_between(range(len(values)), low, high, color=line.get_color(), alpha=0.25, lw=0)
        axis.axhline(limits[method], color=line.get_color(), ls="--", lw=1)
    axis.axvline(paper_steps, color="gray", ls=":", lw=1)
    axis.annotate(f"{PAPER_EPOCHS} epochs", (paper_steps, 0.3), (4, 0), textcoords="offset points", color="gray")
    axis.set(xlabel="step", ylabel="regret J(π*) − J(π)", yscale="log", xlim=(0, len(values) - 1), ylim=(1e-4, 1))
    # The dashed line of CoPG is at 0, which a logarithmic axis has no place for
    axis.legend(loc="lower left", title="dashed: exact limit (CoPG: 0)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for regret.png and results.json")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=300, help=f"passes over the pairs, at least {PAPER_EPOCHS}")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.epochs < PAPER_EPOCHS:
        parser.error(f"--epochs must be at least {PAPER_EPOCHS}")

    paper_steps = PAPER_EPOCHS * -(-args.pairs // args.batch_size)
    regrets, limits, methods = {}, {}, {}
    for method in METHODS:
        policies = train(method, args.seeds, args.pairs, args.batch_size, args.epochs, args.learning_rate)
        limit = fixed_point(method)
        regrets[method], limits[method] = regret(policies), regret(limit).item()

        def summary(step: int, policies: Tensor = policies) -> dict[str, float | list[float]]:
            regrets = regret(policies[step])
            return {
                "step": step,
                "policy_mean": policies[step].mean(0).tolist(),
                "policy_sd": policies[step].std(0).tolist(),
                "regret_mean": regrets.mean().item(),
                "regret_sd": regrets.std().item(),
            }

        methods[method] = {
            "exact": {"policy": limit.tolist(), "regret": limits[method]},
            "after_paper_epochs": summary(paper_steps),
            "at_the_end": summary(len(policies) - 1),
        }
        print(f"{METHODS[method]}: {json.dumps(methods[method], indent=2)}")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(regrets, limits, paper_steps, args.output / "regret.png")
    result = {
        "optimal_policy": optimal_policy().tolist(),
        "initial_regret": regret(REF_LOGPS.exp()).item(),
        "methods": methods,
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "versions": {module.__name__: module.__version__ for module in (torch, scipy)},
    }
    (args.output / "results.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
