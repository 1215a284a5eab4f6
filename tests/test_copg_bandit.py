"""Where four methods end on the bandit of the CoPG paper, whose optimum is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import copg_bandit as bandit


# μ = (μ1 + μ2)/2 = (.075, .125, .8)
TABLE = {
    "copg": ([0.7054, 0.2595, 0.0351], 0.0),
    "pg_baseline": ([0.8115, 0.1675, 0.0209], 0.0148),
    "pg": ([0.194, 0.250, 0.556], 0.638),
    "ipo": ([0.424, 0.353, 0.223], 0.153),
}


@pytest.mark.parametrize("method", TABLE)
def test_bandit_fixed_points(method: str) -> None:
    """
    R = (2.5, 2, 1), μ1 = (.1, .2, .7), μ2 = (.05, .05, .9), π_ref uniform, β = ½: R/β = (5, 4, 2), so
    π* = (148.41, 54.60, 7.39)/210.40 and J* = ½ ln(210.40/3) = 2.1252. At π_ref J = 5.5/3: the regret is .2919.
    """
    policy, expected_regret = TABLE[method]
    found = bandit.fixed_point(method)
    np.testing.assert_allclose(found.numpy(), policy, atol=0.002)
    assert bandit.regret(found).item() == pytest.approx(expected_regret, abs=0.002)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert bandit.regret(uniform).item() == pytest.approx(2.1252 - 5.5 / 3, abs=1e-4)
    assert bandit.expected_gradient(method, uniform.log()).abs().max() > 0.05  # it has moved there


def test_bandit_fixed_points_without_the_benchmark() -> None:
    """
    The same from other equations, in numpy: the policy gradient Σ_i w_i ∇ln π_i with w_i = μ_i (R_i − β h_i − b) is at
    rest where w ∝ π. IPO is a regression of h_i − h_j on (2p_ij − 1)/(2β), p = σ(R_i − R_j), with the pairs' weights:
    a linear system in h. CoPG's is the same with the targets (R_i − R_j)/β, and these agree with each other, so the
    weights do not matter. Control: at another method's rest w is not ∝ π.
    """
    rewards, mu1, mu2, beta = np.array([2.5, 2, 1]), np.array([0.1, 0.2, 0.7]), np.array([0.05, 0.05, 0.9]), 0.5

    def distance_from_rest(policy: np.ndarray, with_value: bool) -> float:
        value = policy @ rewards if with_value else 0.0
        w = (mu1 + mu2) / 2 * (rewards - beta * np.log(3 * policy) - value)
        return np.abs(w / w.sum() - policy).max()

    def regress(targets: np.ndarray) -> np.ndarray:
        weights = np.outer(mu1, mu2) + np.outer(mu2, mu1)
        laplacian = np.diag(weights.sum(1)) - weights
        h = np.linalg.lstsq(laplacian, (weights * targets).sum(1), rcond=None)[0]
        return np.exp(h) / np.exp(h).sum()

    found = {method: bandit.fixed_point(method).numpy() for method in TABLE}
    assert distance_from_rest(found["pg_baseline"], True) < 1e-6
    assert distance_from_rest(found["pg"], False) < 1e-6
    assert distance_from_rest(found["pg_baseline"], False) > 0.1 and distance_from_rest(found["pg"], True) > 0.1
    contrasts = rewards[:, None] - rewards
    np.testing.assert_allclose(found["ipo"], regress(np.tanh(contrasts / 2) / (2 * beta)), atol=1e-6)  # 2σ(x) − 1
    np.testing.assert_allclose(found["copg"], regress(contrasts / beta), atol=1e-6)


def behaviours() -> list[tuple[Tensor, Tensor]]:
    """5 pairs of distributions of full support, from the uniform distribution over them but at least .01 an arm."""
    dirichlet = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 2))
    return [(mu[0], mu[1]) for mu in torch.from_numpy(0.97 * dirichlet + 0.01)]


@pytest.mark.parametrize("index", range(5))
def test_any_behaviour_of_full_support_reaches_the_optimum(index: int) -> None:
    """Theorem 1. Control: the policy gradient's rest depends on who wrote the data, and so does IPO's."""
    mu1, mu2 = behaviours()[index]
    optimum = bandit.optimal_policy().numpy()
    np.testing.assert_allclose(bandit.fixed_point("copg", mu1, mu2).numpy(), optimum, atol=1e-4)
    for method in ("pg_baseline", "pg", "ipo"):
        assert np.abs(bandit.fixed_point(method, mu1, mu2).numpy() - optimum).max() > 0.01


def test_behaviour_that_misses_an_arm_does_not_reach_the_optimum() -> None:
    """
    No pair holds arm 2, so nothing moves its logit, and that of the other two changes by ±(4 − 5)/2: h_0 − h_1 =
    (2.5 − 2)/½ = 1 is right, π_2 = 1/(e^½ + e^−½ + 1) = .3072 is not.
    """
    mu = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    policy = bandit.fixed_point("copg", mu, mu).numpy()
    np.testing.assert_allclose(policy, np.exp([0.5, -0.5, 0.0]) * 0.307196, atol=1e-5)
    assert np.abs(policy - bandit.optimal_policy().numpy()).max() > 0.25
