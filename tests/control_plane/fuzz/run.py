"""Fuzz for as long as one likes: ``python tests/control_plane/fuzz/run.py [TARGET ...] [--seconds 60]``.

With atheris where it is installed (it is guided by the code that an input reaches), else by changing seeds at random. What fails is
written to ``tests/control_plane/data/fuzz/TARGET/``, where the tests take it up from then on.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import subprocess
import sys
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def instrumented() -> AbstractContextManager[object]:
    """Modules that are imported within tell atheris where an input leads; for that it must be their first import."""
    if "--one" not in sys.argv:
        return nullcontext()
    import atheris

    made: AbstractContextManager[object] = atheris.instrument_imports(include=["control_plane"])
    return made


with instrumented():
    import fuzz_targets
    from fuzz_targets import SEEDS
    from other_parsers import PEERS

TARGETS = {**fuzz_targets.TARGETS, **PEERS}
KEPT = Path(__file__).resolve().parents[1] / "data" / "fuzz"
#: what a change may put in
WORDS = b"\r\n|\n|:| |0|content-length|chunked|\x00|\xff|{|}|data: |\n\n|HTTP/1.1 200 OK\r\n".split(b"|")


def keep(target: str, data: bytes) -> Path:
    folder = KEPT / target
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def changed(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of the usual changes."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(made))
        match rng.randrange(6):
            case 0:
                made[at:at] = rng.choice(WORDS)
            case 1:
                del made[at : at + rng.randint(1, 8)]
            case 2 if made:
                made[at % len(made)] = rng.randrange(256)
            case 3:
                start = rng.randint(0, len(other))
                made[at:at] = other[start : start + rng.randint(1, 40)]
            case 4:
                made[at:at] = made[at : at + rng.randint(1, 60)]
            case 5:
                made[at:at] = b"%d" % rng.choice((0, 1, 5, 255, 65536, 2**31, 10**19))
    return bytes(made[:5000])


async def run_plain(target: str, seconds: float, seed: int) -> tuple[int, Path | None]:
    """(inputs tried, where the failing one was kept)."""
    rng, tried, pool = random.Random(seed), 0, list(SEEDS[target])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = changed(rng.choice(pool), rng.choice(pool), rng)
        tried += 1
        try:
            TARGETS[target](data)
        except Exception:
            traceback.print_exc()
            return tried, keep(target, data)
        if rng.random() < 0.02 and len(pool) < 500:
            pool.append(data)
        if tried % 1000 == 0:
            await asyncio.sleep(0)
    return tried, None


def run_atheris(target: str, seconds: float) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    loop = asyncio.new_event_loop()

    def one(data: bytes) -> None:
        async def within() -> None:
            TARGETS[target](data)

        loop.run_until_complete(within())

    corpus = Path(__file__).resolve().parents[3] / "build" / "fuzz" / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    (KEPT / target).mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={int(seconds)}",
        "-max_len=4096",
        f"-artifact_prefix={KEPT / target}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the plain fuzzer")
    parser.add_argument("--plain", action="store_true", help="change seeds at random even where atheris is installed")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        given.plain = True
    if given.one:
        run_atheris(given.targets[0], given.seconds)
    failed = False
    for target in given.targets:
        if given.plain:
            tried, path = asyncio.run(run_plain(target, given.seconds, given.seed))
            print(f"{target}: {tried:,} inputs in {given.seconds:g} s, {f'one failed: {path}' if path else 'none failed'}")
            failed |= path is not None
        else:
            command = [sys.executable, __file__, target, "--seconds", str(given.seconds), "--one"]
            done = subprocess.run(command, check=False)
            print(f"{target}: atheris ended with {done.returncode}")
            failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
