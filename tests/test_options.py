"""Flags become settings and settings JSON; a run that goes on has those that it began with."""

import dataclasses
import json
import typing

import pytest
from training import NEW_RUN

from vla import InputError, config, options

# ---- Resume: what may change, and what may not.


@pytest.mark.parametrize(
    ("flag", "old", "new"),
    [
        ("seed", 0, 7),
        ("data.val_fraction", 0.05, 0.2),
        ("model.width", 256, 64),
        ("model.freeze", ("vision_encoder",), ("language_model",)),
        ("global_batch_size", 64, 32),
        ("optim.lr", 0.0003, 0.01),
        ("optim.module_lrs", (("action_head", 0.0001),), (("action_head", 0.5),)),
        ("optim.ema", 0.999, 0.5),
        ("init_from", "none", "elsewhere"),
        ("data.image_size", "none", (32, 32)),
        ("run_dir", "run", "elsewhere"),
    ],
)
def test_resumed_run_refuses_a_flag_that_disagrees_and_names_both_values(flag, old, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", "--model.freeze", "vision_encoder", "--optim.module_lrs", "action_head", "1e-4")
    words = new if isinstance(new, tuple) else [new]
    given = [str(word) for part in words for word in (part if isinstance(part, tuple) else [part])]
    with pytest.raises(InputError, match="disagree") as refused:
        options.parse(["--resume_from", "run", f"--{flag}", *given])
    assert f"--{flag} {new} (the run has {old})" in str(refused.value)
    assert "--init_from" in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps", 99),
        ("micro_batch_size", 8),
        ("data.workers", 7),
        ("eval.every", 3),
        ("eval.patience", 2),
        ("checkpoint.every", 3),
        ("checkpoint.keep", 5),
        ("log.every", 3),
        ("compile", True),
    ],
)
def test_resumed_run_takes_a_flag_that_may_change(flag, value, tmp_path):
    before = save_run(tmp_path / "run")
    given = [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    after = options.flatten(options.parse(["--resume_from", str(tmp_path / "run"), *given]))
    changed = {name for name, old in options.flatten(before).items() if after[name] != old}
    assert changed == {flag, "resume_from", "run_dir"}
    assert after[flag] == value


def test_resumed_run_takes_epochs_in_place_of_steps(tmp_path):
    save_run(tmp_path / "run")
    settings = options.parse(["--resume_from", str(tmp_path / "run"), "--epochs", "3"])
    assert (settings.steps, settings.epochs) == (0, 3)


def test_run_whose_checkpoints_to_keep_are_not_all_made_can_be_resumed_as_it_is(tmp_path):
    settings = save_run(tmp_path)
    kept = dataclasses.replace(settings.checkpoint, every=5, keep_every=7)  # refused today
    options.save(dataclasses.replace(settings, checkpoint=kept), tmp_path / "config.json")
    assert options.parse(["--resume_from", str(tmp_path)]).checkpoint == kept
    assert options.parse(["--resume_from", str(tmp_path), "--checkpoint.keep", "3"]).checkpoint.keep == 3
    with pytest.raises(InputError, match=r"keep_every is 8; expected a multiple of --checkpoint\.every 5"):
        options.parse(["--resume_from", str(tmp_path), "--checkpoint.keep_every", "8"])
    assert options.parse(["--resume_from", str(tmp_path), "--checkpoint.keep_every", "10"]).checkpoint.keep_every == 10


def test_data_of_a_run_are_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", "--data.path", "data", "lerobot/pusht")
    monkeypatch.chdir(tmp_path / "run")
    for given in ((), ("--data.path", "../data", "lerobot/pusht")):
        resumed = options.parse(["--resume_from", ".", *given])
        assert resumed.data.path == (str(tmp_path / "data"), "lerobot/pusht")


def test_names_and_cache_of_data_stay_those_that_a_run_began_with(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", "--data.path", "data", "lerobot/pusht@v3.0", "--data.cache_dir", "cache")
    (tmp_path / "data").rename(tmp_path / "run/renamed")
    monkeypatch.chdir(tmp_path / "run")
    for given in ((), ("--data.path", "renamed", "me/pusht2")):
        resumed = options.parse(["--resume_from", ".", *given])
        assert resumed.data.names == ("data", "pusht")
        assert resumed.data.cache_dir == str(tmp_path / "cache")


def test_home_is_found_behind_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = options.parse(["--run_dir=~/runs/a", "--data.path", "~/data", "a~b/c", "--init_from=~"])
    assert (settings.run_dir, settings.init_from) == ("/home/me/runs/a", "/home/me")
    assert settings.data.path == ("/home/me/data", "a~b/c")


def test_run_with_options_that_have_no_effect_goes_on(tmp_path):
    settings = save_run(tmp_path / "run")
    idle = {"data": {"pad_dims": True}, "eval": {"dataset": "arm", "episodes": 5}, "optim": {"decay_share": 0.5}}
    parts = {name: dataclasses.replace(getattr(settings, name), **changed) for name, changed in idle.items()}
    options.save(dataclasses.replace(settings, **parts), tmp_path / "run/config.json")
    resumed = options.parse(["--resume_from", str(tmp_path / "run")])
    assert (resumed.data, resumed.eval, resumed.optim) == tuple(parts.values())


def test_resumed_run_takes_steps_or_epochs_and_not_both(tmp_path):
    save_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"found --steps 99 and --epochs 3\.0; give one of them"):
        options.parse(["--resume_from", str(tmp_path / "run"), "--steps", "99", "--epochs", "3"])


def test_same_command_with_auto_goes_on_whatever_flags_it_has(tmp_path):
    arguments = [
        *("--run_dir", str(tmp_path / "run"), "--data.path", "data", "--epochs", "2.5", "--resume_from", "auto"),
        *("--model.freeze", "vision_encoder", "language_model", "--optim.module_lrs", "action_head", "1e-4"),
        *(
            "--optim.schedule",
            "step",
            "--optim.milestones",
            "0.3",
            "0.5",
            "--optim.betas",
            "0.8",
            "0.9",
            "--data.cameras",
            "table",
            "gripper",
        ),
        *("--log.trackers", "--model.head", "regression", "--model.gripper_dims", "2", "--deterministic"),
    ]
    fresh = options.parse(arguments)
    assert options.resume_folder(fresh) is None
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    options.save(fresh, tmp_path / "run/config.json")
    assert options.parse(arguments) == fresh


def test_auto_goes_on_with_a_run_whose_only_checkpoint_was_being_replaced(tmp_path):
    settings = options.parse(["--run_dir", str(tmp_path / "run"), "--data.path", "data"])
    (tmp_path / "run/checkpoints/.replaced_step_00000001").mkdir(parents=True)
    settings = dataclasses.replace(settings, resume_from="auto")
    assert options.resume_folder(settings) == tmp_path / "run"


@pytest.mark.parametrize("path", ["run", "run/best", "run/checkpoints", "run/checkpoints/step_00000005", "run/"])
def test_every_way_to_name_a_run_finds_it(path, tmp_path):
    save_run(tmp_path / "run")
    settings = options.parse(["--resume_from", str(tmp_path / path)])
    assert settings.run_dir == str(tmp_path / "run")


def test_export_in_place_of_a_run_is_refused_naming_the_cure(tmp_path):
    (tmp_path / "run/export").mkdir(parents=True)
    (tmp_path / "run/export/model.safetensors").touch()
    with pytest.raises(InputError, match=r"export is an export; give the run that it comes from, or .* --init_from"):
        options.parse(["--resume_from", str(tmp_path / "run/export")])


def test_flags_parse_with_hyphens_and_underscores(tmp_path):
    save_run(tmp_path / "run")
    for flag in ("--resume_from", "--resume-from"):
        assert options.parse([flag, str(tmp_path / "run")]).resume_from == str(tmp_path / "run")


def save_run(run, *arguments):
    run.mkdir(parents=True, exist_ok=True)
    settings = options.parse([*NEW_RUN, *arguments])
    options.save(settings, run / "config.json")
    return settings


# ---- The configuration as JSON.


def all_different(cls, default):
    """An instance of the dataclass no field of which has its default value."""
    kinds, values = typing.get_type_hints(cls), {}
    for name, old in ((field.name, getattr(default, field.name)) for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(old):
            values[name] = all_different(kinds[name], old)
        elif isinstance(old, bool):
            values[name] = not old
        elif typing.get_origin(kinds[name]) is typing.Literal:
            values[name] = next(choice for choice in typing.get_args(kinds[name]) if choice != old)
        elif isinstance(old, int | float):
            values[name] = old + 1
        elif isinstance(old, str):
            values[name] = old + "x"
        elif name in ("module_lrs", "unfreeze"):
            values[name] = (("action_head", 5),)
        else:
            kind = typing.get_args(kinds[name])[0]
            values[name] = typing.get_args(kind) or (kind(7), kind(9))
    return cls(**values)


@pytest.mark.parametrize("inside", ["data", "data/runs/1", "link/run"])
def test_new_run_in_the_folder_of_its_data_is_refused(inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/meta").mkdir(parents=True)
    (tmp_path / "data/meta/info.json").touch()
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(
        InputError, match=f"--run_dir {inside} lies in the data set {tmp_path}/data; give a folder elsewhere"
    ):
        options.parse([*NEW_RUN, "--run_dir", inside])
    options.parse([*NEW_RUN, "--run_dir", "database"])
    save_run(tmp_path / inside)
    options.parse(["--resume_from", inside])  # which began there


def test_configuration_comes_back_from_json_as_it_was(tmp_path):
    settings = all_different(config.TrainConfig, config.TrainConfig())
    default = options.flatten(config.TrainConfig())
    assert all(value != default[name] for name, value in options.flatten(settings).items())
    options.save(settings, tmp_path / "config.json")
    lasting = dataclasses.replace(settings, resume_from="", log=dataclasses.replace(settings.log, profile=0))
    assert options.load(tmp_path / "config.json") == lasting


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("model.width", "64", "int"),
        ("model.width", 64.0, "int"),
        ("steps", True, "int"),
        ("compile", 1, "bool"),
        ("run_dir", None, "str"),
        ("optim.lr", None, "float"),
        ("guard.hang_seconds", "x", "float"),
        ("optim.schedule", "zigzag", "Literal['constant', 'linear', 'cosine', 'step', 'wsd']"),
        ("model.head", ["flow"], "Literal['flow', 'regression', 'token']"),
        ("data.path", "data", "list[str, ...]"),
        ("data.path", [1], "list[str, ...]"),
        ("data.image_size", ["a", 2], "list[int, ...]"),
        ("optim.betas", [0.9], "list[float, float]"),
        ("optim.module_lrs", [["a"]], "list[list[str, float], ...]"),
    ],
)
def test_value_of_another_kind_is_refused_naming_file_option_found_and_expected(name, found, expected, tmp_path):
    save_run(tmp_path / "run")
    path = tmp_path / "run/config.json"
    settings = place = json.loads(path.read_text())
    *parts, last = name.split(".")
    for part in parts:
        place = place[part]
    place[last] = found
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError) as refused:
        options.parse(["--resume_from", str(tmp_path / "run")])
    assert str(refused.value) == f"{path} has {name} {found!r}, expected {expected}; correct it"


def test_whole_number_is_a_number(tmp_path):
    settings = save_run(tmp_path / "run", "--optim.lr", "1")
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"lr": 1.0', '"lr": 1'))
    assert options.load(path).optim == settings.optim
