"""Paths on the command line: what cannot be used is told in one line, and ~ is the home folder."""

import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from training import ROOT, in_children, run_module, train

LONG = "x" * 256  # more than a name may have


@pytest.fixture(scope="module")
def folder(data, flags, tmp_path_factory):
    """A folder for everybody, with data, a run, and in `closed`, which is for nobody, the same; in `sealed` it is the
    configurations that nobody may read, in `weightless` the weights."""
    run = tmp_path_factory.mktemp("made") / "run"
    (child,) = train(*flags, "--steps", 2, "--run_dir", run)
    child.ok()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for place in ("", "closed", "sealed"):
            shutil.copytree(data, root / place / "data")
            shutil.copytree(run, root / place / "run")
        for config in root.glob("sealed/run/**/config.json"):
            config.chmod(0)
        shutil.copytree(run / "export", root / "weightless")
        (root / "weightless/model.safetensors").chmod(0)
        (root / "new").mkdir()
        (root / "new").chmod(0o777)
        root.chmod(0o755)
        (root / "closed").chmod(0)
        yield root
        (root / "closed").chmod(0o700)


def as_nobody(name, *arguments):
    """A command in a child that may not read everything."""

    def command(found):
        if os.geteuid() == 0:
            os.seteuid(65534)
        sys.argv = [name, *map(str, arguments)]
        if name == "train.py":
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)

    return in_children(command)[0]


NEW = "train.py --data.path {root}/data --run_dir {root}/new/run"
ACT = "vla.rollout --env tabletop --policy {root}/run/export"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("train.py --resume_from {root}/closed/run", "{root}/closed/run/config.json"),
        ("train.py --resume_from {root}/sealed/run", "{root}/sealed/run/config.json"),
        (f"{NEW} --resume_from auto --run_dir {{root}}/closed/run", "{root}/closed/run/checkpoints"),
        (f"{NEW} --run_dir {{root}}/closed/new", "{root}/closed/new/checkpoints"),
        (f"{NEW} --data.path {{root}}/closed/data", "{root}/closed/data"),
        (f"{NEW} --model.backbone {{root}}/closed/model", "{root}/closed/model"),
        (f"{NEW} --init_from {{root}}/closed/run/export", "{root}/closed/run/export/model.safetensors"),
        (f"{ACT} --policy {{root}}/closed/run/export", "{root}/closed/run/export/checkpoints"),
        (f"{ACT} --policy {{root}}/sealed/run/export", "{root}/sealed/run/export/config.json"),
        (f"{ACT} --out {{root}}/closed/it.json", "{root}/closed/it.json"),
        ("vla.export {root}/closed/run", "{root}/closed/run/config.json"),
        ("vla.collect tabletop --out {root}/closed/data", "{root}/closed/data"),
        ("vla.data info {root}/closed/data", "{root}/closed/data"),
        ("vla.checkpoints {root}/closed/run", "{root}/closed/run/config.json"),
        (f"train.py --resume_from {LONG}", f"{LONG}/config.json"),
        (f"{NEW} --run_dir {LONG}", f"{LONG}/checkpoints"),
        (f"{NEW} --data.path {LONG}", LONG),
        (f"{NEW} --model.backbone {LONG}", LONG),
        (f"{NEW} --init_from {LONG}", f"{LONG}/model.safetensors"),
        (f"{ACT} --policy {LONG}", f"{LONG}/checkpoints"),
        (f"{ACT} --out {LONG}", LONG),
        (f"{ACT} --gif {LONG}", LONG),
        (f"vla.collect tabletop --out {LONG}", f"{Path.cwd()}/{LONG}"),
        (f"vla.export {LONG}", f"{LONG}/config.json"),
        (f"vla.export {{root}}/run --out {LONG}", LONG),
        (f"vla.data info {LONG}", LONG),
        (f"vla.checkpoints {LONG}", f"{LONG}/config.json"),
    ],
)
def test_path_that_cannot_be_used_is_told_in_one_line(command, found, folder):
    child = as_nobody(*command.format(root=folder).split())
    why = "File name too long" if LONG in found else "Permission denied"
    cure = "correct its name or its permissions, or give another"
    assert child.stderr == f"error: {found.format(root=folder)} cannot be used ({why}); {cure}\n"
    assert child.code == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (f"{NEW} --init_from {{root}}/weightless", "--init_from {root}/weightless cannot be read as weights alone"),
        (
            f"{NEW} --init_from {{root}}/weightless/model.safetensors",
            "--init_from {root}/weightless/model.safetensors cannot be read as weights alone",
        ),
        (f"{ACT} --policy {{root}}/weightless", "the weights in {root}/weightless cannot be read"),
    ],
)
def test_weights_that_may_not_be_read_are_not_called_missing(command, told, folder):
    child = as_nobody(*command.format(root=folder).split())
    assert child.code == 1
    assert child.stderr.startswith(f"error: {told.format(root=folder)}")
    assert f"Permission denied: '{folder}/weightless/model.safetensors'" in child.stderr
    assert len(child.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("vla.collect tabletop --episodes 1 --workers 0 --out=~/new/data", "new/data/meta/info.json"),
        ("vla.export {root}/run --out=~/new/export", "new/export/config.json"),
        ("vla.checkpoints ~/run --export best ~/new/best", "new/best/config.json"),
        ("vla.rollout --env=tabletop --episodes=1 --policy=~/run/export --out=~/new/it.json", "new/it.json"),
        ("vla.data check ~/data --cache_dir=~/new/cache", "new/cache"),
    ],
)
def test_home_is_found_behind_an_equals_sign_by_every_command(command, made, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (child,) = run_module(*command.format(root=folder).split())
    child.ok()
    assert (folder / made).exists()


@pytest.mark.parametrize("name", ["vla.export", "vla.checkpoints"])
def test_command_of_its_own_tells_its_error_in_whatever_process_of_a_job_it_runs(name, monkeypatch):
    for variable, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    (child,) = run_module(name, "nothing")
    assert child.code == 1
    assert child.stderr.startswith("error: nothing")
