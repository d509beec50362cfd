"""The number of processes changes nothing but the speed."""

import gc
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training import (
    LAUNCH,
    ON_CPU,
    ROOT,
    after,
    at_step,
    both,
    command,
    in_children,
    last,
    rank,
    result,
    send,
    series,
    steps,
    train,
    weights,
)

from vla import InputError, evaluate, guard, log, sim
from vla.config import ModelConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.mixture import Mixture
from vla.data.stream import Samples
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy
from vla.shards import files

CONFIGS = sorted(path.name for path in (ROOT / "accelerate_configs").glob("*.yaml"))
LAYOUTS = {"1x8": (1, 8), "2x4": (2, 4), "1x2, accumulated 4 times": (1, 2), "2x2, accumulated twice": (2, 2)}


def watch(found):
    """Finds the positions and keys trained on, in order, and the weights at the end."""

    def forward(self, batch, original=VLAPolicy.forward):
        if self.training:
            found["positions"] += batch["position"].tolist()
            found["keys"] += batch["key"].tolist()
        return original(self, batch)

    def keep_weights(*_):
        found["weights"] = {name: value.numpy().copy() for name, value in policies[0].state_dict().items()}

    def begin(*_):  # what came before was not learned
        found["positions"], found["keys"] = [], []

    policies = []
    begin()
    VLAPolicy.forward = forward
    after(guard.Guard, "__init__", begin)
    after(VLAPolicy, "__init__", lambda _, policy, *rest: policies.append(policy))
    after(log.RunLog, "close", keep_weights)


@pytest.fixture(scope="module")
def layouts(flags, tmp_path_factory):
    """For each layout of a global batch of 8: the run's folder and its processes, which have found the positions
    and keys that they trained on, and the weights that they ended with.
    """

    runs = {}
    for name, (processes, micro) in LAYOUTS.items():
        run = tmp_path_factory.mktemp("layouts") / "run"
        own = ["--global_batch_size", 8, "--micro_batch_size", micro, "--run_dir", run]
        runs[name] = run, [child.ok() for child in train(*flags, *own, before=watch, processes=processes)]
    return runs


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_of_a_global_batch_is_the_same_training(layouts, layout):
    (one, (alone,)), (run, children) = layouts["1x8"], layouts[layout]
    assert result(run)["processes"] == len(children)
    for name in ("train/loss", "train/grad_norm", "eval/loss", "lr/action_head", "lr/vision_encoder/no_decay"):
        assert series(run, name) == pytest.approx(series(one, name), abs=1e-5), name
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=1e-5)
    assert result(run)["best_step"] == result(one)["best_step"]
    assert alone.found["positions"] == list(range(16 * 8))  # in order, each once


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_takes_the_same_samples_with_the_same_noise(layouts, layout):
    _, (alone,) = layouts["1x8"]
    _, children = layouts[layout]
    for step in range(16):
        per_process = 8 // len(children)
        mine = slice(step * per_process, (step + 1) * per_process)
        for name in ("positions", "keys"):
            seen = [x for child in children for x in child.found[name][mine]]
            assert sorted(seen) == sorted(alone.found[name][step * 8 : (step + 1) * 8])


def test_run_that_goes_on_with_other_numbers_of_processes_is_the_same_training(layouts, flags, tmp_path, capsys):
    whole, (alone,) = layouts["1x8"]
    run, first = tmp_path / "run", 0
    begin = [*flags, "--global_batch_size", 8, "--run_dir", run]
    for processes, stop in ((2, 3), (1, 6), (4, 9), (2, None)):
        hook = watch if stop is None else both(watch, at_step(stop, lambda: send(signal.SIGTERM)))
        children = train(*(begin if first == 0 else ["--resume_from", run]), before=hook, processes=processes)
        last, share = [child.ok() for child in children] and steps(run)[-1], 8 // processes
        for step in range(first, last):
            for name in ("positions", "keys"):
                mine = slice((step - first) * share, (step - first + 1) * share)
                seen = [x for child in children for x in child.found[name][mine]]
                assert seen == alone.found[name][step * 8 : (step + 1) * 8]
            assert all(len(child.found["positions"]) == (last - first) * share for child in children)
        first = last
    assert first == 16
    for name in ("lr/action_head", "lr/vision_encoder/no_decay"):
        assert series(run, name) == series(whole, name)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert series(run, name) == pytest.approx(series(whole, name), abs=1e-5), name
    most = max((value - weights(run)[name]).abs().max().item() for name, value in weights(whole).items())
    with capsys.disabled():
        print(f"\n2, 1, 4 and 2 processes against 1: weights differ by at most {most:.1e}")
    assert most < 1e-5


def test_all_processes_end_with_the_same_weights(layouts):
    for layout in ("2x4", "2x2, accumulated twice"):
        run, (first, second) = layouts[layout]
        assert first.found["weights"].keys() == weights(run).keys()
        for name, value in weights(run).items():
            bits = value.numpy().tobytes()
            assert first.found["weights"][name].tobytes() == second.found["weights"][name].tobytes() == bits, name


def test_only_the_last_micro_batch_of_a_step_sends_gradients(flags, tmp_path):
    def count(found):
        def reduce(state, bucket):
            found["reductions"] += 1
            found["at"].add((found["forwards"] - 1) % found["micro_batches"])
            return allreduce_hook(state, bucket)

        def forward(self, batch, original=VLAPolicy.forward):
            found["forwards"] += self.training
            return original(self, batch)

        def begin(*_):  # what came before was not learned
            found["forwards"] = found["reductions"] = 0
            found["at"] = set()

        def prepared(objects, accelerator, *_):
            found["micro_batches"] = accelerator.gradient_accumulation_steps
            objects[0].register_comm_hook(None, reduce)

        begin()
        VLAPolicy.forward = forward
        after(Accelerator, "prepare", prepared)
        after(guard.Guard, "__init__", begin)

    reductions = {}
    for micro, micro_batches in ((6, 1), (2, 3)):
        own = ["--micro_batch_size", micro, "--eval.every", 0, "--run_dir", tmp_path / f"{micro}"]
        for child in train(*flags, *own, before=count, processes=2):
            found = child.ok().found
            assert found["forwards"] == 16 * micro_batches
            assert found["at"] == {micro_batches - 1}
            reductions.setdefault(micro_batches, set()).add(found["reductions"])
    assert reductions[1] == reductions[3]
    assert min(reductions[1]) >= 16


def test_gradient_reducer_is_freed_before_the_process_group(flags, tmp_path):
    # In the other order it owns the group, whose end then waits, with the interpreter's lock, for a thread of gloo that
    # may need that lock: processes hang or abort after a good run, and the launcher kills the main one as it exports.
    def count(found):
        def end_training(self, original=Accelerator.end_training):
            found["reducers"] = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
            original(self)

        Accelerator.end_training = end_training

    for child in train(*flags, "--steps", 1, "--run_dir", tmp_path / "run", before=count, processes=2):
        assert child.ok().found["reducers"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config_says_where_and_nothing_of_the_training(name):
    lines = (ROOT / "accelerate_configs" / name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 11
    config = load_config_from_file(str(ROOT / "accelerate_configs" / name)).to_dict()
    assert "gradient_accumulation_steps" not in "\n".join(lines)
    if name[0].isdigit():
        assert config["num_processes"] == int(name.split("gpu")[0])
        assert config["mixed_precision"] == "bf16"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config_launches_training(name, flags, tmp_path):
    several = load_config_from_file(str(ROOT / "accelerate_configs" / name)).num_processes > 1
    # accelerate launches several CPU processes of a YAML for GPUs, but ignores the number with --cpu.
    where = ["--num_processes", 2, "--main_process_port", 0] if several else ["--cpu"]
    config = ["--config_file", ROOT / "accelerate_configs" / name]
    own = ["--steps", 2, "--checkpoint.every", 2, "--eval.every", 0, "--run_dir", tmp_path / "run"]
    done = command(*LAUNCH, *config, *where, "train.py", *flags, *own, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # of libraries
    assert steps(tmp_path / "run") == [2]
    assert result(tmp_path / "run")["processes"] == (2 if several else 1)
    assert bool(files(last(tmp_path / "run"), "optimizer")) == ("fsdp" in name)
    assert result(tmp_path / "run")["precision"] == ("no" if name == "cpu.yaml" else "bf16")


def test_global_batch_that_cannot_be_split_is_refused_by_every_process_in_one_line(flags, tmp_path):
    first, second = train(*flags, "--global_batch_size", 13, "--run_dir", tmp_path / "run", processes=2)
    assert (first.code, second.code) == (1, 1)
    assert (
        first.stderr
        == "error: --global_batch_size 13 cannot be split over 2 processes; 12 or 14 can; or launch 1 of them\n"
    )
    assert second.stderr == ""
    assert not (tmp_path / "run").exists()


def test_several_processes_of_a_configuration_for_one_are_refused(flags, tmp_path):
    config = ["--config_file", ROOT / "accelerate_configs/cpu.yaml", "--num_processes", 2]
    done = command(*LAUNCH, *config, "train.py", *flags, "--run_dir", tmp_path / "run")
    assert "error: several processes were asked for" in done.stderr
    assert not steps(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("use_cpu", "said"), [("true", False), ("false", True)])
def test_training_on_the_cpu_for_lack_of_a_gpu_is_said(use_cpu, said, flags, tmp_path):
    (child,) = train(*flags, "--steps", 1, "--run_dir", tmp_path / "run", env={"ACCELERATE_USE_CPU": use_cpu})
    assert ("so this trains on the CPU" in child.ok().stderr) == said


def test_precision_that_is_none_of_ours_is_refused(flags, tmp_path):
    (child,) = train(*flags, "--run_dir", tmp_path / "run", env={"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert child.stderr.startswith("error: mixed_precision is fp8; expected no, fp16 or bf16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [{1}, {0, 1}], ids=["one", "all"])
def test_error_is_told_once_by_the_process_that_meets_it(ranks, flags, tmp_path):
    def batch(self, positions, images=None, original=Samples.batch):
        if rank() in ranks and self.shuffle and min(positions) >= 36:
            raise InputError("a picture is broken")
        return original(self, positions, images)

    def hook(found):
        Samples.batch = batch

    children = train(*flags, "--run_dir", tmp_path / "run", processes=2, before=hook)
    told = [line for child in children for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert told == [f"error: {'' if 0 in ranks else 'process 1: '}a picture is broken"]
    assert [children[i].code for i in ranks] == [1] * len(ranks)


def test_launched_processes_form_one_group_or_are_refused(flags, tmp_path):
    # A YAML for GPUs on a machine without any must not let each train alone, on half the batch, into one folder.
    own = ["--run_dir", tmp_path / "run"]
    children = train(*flags, *own, processes=2, env={"ACCELERATE_USE_CPU": "false"})
    if torch.cuda.device_count() >= 2:
        assert result(tmp_path / "run")["processes"] == 2
    else:
        assert [child.code for child in children] == [1, 1]
        assert f"2 processes were launched on a machine with {torch.cuda.device_count()} GPUs" in children[0].stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("hang_seconds", "hours"), [(600, 1), (0, 24), (1e300, 24)])
def test_collectives_wait_for_the_watchdog(hang_seconds, hours, flags, tmp_path):
    def hook(found):
        def look(*_):
            backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
            found["hours"] = backend.options._timeout.total_seconds() / 3600

        after(guard.Guard, "__init__", look)

    own = ("--guard.hang_seconds", hang_seconds, "--steps", 1, "--run_dir", tmp_path / "run")
    for child in train(*flags, *own, processes=2, before=hook):
        assert child.ok().found["hours"] > hours


def test_gradient_accumulation_of_the_environment_is_refused(flags, tmp_path):
    # accelerate launch exports it from a YAML, and the Accelerator prefers it to its own argument.
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    (child,) = train(*flags, "--run_dir", tmp_path / "run", env=env)
    assert child.code == 1
    assert child.stderr.startswith("error: gradient_accumulation_steps is set to 4")
    assert not steps(tmp_path / "run")


@pytest.mark.parametrize(("limit", "processes"), [(12, 2), (7, 2), (2, 3)])
def test_evaluation_counts_each_sample_once_at_any_number_of_processes(limit, processes, data):
    def evaluated(found):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        policy, samples = untrained(data)
        found["values"] = evaluate.held_out(accelerator, policy, samples, limit, batch_size=3)
        found["again"] = evaluate.held_out(accelerator, policy, samples, limit, batch_size=3)
        batch = samples.batch([i * len(samples) // limit for i in range(limit)])
        with torch.no_grad():
            each = [policy({k: v[i : i + 1] for k, v in batch.items()})["loss"].item() for i in range(limit)]
        found["mean"] = sum(each) / limit

    (alone,) = in_children(evaluated)
    assert alone.ok().found["values"]["eval/loss"] == pytest.approx(alone.found["mean"], abs=1e-6)
    assert alone.found["values"] == alone.found["again"]
    for child in in_children(evaluated, processes):
        assert child.ok().found["values"] == pytest.approx(alone.found["values"], abs=1e-6)
        assert child.found["values"] == child.found["again"]


def test_all_processes_stop_early_at_the_same_step(flags, tmp_path):
    # Nothing is learned at a rate of 0, so the first evaluation, at step 3, stays the best.
    own = ["--optim.lr", 0, "--eval.every", 3, "--eval.patience", 2, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, processes=2)
    assert [child.code for child in children] == [0, 0]
    assert "stopped at step 9: eval/loss" in children[0].stderr
    told = result(tmp_path / "run")
    assert (told["step"], told["best_step"], told["evaluations_since_best"]) == (9, 3, 2)
    assert list(series(tmp_path / "run", "train/loss")) == list(range(1, 10))
    assert steps(tmp_path / "run") == [3, 5, 9]
    resumed = train("--resume_from", tmp_path / "run", processes=2)
    assert [child.code for child in resumed] == [0, 0]
    assert result(tmp_path / "run") == told


def test_fewer_episodes_than_processes_can_be_acted(flags, tmp_path):
    own = ["--steps", 1, "--eval.env", "tabletop", "--eval.episodes", 1, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, processes=2)
    assert [child.code for child in children] == [0, 0], children[1].stderr
    assert series(tmp_path / "run", "eval/success")[1] in (0, 1)


def test_episodes_of_all_processes_count_in_the_success_rate():
    def act(found):
        def rollout(policy, env, seeds, **_):
            found["seeds"] = list(seeds)
            return [evaluate.Episode(seed, "", success=seed % 3 == 0) for seed in seeds]

        evaluate.rollout = rollout
        policy = torch.nn.Identity()
        policy.config = SimpleNamespace(image_size=(64, 64))
        found["values"], _ = evaluate.closed_loop(Accelerator(cpu=True), policy, "tabletop", episodes=7)

    children = in_children(act, processes=2)
    seeds = sorted(seed for child in children for seed in child.ok().found["seeds"])
    assert seeds == list(range(sim.VALIDATION_SEEDS, sim.VALIDATION_SEEDS + 7))
    expected = sum(seed % 3 == 0 for seed in seeds) / 7
    assert [child.found["values"] for child in children] == [{"eval/success": expected}] * 2


def test_tiers_of_tasks_have_success_rates_of_their_own():
    def act(found):
        def rollout(policy, env, seeds, **_):
            return [evaluate.Episode(seed, "", success=seed % 3 == 0, task="abc"[seed % 4 % 3]) for seed in seeds]

        evaluate.rollout = rollout
        tiers = {"easy": ("a", "b"), "hard": ("c",), "unseen": ("d",)}
        evaluate.sim.make = lambda env: SimpleNamespace(tiers=tiers, own_process=False)
        policy = torch.nn.Identity()
        policy.config = SimpleNamespace(image_size=(64, 64))
        found["values"], _ = evaluate.closed_loop(Accelerator(cpu=True), policy, "table", episodes=13)

    seeds = range(sim.VALIDATION_SEEDS, sim.VALIDATION_SEEDS + 13)
    rates = {"eval/success": [seed % 3 == 0 for seed in seeds]}
    rates["eval/success/easy"] = [seed % 3 == 0 for seed in seeds if seed % 4 != 2]
    rates["eval/success/hard"] = [seed % 3 == 0 for seed in seeds if seed % 4 == 2]
    expected = {name: sum(each) / len(each) for name, each in rates.items()}
    assert [child.ok().found["values"] for child in in_children(act, processes=2)] == [expected] * 2


def untrained(data):
    """A policy and the samples of all episodes, in order."""
    dataset = LeRobotDataset(data)
    small = ModelConfig(
        width=32,
        attention_heads=2,
        vision_blocks=0,
        language_layers=1,
        head_layers=1,
        chunk_size=4,
        n_action_steps=2,
        flow_steps=2,
    )
    spec = DatasetSpec("set", dataset.cameras, dataset.state_names, dataset.action_names, dataset.fps)
    policy = VLAPolicy(PolicyConfig(small, dataset.cameras, dataset.image_size, (spec,)))
    samples = Samples(
        Mixture([dataset]), [dataset.episodes], policy.tokenize(dataset.instructions), 4, seed=0, shuffle=False
    )
    policy.set_statistics(samples.statistics())
    return policy, samples
