"""Train vision-language-action policies.

Data flows down: stream → data set → policy → loss → checkpoint → export → rollout.
"""

import contextlib
import os
import sys
import threading
import time

# Read once, when torch starts: threads that spin while they wait take the cores of a busy CPU from those they wait for.
# Steps were 4 times slower (docs/RESULTS.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

FAILED = threading.Event()  # set by the error that ends this process: a signal after it is no reason to start again


class InputError(ValueError):
    """Wrong input, told in one line: what was found, what was expected, and the flag or file to change."""


class NotSaved(OSError):
    """A checkpoint that could not be written, without which the run does not go on."""


def in_one_line(error: BaseException) -> str:
    """Its kind, which an InputError needs not say, and the first line of its text."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, InputError) else ": ".join(filter(None, (type(error).__name__, line)))


def flush(path: str | os.PathLike) -> None:
    """Have the disk keep a file's content, or the names in a folder, whatever happens to the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def told(together: bool = False):
    """Around a command: wrong input, or a file that cannot be used, ends it with one line and exit code 1.

    together: launched processes run it as one, and say once what all of them have met.
    """
    try:
        yield
    except (InputError, NotSaved, FloatingPointError) as error:
        tell(error, together)
    except OSError as failure:
        if failure.filename is None:
            raise
        why, cure = failure.strerror, "correct its name or its permissions, or give another"
        tell(InputError(f"{failure.filename} cannot be used ({why}); {cure}"), together)
    else:
        return
    sys.exit(1)


def tell(error: Exception, together: bool) -> None:
    """Print an error in one line; once if processes have met the same together, with its number if one other has."""
    from tqdm import tqdm

    FAILED.set()
    rank = int(os.environ.get("RANK", 0)) if together else 0
    first = not together or os.environ.get("LOCAL_RANK", "0") == "0"
    grouped = "torch" in sys.modules and (torch := sys.modules["torch"]).distributed.is_initialized()
    time.sleep(1 if rank else 0)  # so that the main process says what all have met
    if grouped:  # else all of a machine read the same files
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            first = True
            store = torch.distributed.distributed_c10d._get_default_store().clone()  # no collective waits in it
            first = store.add(f"error/{error}", 1) == 1
    if first:  # on a line of its own, above a progress bar
        tqdm.write(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
    if grouped and rank == 0:
        time.sleep(2)  # the store may be kept here, and others are asking it
