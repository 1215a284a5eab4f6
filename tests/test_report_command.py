"""The command that makes a report from a file."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_lol.report import AdvantageReport
from trl_lol.report.__main__ import main, make_parser


@pytest.fixture
def policy(tiny_model, tokenizer, tmp_path):
    """Folder of a model."""
    folder = tmp_path / "policy"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_plots(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(AdvantageReport, "plot", lambda *_: [])


LOG = [
    {"question": "a?", "answer": "yes", "score": 2, "source": "x", "prompt": "unused", "reward": 9.0},
    {"question": "a?", "answer": "no", "score": 0, "source": "x", "prompt": "unused", "reward": 9.0},
    {"question": "b?", "answer": "no", "score": None, "source": "y", "prompt": "unused", "reward": 9.0},
    {"question": "b?", "answer": "yes", "score": 3, "source": "y", "prompt": "unused", "reward": 9.0},
    {"question": "b?", "answer": "yes", "score": 1, "source": "y", "prompt": "unused", "reward": 9.0},
]
NONE = ["--baseline", "none"]
COLUMNS = ["--prompt-column", "question", "--completion-column", "answer", "--reward-column", "score"]


@pytest.fixture
def log(tmp_path):
    """A file of real logs, with names of their own."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LOG))
    return path


def test_command(log, policy, tmp_path, capsys):
    """The best is 3, and 2 if the value of "a?" is not above its mean by far; one is not scored, one is repeated."""
    out = tmp_path / "out"
    main([str(log), *COLUMNS, "--subset-column", "source", "--model", policy, "--output-dir", str(out)])
    printed = capsys.readouterr().out
    report = AdvantageReport.load(out / "report.json")
    assert str(report) in printed and "\x1b" not in printed
    assert (report.num_completions, report.num_missing, report.num_duplicates, report.num_prompts) == (4, 1, 1, 2)
    assert {name: total for name, (_, total) in report.subsets.items()} == {"x": 2, "y": 2}
    assert {path.name for path in out.iterdir()} == {
        "report.json", "scored.jsonl", "distributions.png", "calibration.png", "subsets.png"
    }  # fmt: skip
    scored = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in scored] == [row["score"] for row in LOG]  # and not 9
    assert [row["prompt"] for row in scored] == [row["question"] for row in LOG]
    for row in scored:
        if row["reward"] is None:
            assert row["advantage"] is None
        else:
            assert row["advantage"] == pytest.approx(row["reward"] - row["value"], abs=1e-12)
    again = AdvantageReport.from_dataset(Dataset.from_list(scored), "source")
    assert again.rewards == report.rewards and again.advantages == pytest.approx(report.advantages, abs=1e-12)


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [
        ("group_mean", [1, -1, None, 1, -1]),
        ("leave_one_out", [2, -2, None, 2, -2]),
        ("batch_mean", [0.5, -1.5, None, 1.5, -0.5]),
        ("none", [2, 0, None, 3, 1]),
    ],
)
def test_command_without_a_model(log, tmp_path, baseline, advantages, no_plots):
    """Means 1 of "a?", 2 of "b?" and 1.5 of all. What tells the prompts apart need not be a model's tokenizer."""
    main([str(log), *COLUMNS, "--baseline", baseline, "--output-dir", str(tmp_path / "out")])
    scored = (tmp_path / "out" / "scored.jsonl").read_text().splitlines()
    assert [json.loads(line)["advantage"] for line in scored] == advantages


def write_files(dataset, folder):
    """The same rows in every accepted form."""
    dataset.to_json(folder / "rows.jsonl")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    (folder / "rows.json").write_text(json.dumps(dataset.to_list()))
    dataset.to_csv(folder / "rows.csv")
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    DatasetDict(test=dataset).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    dataset.to_json(folder / "files" / "test.jsonl")


def test_command_reads_every_form(tmp_path, no_plots):
    write_files(Dataset.from_list(LOG), tmp_path)
    found = []
    for name in ("jsonl", "jsonl.gz", "json", "csv", "parquet"):
        main([str(tmp_path / f"rows.{name}"), *COLUMNS, *NONE, "--output-dir", str(tmp_path / "out")])
        found.append(AdvantageReport.load(tmp_path / "out" / "report.json"))
    for name, split in (("saved", "train"), ("splits", "test"), ("files", "test")):
        options = ["--split", split, *NONE, "--output-dir", str(tmp_path / "out")]
        main([str(tmp_path / name), *COLUMNS, *options])
        found.append(AdvantageReport.load(tmp_path / "out" / "report.json"))
    assert all(report == found[0] for report in found) and found[0].num_completions == 4


def test_command_reads_groups_and_messages(tmp_path, pairs, no_plots):
    """A column with lists of texts holds completions; one of messages, a completion."""
    message = [{"role": "assistant", "content": "yes"}]
    for answer, score, expected in ((["yes", "no"], [1.0, 0.5], 2), (message, 1.0, 1)):
        question = "a?" if answer is not message else [{"role": "user", "content": "a?"}]
        # Of the columns of another format, which would come first, nothing is read
        row = {"question": question, "answer": answer, "score": score, "chosen": "c", "rejected": "r"}
        Dataset.from_list([row, row]).to_json(tmp_path / "rows.jsonl")
        options = [*COLUMNS, "--baseline", "batch_mean", "--output-dir", str(tmp_path / "out")]
        main([str(tmp_path / "rows.jsonl"), *options])
        report = AdvantageReport.load(tmp_path / "out" / "report.json")
        assert report.num_completions == 2 * expected and report.best[0]["completion"] == "yes"
    pairs.take(5).to_json(tmp_path / "pairs.jsonl")  # without scores: 1 and 0
    main([str(tmp_path / "pairs.jsonl"), *NONE, "--output-dir", str(tmp_path / "out")])
    assert AdvantageReport.load(tmp_path / "out" / "report.json").rewards == [0, 0, 0, 0, 1, 1, 1]


def test_command_samples_rows(log, tmp_path, no_plots):
    rewards = []
    for seed in ("0", "0", "1", "2"):
        options = ["--max-rows", "3", "--seed", seed, *NONE, "--output-dir", str(tmp_path / "out")]
        main([str(log), *COLUMNS, *options])
        lines = (tmp_path / "out" / "scored.jsonl").read_text().splitlines()
        rewards.append([json.loads(line)["reward"] for line in lines])
    assert all(len(row) == 3 for row in rewards) and rewards[0] == rewards[1]
    assert len({tuple(row) for row in rewards}) > 1  # by the seed, and not the first three


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (COLUMNS, "set --baseline to one of group_mean, leave_one_out, batch_mean, none"),
        (["--reward-column", "points", *NONE], "no column 'points'. Its columns: question, answer, score"),
        (["--prompt-column", "ask", *NONE], "no column 'ask'. Its columns: question"),
        (["--subset-column", "kind", *NONE], "no column 'kind'. Its columns: question"),
        (NONE, "columns are question, answer, score, source, prompt, reward. Accepted row formats"),
        ([*COLUMNS, "--reward-column", "source", *NONE], "the column 'source': could not convert string to float"),
        ([*COLUMNS, "--model", "no/where"], "The model 'no/where' cannot be loaded: "),
        ([*COLUMNS, "--baseline", "mean"], "invalid choice: 'mean'"),
    ],
)
def test_command_says_what_is_wrong(log, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main([str(log), *options, "--output-dir", str(tmp_path / "out")])
    assert error.value.code not in (None, 0)
    assert message in f"{error.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_command_says_what_is_wrong_with_the_data(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a",')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "numbers.csv").write_text("prompt,completion,reward\n1,2,3\n")
    DatasetDict(test=Dataset.from_list(LOG)).save_to_disk(tmp_path / "splits")
    for name, message in (
        ("rows.txt", r"accepted files end in \.jsonl, \.json, \.csv, \.parquet, or one of these and \.gz"),
        ("none.jsonl", "there is no such file"),
        ("splits", "no split 'train'. Its splits: test"),
        ("nothing", "nothing"),
        ("broken.jsonl", "JSON parse error"),
        ("empty.jsonl", "it has no rows"),
        ("rows.jsonl", "Row 0 has no reward"),
        ("numbers.csv", "Row 0 has 1, of type int, for a prompt or completion"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            main([str(tmp_path / name), *NONE, "--output-dir", str(tmp_path / "out")])
        data = str(tmp_path / name)
        assert str(error.value).startswith("No advantages: " if name == "rows.jsonl" else f"{data} cannot be used: ")


def test_what_stands_in_a_file_is_kept(tmp_path, no_plots, capsys):
    """Answers "None" and "NA" of a CSV file, but no empty cell; a date, parts of a message and a call of a tool."""
    path, out = tmp_path / "rows.csv", tmp_path / "out"
    path.write_text("prompt,completion,reward\nq,None,1\nq,NA,0.5\nq,c,\n,d,1\nq,,1\n")
    main([str(path), *NONE, "--output-dir", str(out)])
    assert "Dropped 2 of 5 rows, which have no prompt or no completion." in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["None", "NA", "c"] and rows[2]["advantage"] is None
    parts = [{"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]}]
    call = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": parts, "completion": call, "reward": 1, "day": "2024-01-02"}) + "\n")
    main([str(path), *NONE, "--output-dir", str(out)])
    assert "2024-01-02" in (out / "scored.jsonl").read_text()
    assert AdvantageReport.load(out / "report.json").best[0]["prompt"] == "user: two parts"


def test_command_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for action in make_parser()._actions:
        assert action.help and (action.dest == "help" or action.help[:30] in printed), action.dest


def test_command_without_matplotlib(log, tmp_path, monkeypatch):
    """What it has counted is not lost."""
    monkeypatch.setattr(AdvantageReport, "plot", lambda *_: (_ for _ in ()).throw(ImportError("Install it.")))
    with pytest.raises(SystemExit, match=r"There are no pictures\. Install it"):
        main([str(log), *COLUMNS, *NONE, "--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "scored.jsonl").exists()


def test_rows_have_the_numbers_that_they_have_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": None, "reward": 1}, {"prompt": [], "completion": [], "reward": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="Row 1 has a prompt without messages"):
        main([str(path), *NONE, "--output-dir", str(tmp_path / "out")])
