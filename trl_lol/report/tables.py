"""An advantage report as text."""

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


if TYPE_CHECKING:
    from . import AdvantageReport, Example

WIDTH = 119
MAX_SUBSETS = 20
MAX_CHARACTERS = 110  # of a prompt or completion


def render(report: "AdvantageReport") -> Group:
    """What `rich` prints of a report."""
    from . import QUANTILES  # which imports this module

    scale = max(map(abs, report.rewards + report.values))

    def number(x: float) -> str:
        return f"{x:z.3f}" if 0.1 <= scale < 1e5 else f"{x:z.3g}"

    parts = [
        _sentence(
            f"{report.num_kept} of {report.num_completions} completions ({report.kept_fraction:.1%}) have a positive "
            f"advantage; the effective sample size under priority sampling is {report.effective_sample_size:.0f}."
        ),
        _sentence(" ".join(_counts(report))),
        _table(
            ["", *(f"{q:.0%}" for q in QUANTILES)],
            [[name, *map(number, getattr(report, name))] for name in ("rewards", "values", "advantages")],
        ),
        _sentence(
            "The rewards are all equal."
            if report.value_r2 is None
            else f"The values explain {report.value_r2:z.1%} of the rewards' variance."
        ),
    ]
    if len(report.calibration) > 1:
        keys = {"mean value": "value", "mean reward": "reward"}
        rows = [[label, *(number(x[key]) for x in report.calibration)] for label, key in keys.items()]
        counts = ["completions", *(str(x["count"]) for x in report.calibration)]
        parts.append(_table(["by value", *[""] * (len(counts) - 2), ""], [*rows, counts]))
    if report.subsets:
        largest = sorted(report.subsets.items(), key=lambda item: -item[1][1])[:MAX_SUBSETS]
        rows = [[_short(name), str(kept), str(total - kept), f"{kept / total:.1%}"] for name, (kept, total) in largest]
        parts.append(_table(["subset", "kept", "dropped", "kept of all"], rows))
        if num_more := len(report.subsets) - len(largest):
            parts.append(_sentence(f"... and {num_more} smaller subsets."))
    for title, examples in (("most advantageous", report.best), ("least advantageous", report.worst)):
        if examples:
            parts.append(_examples(title, examples, number))
    return Group(*(part for part in parts if not isinstance(part, Text) or part.plain))


def as_plain_text(report: "AdvantageReport") -> str:
    """The same without colours, wherever it is printed."""
    file = StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(report)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _counts(report: "AdvantageReport") -> Iterable[str]:
    if report.num_prompts is not None:
        yield f"They answer {report.num_prompts} prompts."
    if report.num_duplicates is not None:
        yield f"{report.num_duplicates} of them repeat an earlier completion of the same prompt."
    if report.num_missing:
        yield f"{report.num_missing} more are not scored."


def _sentence(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ignore")


def _table(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _examples(title: str, examples: list["Example"], number) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column(title)
    return table


def _short(text: str, keep_end: bool = False) -> str:
    """On one line, without control characters, and with the end or the beginning of what is long."""
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    if len(text) <= MAX_CHARACTERS:
        return text
    return "…" + text[1 - MAX_CHARACTERS :] if keep_end else text[: MAX_CHARACTERS - 1] + "…"
