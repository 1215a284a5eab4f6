"""A checkpoint counts once it is whole: `trl_lol.json` is written last, and nothing older goes before."""

import json
from pathlib import Path

import pytest
import torch
from conftest import LORA, StopAt, distance, early_tokens, logged, weights
from transformers import Trainer

from trl_lol import ALoLTrainer, APATrainer, CoPGTrainer, DRPOTrainer, PPOTrainer, __version__, _resume


OFFLINE = {"alol": ALoLTrainer, "copg": CoPGTrainer}
ONLINE = {"ppo": PPOTrainer, "apa": APATrainer, "drpo": DRPOTrainer}


@pytest.fixture(params=[*OFFLINE, *ONLINE])
def build(request, build_trainer, build_online_trainer, groups):
    """Makes trainers that save after each of 3 steps."""
    settings = {"save_strategy": "steps", "save_steps": 1}

    def build(**kwargs):
        if request.param in OFFLINE:
            rows = {"train_dataset": groups, "value_num_train_epochs": 1}
            if request.param == "copg":
                del rows["value_num_train_epochs"]
            return build_trainer(OFFLINE[request.param], **settings, **rows, **kwargs)
        return build_online_trainer(ONLINE[request.param], reward_funcs=early_tokens, **settings, **kwargs)

    return build


def test_a_checkpoint_tells_what_is_in_it_and_who_wrote_it(build, tmp_path):
    build().train()
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        content = json.loads((folder / "trl_lol.json").read_text())
        found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        del found["trl_lol.json"]
        assert content == {"trl_lol": __version__, "num_processes": 1, "files": found}
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= found.keys()


def test_the_last_whole_checkpoint_is_taken(build, tmp_path, caplog):
    whole = build()
    whole.train()
    (tmp_path / "checkpoint-3" / "trl_lol.json").unlink()  # killed before it was written
    optimizer = tmp_path / "checkpoint-2" / "optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:-1])  # copied from elsewhere, and not to the end
    resumed = build(report_to="none")
    with caplog.at_level("WARNING", "trl_lol._resume"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is no whole checkpoint: it has no trl_lol.json" in caplog.text
    assert f"optimizer.pt has {len(content) - 1} bytes of {len(content)}" in caplog.text
    assert f"Going on from {tmp_path / 'checkpoint-1'}" in caplog.text
    assert logged(resumed, "loss") == logged(whole, "loss") and len(logged(whole, "loss")) == 3
    assert distance(weights(resumed), weights(whole)) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_list_of_files(tmp_path, content):
    (tmp_path / "trl_lol.json").write_text(content)
    with pytest.raises(ValueError, match=r"its trl_lol\.json is damaged"):
        _resume.whole_checkpoint(tmp_path, tmp_path)


@pytest.mark.parametrize("resume", [True, "checkpoint-3", "checkpoint-9"])
def test_what_is_not_whole_is_refused(build_trainer, groups, tmp_path, resume):
    trainer = build_trainer(CoPGTrainer, train_dataset=groups, save_strategy="steps", save_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    before = weights(trainer)
    expected = "there is no such folder" if resume == "checkpoint-9" else "model.safetensors has 0 bytes of [0-9]+"
    with pytest.raises(ValueError, match=rf"is no whole checkpoint: {expected}. .*Resume from another checkpoint"):
        trainer.train(resume_from_checkpoint=resume if resume is True else str(tmp_path / resume))
    assert distance(before, weights(trainer)) == 0


def test_no_checkpoint_at_all(build_trainer, groups, tmp_path):
    trainer = build_trainer(CoPGTrainer, train_dataset=groups)
    with pytest.raises(ValueError, match=f"There is no checkpoint in {tmp_path} to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_another_version_or_number_of_processes_is_named(build_trainer, groups, tmp_path, monkeypatch, caplog):
    build_trainer(CoPGTrainer, train_dataset=groups, save_strategy="steps", save_steps=1).train()
    monkeypatch.setattr(_resume, "__version__", "9.9")
    path = tmp_path / "checkpoint-3" / "trl_lol.json"
    path.write_text(path.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    with caplog.at_level("WARNING", "trl_lol._resume"):
        build_trainer(CoPGTrainer, train_dataset=groups).train(resume_from_checkpoint=True)
    assert f"was saved by trl_lol {__version__}, and this is 9.9" in caplog.text
    assert "was saved by 2 processes, and this run has 1" in caplog.text


def test_older_checkpoints_stay_until_a_new_one_is_whole(build_trainer, groups, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = build_trainer(CoPGTrainer, train_dataset=groups, **settings)
    save = torch.save

    def full(state, path, *args, **kwargs):
        if "checkpoint-3" in str(path) and Path(path).name == "scheduler.pt":
            raise OSError(28, "No space left on device")
        return save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        trainer.train()
    assert "checkpoint-3 could not be saved, and is no checkpoint" in error.value.__notes__[0]
    args = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.save_total_limit == trainer.args.save_total_limit == 1
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    monkeypatch.setattr(torch, "save", save)
    resumed = build_trainer(CoPGTrainer, train_dataset=groups, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss") == logged(trainer, "loss") and len(logged(trainer, "loss")) == 3
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]  # and goes afterwards


def test_only_whole_checkpoints_are_pushed(build_trainer, groups, tmp_path, monkeypatch):
    pushed = []
    trainer = build_trainer(CoPGTrainer, train_dataset=groups, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(
        trainer, "_push_from_checkpoint", lambda path: pushed.append((path, Path(path, "trl_lol.json").exists()))
    )
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (1, 2, 3)]


def test_a_folder_that_is_written_anew_is_not_whole_meanwhile(build_trainer, groups, tmp_path, monkeypatch):
    """A second run in the same output directory: what is left of the first one does not vouch for its files."""
    settings = {"train_dataset": groups, "save_strategy": "steps", "save_steps": 1}
    build_trainer(CoPGTrainer, **settings).train()
    again = build_trainer(CoPGTrainer, **settings)
    seen = []
    save_rng_state = again._save_rng_state

    def look(folder):
        seen.append(Path(folder, "trl_lol.json").exists())
        save_rng_state(folder)

    monkeypatch.setattr(again, "_save_rng_state", look)
    again.add_callback(StopAt(2))
    again.train()
    assert seen == [False, False]


def test_what_an_earlier_run_has_left_is_not_taken_over(build_online_trainer, tmp_path):
    """Its rollouts are of steps that this run has not taken."""
    settings = {"num_iterations": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_online_trainer(PPOTrainer, **settings).train()
    folder = tmp_path / "checkpoint-2"
    assert {"rollouts_0.pt", "optimizer.pt"} <= {path.name for path in folder.iterdir()}
    (folder / "rollouts_1.pt").touch()  # of a second process
    build_online_trainer(PPOTrainer, **settings, save_only_model=True).train()
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and not names & {"rollouts_0.pt", "rollouts_1.pt", "optimizer.pt"}
    assert names == {*json.loads((folder / "trl_lol.json").read_text())["files"], "trl_lol.json"}


def test_half_written_ones_go_first(build_trainer, groups, tmp_path):
    """The one that a killed run has left has a higher number than those that are saved now."""
    settings = {"train_dataset": groups, "save_strategy": "steps", "save_steps": 1}
    build_trainer(CoPGTrainer, **settings).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trl_lol.json").unlink()
    resumed = build_trainer(CoPGTrainer, **settings, save_total_limit=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_run_is_not_gone_on_with(build_trainer, groups, tmp_path, stream):
    """Within an epoch: transformers would take a step more."""
    rows = groups.to_iterable_dataset() if stream else groups
    settings = {"train_dataset": rows, "save_strategy": "steps", "save_steps": 3}
    whole = build_trainer(CoPGTrainer, **settings)
    whole.train()
    again = build_trainer(CoPGTrainer, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and distance(weights(again), weights(whole)) == 0


def test_edited_texts_do_not_matter_and_lost_ones_do(build_trainer, groups, tmp_path):
    build_trainer(CoPGTrainer, train_dataset=groups, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    (folder / "config.json").write_text(json.dumps(config))
    assert _resume.whole_checkpoint(folder, tmp_path) == str(folder)
    (folder / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json has 0 bytes of"):
        _resume.whole_checkpoint(folder, tmp_path)


def test_a_folder_without_a_list_is_taken_when_told_so(tmp_path):
    with pytest.raises(ValueError, match="of another trainer or an earlier version") as error:
        _resume.whole_checkpoint(tmp_path, tmp_path)
    content = str(error.value).split("`")[1]
    (tmp_path / "trl_lol.json").write_text(content)
    assert _resume.whole_checkpoint(tmp_path, tmp_path) == str(tmp_path)


@pytest.mark.parametrize("load", ["_load_from_checkpoint", "_load_best_model"])
def test_adapters_keep_their_type(build_trainer, groups, tiny_model, tmp_path, load):
    """PEFT reads an adapter into float32."""
    settings = {"train_dataset": groups, "save_strategy": "steps", "save_steps": 3, "peft_config": LORA}
    trainer = build_trainer(CoPGTrainer, **settings)
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    arguments = [str(tmp_path / "checkpoint-3")] if load == "_load_from_checkpoint" else []
    getattr(trainer, load)(*arguments)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    getattr(Trainer, load)(trainer, *arguments)  # Control
    assert torch.float32 in {parameter.dtype for parameter in trainer.model.parameters()}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, 1, [1, 2, 3, 4]), (0, 1, [1, 2, 3, 4]), (1, None, [4]), (1, 2, [2, 4]), (2, 2, [2, 4]), (2, None, [3, 4]),
     (3, 1, [1, 3, 4]), (2, 9, [3, 4])],
)  # fmt: skip
def test_what_is_deleted(tmp_path, limit, best, left):
    """The oldest beyond the limit, but neither the newest nor the best, which may be in another folder."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trl_lol.json").write_text('{"trl_lol": "", "files": {}}')
    _resume._rotate(str(tmp_path), limit, {tmp_path / "checkpoint-4", tmp_path / f"checkpoint-{best or 4}"})
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left
