"""Does any mutated message make a decoder do something else than decode or raise PeerError, and how much memory does it take?

Bare messages (regrow.wire), and sealed ones (regrow.seal), which must never open once a byte of them is another.

Seeded, so that a finding can be repeated: flips, truncations, insertions, doubled slices and length bombs on one example of every kind.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow import wire
from regrow.errors import PeerError
from regrow.seal import Verify, open_seal, seal

# msgpack markers whose length follows: str, bin, array, map and ext of 8, 16 and 32 bit
_BOMBS = tuple(
    bytes([marker]) + b"\xff" * size
    for marker, size in ((0xD9, 1), (0xDA, 2), (0xDB, 4), (0xC6, 4), (0xDC, 2), (0xDD, 4), (0xDE, 2), (0xDF, 4), (0xC9, 4), (0xC8, 2))
)
_NUMBERS = (
    b"\xcb\x7f\xf8" + b"\0" * 6,
    b"\xcb\x7f\xf0" + b"\0" * 6,
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\0" * 7,
    b"\xc0",
    b"\xca\x7f\xc0\0\0",
)
Corpus = Mapping[str, tuple[bytes, type[wire.Message]]]


def mutate(data: bytes, rng: random.Random, *, framed: bool = True) -> bytes:
    """One to three mutations; the header's length of a frame is then mostly put right, so that the header's decoder is reached."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(body)) if body else 0
        kind = rng.randrange(6)
        if kind == 0 and body:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and body:
            body[at] = rng.randrange(256)
        elif kind == 2:
            del body[at:]
        elif kind == 3:
            body[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 4:
            body[at:at] = body[at : at + rng.randint(1, 40)]
        else:
            bomb = rng.choice(_BOMBS + _NUMBERS)
            body[at : at + rng.choice((1, len(bomb)))] = bomb
    if framed and len(body) >= 8 and rng.random() < 0.8:
        body[:4] = data[:4]
        body[4:8] = (len(body) - 8).to_bytes(4, "little")
    return bytes(body)


def mutations(corpus: Corpus, count: int, seed: int) -> Iterator[tuple[str, bytes, type[wire.Message]]]:
    """(name of the example, mutated bytes, expected kind), the same for the same seed."""
    rng = random.Random(seed)
    names = sorted(corpus)
    for index in range(count):
        name = names[index % len(names)]
        data, kind = corpus[name]
        yield name, mutate(data, rng), kind


def fuzz(corpus: Corpus, count: int, seed: int) -> dict[str, Any]:
    """Counts of what happened. Anything but PeerError escapes: that is the finding."""
    outcomes: Counter[str] = Counter()
    for _, data, kind in mutations(corpus, count, seed):
        try:
            wire.decode(data, kind)
            outcomes["decoded"] += 1
        except PeerError:
            outcomes["refused"] += 1
    return dict(outcomes)


def fuzz_seals(corpus: Mapping[str, bytes], count: int, seed: int, *, topic: str, keys: Sequence[bytes], verify: Verify) -> dict[str, Any]:
    """Counts of what happened to mutated seals; one that opens although it is not what was sealed is the finding."""
    outcomes: Counter[str] = Counter(unchanged=0, refused=0)
    rng = random.Random(seed)
    names = sorted(corpus)
    for index in range(count):
        data = corpus[names[index % len(names)]]
        changed = mutate(data, rng, framed=False)
        try:
            open_seal(topic, changed, keys, verify)
            outcomes["unchanged" if changed == data else "forged"] += 1
        except PeerError:
            outcomes["refused"] += 1
    return dict(outcomes)


def _verify(key: bytes, data: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="mutated messages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=here / "results" / "fuzz_wire.json", help="where the JSON goes (default: bench/results/fuzz_wire.json)"
    )
    options = parser.parse_args()
    sys.path[:0] = [str(here), str(here.parent)]  # a script, but its corpus is the tests' golden messages
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from machine import write_result  # type: ignore[import-not-found, unused-ignore]  # beside this script, as for the other benches

    from tests.golden.examples import EXAMPLES

    corpus = {name: (wire.encode(message, payload), type(message)) for name, (message, payload) in EXAMPLES.items()}
    started = time.perf_counter()
    outcomes = fuzz(corpus, options.count, options.seed)
    seconds = time.perf_counter() - started
    private = Ed25519PrivateKey.from_private_bytes(bytes(32))
    key = private.public_key().public_bytes_raw()
    seals = {name: seal("fuzz", data, stamp=1, expires_s=0, key=key, sign=private.sign) for name, (data, _) in corpus.items()}
    count = options.count // 10  # a signature costs a hundred times a header
    tracemalloc.start()
    fuzz(corpus, min(options.count, 100_000), options.seed + 1)
    figures = {
        "count": options.count,
        "seed": options.seed,
        "outcomes": outcomes,
        "seals": {"count": count, "outcomes": fuzz_seals(seals, count, options.seed, topic="fuzz", keys=[key], verify=_verify)},
        "messages_per_s": round(options.count / seconds),
        "peak_traced_bytes": tracemalloc.get_traced_memory()[1],
        "max_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    write_result(options.out, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
