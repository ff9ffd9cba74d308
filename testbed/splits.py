"""Who holds which examples: a data set dealt to clients as index arrays, and each client's held-out part.

    iid             a random permutation cut into equal parts
    dirichlet:0.3   equal parts whose label distributions are drawn from a Dirichlet distribution
    user            natural users, shuffled and dealt in turn, whole, to the clients
    shards:2        sorted by label, cut into clients x 2 equal shards, 2 random shards to each client

Every kind is complete and disjoint (each example goes to exactly one client), a function of its arguments and the seed
alone, and gives ascending indices. "Equal" means that sizes differ by at most one (per shard, for shards).

Sources: shards, McMahan et al., arXiv 1602.05629, section 3. dirichlet, Hsu et al., arXiv 1909.06335, section 3: client i
draws q_i ~ Dir(alpha p), p the labels' overall distribution, and examples of its equal share by q_i without replacement.
It is not the variant of Yurochkin et al. (arXiv 1905.12022), which draws every *class's* distribution over the clients and
so makes sizes uneven. Differs from Hsu: p is scaled to mean 1 over the labels that occur, so that with balanced labels
`dirichlet:0.3` is the symmetric Dir(0.3, ..., 0.3), as the field's code reads that number; and all clients draw at the
same time, those wanting an exhausted label redrawing among the others, where drawing one client after the other would
leave all leftovers to the last. As everything must be dealt, the labels held are somewhat less skewed than q_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError, UsageError
from testbed.datasets import Dataset

KINDS = ("iid", "dirichlet", "user", "shards")
_ALPHA_MIN, _ALPHA_MAX = 1e-3, 1e6  # beyond, NumPy's draws degenerate and the split says nothing new
_SPLIT, _VALIDATION = 1, 2  # random streams of one seed

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A kind of split with its number: alpha of `dirichlet`, shards per client of `shards`, otherwise None.

    Raises:
        LocalError: an unknown kind, or a number that is missing, superfluous or out of range.
    """

    kind: str
    alpha: float | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"split {self.kind!r} is none of iid, dirichlet:ALPHA, user, shards:COUNT")
        if (self.alpha is not None) != (self.kind == "dirichlet") or (self.shards is not None) != (self.kind == "shards"):
            raise UsageError(f"split {self.kind!r}: alpha belongs to dirichlet and shards to shards; write dirichlet:0.3 or shards:2")
        if self.alpha is not None and not _ALPHA_MIN <= self.alpha <= _ALPHA_MAX:
            raise UsageError(f"split dirichlet: alpha {self.alpha} is not in {_ALPHA_MIN:g}..{_ALPHA_MAX:g}")
        if self.shards is not None and self.shards < 1:
            raise UsageError(f"split shards: {self.shards} shards per client; give 1 or more")

    def __str__(self) -> str:
        """What `parse_split` reads."""
        number = self.alpha if self.alpha is not None else self.shards
        return self.kind if number is None else f"{self.kind}:{number}"


def parse_split(text: str) -> Split:
    """The split that `iid`, `dirichlet:ALPHA`, `user` or `shards:COUNT` names.

    Raises:
        LocalError: anything else.
    """
    kind, colon, number = text.partition(":")
    if kind == "dirichlet":
        try:
            return Split(kind, alpha=float(number))
        except ValueError as error:
            raise UsageError(f"split {text!r}: write dirichlet:ALPHA, for example dirichlet:0.3") from error
    if kind == "shards":
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise UsageError(f"split {text!r}: write shards:COUNT, for example shards:2")
        return Split(kind, shards=int(number))
    if colon and kind in KINDS:
        raise UsageError(f"split {text!r}: {kind} takes no number")
    return Split(kind)


def split(dataset: Dataset, clients: int, kind: Split | str, seed: int, *, min_examples: int = 10) -> list[Indices]:
    """Each client's examples: `clients` ascending int64 index arrays, disjoint, together all of the data set.

    Args:
        dataset: what to deal; `user` needs its natural users.
        clients: how many, >= 1.
        kind: a Split, or its text (see `parse_split`).
        seed: >= 0; the only source of randomness.
        min_examples: the fewest that a client may get, >= 1.

    Raises:
        LocalError: too few examples or users for so many clients, or arguments out of range.
    """
    how = parse_split(kind) if isinstance(kind, str) else kind
    if clients < 1 or min_examples < 1:
        raise UsageError(f"{clients} clients with at least {min_examples} examples each: both must be 1 or more")
    if len(dataset.y) < clients * min_examples:
        cure = f"take fewer clients, {max(len(dataset.y) // min_examples, 1)} at most"
        raise LocalError(f"{dataset.name} has {len(dataset.y)} examples, {clients} clients need {min_examples} each: {cure}")
    if not dataset.classes and how.kind in ("dirichlet", "shards"):
        raise LocalError(f"split {how}: goes by class labels, and the targets of {dataset.name} are values; take iid or user")
    rng = _rng(seed, _SPLIT)
    if how.kind == "user":
        parts = _by_user(dataset, clients, rng)
    elif how.shards is not None:
        parts = _by_shards(dataset, clients, how.shards, rng)
    elif how.alpha is not None:
        parts = _dirichlet(dataset.y, clients, how.alpha, rng)
    else:
        parts = np.array_split(rng.permutation(len(dataset.y)), clients)
    for client, part in enumerate(parts):
        if len(part) < min_examples:
            cure = "take fewer clients or another seed or split"
            raise LocalError(f"{how} of {dataset.name} gives client {client} {len(part)} examples, not {min_examples}: {cure}")
    return [np.sort(part).astype(np.int64) for part in parts]


def train_validation(
    indices: list[Indices], fraction: float, seed: int, part: NDArray[np.int64] | None = None
) -> list[tuple[Indices, Indices]]:
    """Each client's indices as (training, validation), both ascending, disjoint, nothing lost.

    A client with one example trains on it. Every other client gets at least one example of each, unless fraction is 0 or
    `part` says otherwise. The draw of a client depends on the seed, its position and its own indices alone.

    Args:
        indices: what `split` returned; no array empty.
        fraction: of a client's examples to hold out, 0 <= fraction < 1, rounded; not used where `part` is given.
        seed: >= 0.
        part: the data set's own (Dataset.part), 0 training and 1 validation. Pass it whenever the data set has one:
            windows of the watch data overlap, and a random choice would validate on what was trained on. A client's
            validation part may then be empty.

    Raises:
        LocalError: a client without a training example, or arguments out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"validation fraction {fraction} is not in [0, 1)")
    both = []
    for client, own in enumerate(indices):
        if part is not None:
            held_out = part[own] == 1
        else:
            count = min(max(round(fraction * len(own)), 1 if fraction else 0), max(len(own) - 1, 0))
            held_out = np.zeros(len(own), bool)
            held_out[_rng(seed, _VALIDATION, client).permutation(len(own))[:count]] = True
        if held_out.all():
            raise LocalError(f"client {client} has no training example: take fewer clients or another seed")
        both.append((np.sort(own[~held_out]), np.sort(own[held_out])))
    return both


def _rng(seed: int, *stream: int) -> np.random.Generator:
    if seed < 0:
        raise UsageError(f"seed {seed} is negative: give a whole number from 0")
    return np.random.default_rng([seed, *stream])


def _by_user(dataset: Dataset, clients: int, rng: np.random.Generator) -> list[Indices]:
    if dataset.user is None:
        raise LocalError(f"{dataset.name} has no natural users: take iid, dirichlet:ALPHA or shards:COUNT")
    users, position = np.unique(dataset.user, return_inverse=True)
    if len(users) < clients:
        raise LocalError(f"{dataset.name} has {len(users)} users for {clients} clients: take at most {len(users)} clients")
    client_of_user = rng.permutation(len(users)) % clients
    return _group(client_of_user[position], clients)


def _by_shards(dataset: Dataset, clients: int, shards: int, rng: np.random.Generator) -> list[Indices]:
    if len(dataset.y) < clients * shards:
        raise LocalError(f"{dataset.name} has {len(dataset.y)} examples for {clients} x {shards} shards: take fewer of either")
    # Shuffled first: within a label a shard must not inherit the file's order, which may be by user.
    order = rng.permutation(len(dataset.y))
    order = order[np.argsort(dataset.y[order], kind="stable")]
    pieces = np.array_split(order, clients * shards)
    deal = rng.permutation(clients * shards).reshape(clients, shards)
    return [np.concatenate([pieces[piece] for piece in row]) for row in deal]


def _dirichlet(y: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Source: Hsu et al., arXiv 1909.06335; the module's text says what differs."""
    labels, position, stock = np.unique(y, return_inverse=True, return_counts=True)
    wanted = rng.dirichlet(alpha * len(labels) * stock / stock.sum(), clients)  # q_i, float64 [clients, labels]
    sizes = np.full(clients, len(y) // clients)
    sizes[: len(y) % clients] += 1
    held = _deal(wanted, sizes, stock, rng)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label in range(len(labels)):
        members = rng.permutation(np.flatnonzero(position == label))
        for own, piece in zip(parts, np.split(members, np.cumsum(held[:, label])[:-1]), strict=True):
            own.append(piece)
    return [np.concatenate(own) for own in parts]


def _deal(wanted: NDArray[np.float64], sizes: Indices, stock: Indices, rng: np.random.Generator) -> Indices:
    """How many examples of each label each client holds: int64 [clients, labels], rows sum to sizes, columns to stock.

    Each pass every client draws what it lacks by `wanted`, and a label that is asked for beyond its stock goes to a
    random part of the asking draws. A pass that leaves something missing exhausts a label, so they are few.
    """
    held = np.zeros(wanted.shape, np.int64)
    left = stock.astype(np.int64)
    while left.any():
        weights = np.where(left > 0, wanted, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        # Of a client that has no wish left (its draw was all on exhausted labels), what remains decides.
        chances = np.where(total > 0, weights / np.where(total > 0, total, 1.0), left / left.sum())
        asked = rng.multinomial(sizes - held.sum(axis=1), chances)
        for label in np.flatnonzero(asked.sum(axis=0) > left):
            asked[:, label] = rng.multivariate_hypergeometric(asked[:, label], int(left[label]))
        held += asked
        left -= asked.sum(axis=0)
    return held


def _group(client: Indices, clients: int) -> list[Indices]:
    """The positions of each client's number."""
    order = np.argsort(client, kind="stable")
    return np.split(order, np.cumsum(np.bincount(client, minlength=clients))[:-1])
