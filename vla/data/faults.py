"""What can be wrong with a data set, in one form: found by opening and by checking it, told in the same words."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vla import InputError

SHOWN = 10  # faults that an error names
# Faults that may leave the data usable, so that they can be accepted with --data.accept.
ACCEPTABLE = ("constant_action", "shared_instruction", "video_gap", "other_split")


@dataclass(frozen=True)
class Fault:
    """One fault: where, and what was found and expected.

    file: relative to the data set's folder. text: found and expected. episodes: numbers of the episodes concerned,
    which can be left out; empty: nothing has to be; None: the whole data set is concerned. kind: one of ACCEPTABLE, or
    "unreadable" where the pictures of these episodes cannot be found.
    """

    file: str
    text: str
    episodes: tuple[int, ...] | None = None
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {_named(self.episodes)}{self.text}"


def _named(episodes: tuple[int, ...] | None) -> str:
    if not episodes:
        return ""
    first, last = episodes[0], episodes[-1]
    if len(episodes) == 1:
        return f"episode {first}: "
    if episodes == tuple(range(first, last + 1)):
        return f"episodes {first} to {last}: "
    return f"episodes {', '.join(map(str, episodes[:5]))}{' …' if len(episodes) > 5 else ''}: "


def left_out(root: Path, faults: Iterable[Fault], accept: tuple[str, ...], skip_bad: bool) -> list[int]:
    """Numbers of the episodes to leave out, ascending: none if nothing is wrong.

    Raises InputError with the first faults unless each of them is accepted or, with skip_bad, lies in some episodes.
    """
    faults = [fault for fault in faults if fault.kind not in accept]
    hard = [fault for fault in faults if fault.episodes is None] if skip_bad else faults
    if hard:
        found = f"a fault: {hard[0]}: "
        if len(hard) > 1:
            more = f"  … and {len(hard) - SHOWN} more\n" if len(hard) > SHOWN else ""
            found = f"{len(hard)} faults:\n" + "".join(f"  {fault}\n" for fault in hard[:SHOWN]) + more
        cures = ["mend what is wrong"]
        if not skip_bad and all(fault.episodes is not None for fault in hard):
            episodes = len({episode for fault in hard for episode in fault.episodes})
            what = f"leave out {episodes} episode{'s' if episodes > 1 else ''}" if episodes else "train on all the same"
            cures.append(f"give --data.skip_bad to {what}")
        if kinds := sorted({fault.kind for fault in hard} & set(ACCEPTABLE)):
            cures.append(f"accept it with --data.accept {' '.join(kinds)}")
        raise InputError(f"{root} has {found}{', or '.join(cures)} (python -m vla.data check {root} lists all)")
    return sorted({episode for fault in faults for episode in fault.episodes})
