"""What a run is judged by: its evaluations, which of them was the best, and when it stops for want of a better one."""

import contextlib
import math
from collections.abc import Callable

from accelerate import Accelerator

from vla import evaluate, rollout, sim
from vla.config import EvalConfig
from vla.data.stream import Samples
from vla.log import RunLog
from vla.model.policy import VLAPolicy
from vla.optim import EMA


class Judge:
    """Evaluates the averaged weights and keeps what it found in the state of the run, which checkpoints have.

    Its keys of the state are `best` and `best_step`; `evaluations_since_best`; `evaluated`, the step of the last
    evaluation, and its `score`: the lower the better, None if it was not finite; and what they were found by: `metric`
    (None if the run evaluates nothing) and `judged_on`.
    samples: held out. batch_size: of each process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: VLAPolicy,
        ema: EMA | None,
        samples: Samples,
        config: EvalConfig,
        batch_size: int,
    ):
        self.accelerator, self.policy, self.ema = accelerator, policy, ema
        self.samples, self.config, self.batch_size = samples, config, batch_size
        self.metric = config.metric if len(samples) or config.env else None
        acted, looked_at = [config.env, config.dataset, config.episodes], [min(config.samples, len(samples))]
        self.measure = {"metric": self.metric, "judged_on": acted if self.metric == "success" else looked_at}
        found = dict.fromkeys(("best", "best_step", "evaluated", "score"))
        self.unjudged = self.measure | found | {"evaluations_since_best": 0}

    def adopt(self, saved: dict) -> dict:
        """The saved state; as if nothing had been evaluated if that was by another measure, which tells nothing."""
        return saved if saved | self.measure == saved else saved | self.unjudged

    def forgotten(self, saved: dict) -> str:
        """A warning, if the saved state has a best that `adopt` drops; else nothing."""
        if saved["best_step"] is None or self.adopt(saved) is saved:
            return ""
        before, now = (_by(measure["metric"], measure.get("judged_on", [])) for measure in (saved, self.measure))
        return (
            f"warning: this run was judged by {before}, and is now by {now}: the best so far, of step "
            f"{saved['best_step']}, is no longer kept, and its export will be replaced; stop and export it elsewhere "
            f"first (python -m vla.export RUN/checkpoints/step_{saved['best_step']:08d} --out FOLDER) if it is wanted"
        )

    def evaluate(self, state: dict, step: int, log: RunLog, go_on: Callable[[], bool]) -> bool | None:
        """Evaluate, log, put the score into the state; true if it is the best so far, None if `go_on()` was false.

        Every process calls this, and all find the same: values are reduced.
        """
        config, values = self.config, {}
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            if len(self.samples):
                arguments = self.accelerator, self.policy, self.samples, config.samples, self.batch_size, go_on
                values = evaluate.held_out(*arguments)
            if config.env and values is not None:
                place = self.policy.config.place(self.policy.driven.name)
                drawn = self.samples.mixture.datasets[place].largest_side
                success, recorded = evaluate.closed_loop(
                    self.accelerator, self.policy, config.env, config.episodes, drawn, go_on=go_on
                )
                values = None if success is None else values | success
        if values is None:
            return None
        state["evaluated"] = step
        if self.metric is None:
            return False
        if config.env and self.accelerator.is_main_process:
            log.video(step, "rollout", rollout.grid(recorded), rollout.film_fps(sim.make(config.env).fps))
        log.metrics(step, values)
        value, sign = values[f"eval/{self.metric}"], -1 if self.metric == "success" else 1
        state["score"] = sign * value if math.isfinite(value) else None
        better = state["best"] is None or sign * value < sign * state["best"] - config.min_delta
        if better and math.isfinite(value):
            state.update(best=value, best_step=step, evaluations_since_best=0)
            return True
        state["evaluations_since_best"] += 1
        return False

    def out_of_patience(self, state: dict) -> bool:
        return 0 < self.config.patience <= state["evaluations_since_best"]


def _by(metric: str | None, judged_on: list) -> str:
    if metric is None:
        return "nothing"
    what = "episodes" if metric == "success" else "samples"
    return f"eval/{metric} of {', '.join(str(part) for part in judged_on if part)} {what}"
