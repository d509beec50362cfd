"""Draw docs/demo.png from a run: its loss, its success, and frames of its rollouts (needs matplotlib).

    python docs/figure.py runs/demo docs/demo.png

The GIF beside it is what `python -m vla.rollout --gif` wrote.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image


def main(run: Path, out: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = json.loads((run / "rollout.json").read_text())

    def series(name: str, unit: float = 1) -> tuple[list, list]:
        found = [(line["step"], unit * line[name]) for line in lines if name in line]
        return [step for step, _ in found], [value for _, value in found]

    figure, (losses, successes, pictures) = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1.1, 1.1, 1))
    losses.plot(*series("train/loss"), color="#9ab", linewidth=1, label="training batch")
    losses.plot(*series("eval/loss"), "o-", color="#c43", label="held-out episodes (EMA)")
    losses.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    losses.legend(frameon=False)
    steps, values = series("eval/success", 100)
    successes.plot(steps, values, "o-", color="#294", label="during training, 20 scenes")
    low, high = (100 * edge for edge in final["interval"])
    rate = 100 * final["success_rate"]
    successes.errorbar([steps[-1]], [rate], [[rate - low], [high - rate]], fmt="s", color="#111", capsize=4)
    successes.annotate(f"{rate:.0f} % of {final['episodes']} new scenes", (steps[-1], rate), (-4, -90), ha="right",
                       textcoords="offset points")  # fmt: skip
    successes.set(xlabel="optimizer step", ylabel="success, %", ylim=(-3, 103), title="Success in closed loop")
    successes.legend(frameon=False, loc="lower right")
    with Image.open(run / "rollout.gif") as gif:
        gif.seek(gif.n_frames // 4)
        pictures.imshow(np.asarray(gif.convert("RGB")))
    pictures.set_axis_off()
    for axis in (losses, successes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
