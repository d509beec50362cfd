"""The benchmarks run against the library as it is now."""

import sys

from training import ROOT, command


def test_benchmarks_find_what_they_import():
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import {', '.join(names)}"
    assert len(names) > 8
    done = command(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
