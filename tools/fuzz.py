"""Fuzz the readers of foreign bytes: ``python tools/fuzz.py --minutes 10 [reader ...]``; findings go to tests/corpus."""

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.foreign import READERS, keep  # type: ignore[import-not-found] # of the tests

SLOW_S = 5.0
"""Seconds of one input above which it is kept, too."""


def fuzz(name: str, *, seconds: float, seed: int) -> int:
    """Read spoiled seeds for some time; return the number of findings."""
    started, count, kinds = time.monotonic(), 0, set()
    for data in READERS[name].mutants(seed=seed):
        if time.monotonic() - started > seconds:
            break
        count += 1
        began = time.monotonic()
        try:
            READERS[name].check(data)
            kind = f"slow ({len(data)} bytes)" if time.monotonic() - began > SLOW_S else None
        except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:100]!r}"
        if kind is not None and kind.split(":")[0] not in kinds:
            kinds.add(kind.split(":")[0])
            sys.stdout.write(f"{name}: {kind}, kept as {keep(name, data)}\n")
    sys.stdout.write(f"{name}: {count} inputs, {len(kinds)} kinds of findings\n")
    return len(kinds)


def main() -> int:
    """Fuzz the chosen readers; return the number of kinds of findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="reader", help=f"of {', '.join(READERS)}; all, if none is given")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    names = options.readers or list(READERS)
    return sum(fuzz(name, seconds=60 * options.minutes, seed=options.seed) for name in names)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
