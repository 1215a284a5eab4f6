"""The numbers of docs/reliability.md are within their limits, and the controls are not."""

import pytest
from scorecard import BEGIN, CHECKS, END, LIMITS, METHODS, PAGE, POLICIES, Bench, Row, table


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", METHODS)
def test_scorecard(name, policy, check, tmp_path):
    measured = check(Bench(METHODS[name], policy, tmp_path))
    assert measured or (check.__name__ == "cached_reference" and METHODS[name].is_online)
    for what, (value, control) in measured.items():
        limit, control_limit = LIMITS[what]
        assert value <= limit, what
        assert control > control_limit, f"control of {what}"


def test_the_page_has_every_check_and_method():
    """And nothing that is beyond its limit, which would be bold."""
    measured = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    lines = [line for line in measured.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "allowed", *METHODS, "controls from"]
    assert [line[0] for line in cells[2:]] == list(LIMITS)
    assert "**" not in measured


def test_what_is_beyond_its_limit_is_bold():
    rows = {what: Row({"PPO": [0.0, 2e-6]}, [0.5, 0.2]) for what in ("two ranks, loss", "first log-ratio")}
    *_, line = table(rows).splitlines()
    assert line == "| first log-ratio | 1e-06 | – | – | – | – | – | – | 0 · **2e-06** | – | – | 2e-01 |"
