"""Random splits of a data set, stratified by class, with groups of images kept together.

The algorithm is iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the
stratification of multi-label data"): the class with the fewest remaining groups is distributed
first, each of its groups to the part that lacks most images of this class. An image with objects of
several classes is therefore placed by its rarest class. There are three differences:

- Groups are placed instead of images, large ones first.
- A part that has too few images so far gets more images of the next class. Otherwise, rounding
  errors of many small classes would add up.
- The last groups of a class are reserved for parts that have none. If a class is still missing from
  a part, because its groups were placed by rarer classes, groups are exchanged and, in small data
  sets, other random orders are tried.
"""

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

# Class of the images without classes, so that they are distributed too.
NO_CLASS = ""

TRAIN, VAL, TEST = "train", "val", "test"

# With up to _SMALL groups, several random orders are tried, and the first with the fewest classes
# that are missing from a part is used.
_SMALL = 500
_ATTEMPTS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Options of a split.

    Attributes:
        val: Fraction of the images in "val"; ignored if `folds` is given.
        test: Fraction of the images in "test".
        folds: Number of equal parts "fold0", "fold1", ..., instead of "train" and "val". A group
            that is the only one of a class is in "train", that is, in no fold.
        seed: Random seed. The result depends on it and on the file names, but not on their order.
        group_by: Regular expression. Images are in one group if its first group, or its match if it
            has no groups, is the same in their names. If empty, each image is a group.
    """

    val: float = 0.2
    test: float = 0.0
    folds: int = 0
    seed: int = 0
    group_by: str = ""

    def __post_init__(self) -> None:
        if self.folds and (self.folds < 2 or not 0 <= self.test < 1):
            raise UserError(
                f"--folds is {self.folds} and --test is {self.test}; expected two or more folds, "
                "and a fraction below 1."
            )
        if not self.folds and not (
            0 < self.val < 1 and self.test >= 0 and self.val + self.test < 1
        ):
            raise UserError(
                f"--val is {self.val} and --test is {self.test}; expected fractions whose sum is "
                "below 1, such as 0.2 and 0.1."
            )

    def fractions(self) -> dict[str, float]:
        """Return the fraction of the images in each part, except in "train" with folds."""
        if self.folds:
            parts = {f"fold{i}": (1 - self.test) / self.folds for i in range(self.folds)}
        else:
            parts = {TRAIN: 1 - self.val - self.test, VAL: self.val}
        return parts | ({TEST: self.test} if self.test else {})


def split_images(classes: Mapping[str, Collection[str]], split: Split) -> dict[str, str]:
    """Assign each image to a part.

    A class with a single group is in "train". A class with two or more is also in "val" or, with
    folds, in two or more folds, unless groups with several classes make this impossible. This has
    priority over the fractions.

    Args:
        classes: Names of each image's classes, by file name.
        split: Options of the split.

    Returns:
        The name of the part, by file name.

    Raises:
        UserError: If the pattern for groups is invalid, or a part would be empty.
    """
    parts = split.fractions()
    names = list(parts)
    levels = [list(range(split.folds))] if split.folds else [[0], [1]]
    if split.test:
        levels.append([len(names) - 1])
    groups = _groups(classes, split.group_by)
    # In a fold, the only group of a class would be evaluated without training on this class.
    single = _single_classes(groups) if split.folds else set()
    kept = [group for group in groups if not single.intersection(group.counts)]
    attempts = (
        _Allocation(_shuffled(kept, f"{split.seed} {attempt}"), list(parts.values()), levels)
        for attempt in range(1 if len(kept) > _SMALL else _ATTEMPTS)
    )
    best = next(attempts)
    while best.missing(best.totals) and (other := next(attempts, None)):
        best = min(best, other, key=lambda allocation: allocation.missing(allocation.totals))
    part_of = dict.fromkeys(classes, TRAIN)
    for group, part in zip(best.groups, best.part_of, strict=True):
        part_of.update(dict.fromkeys(group.names, names[part]))
    empty = sorted(set(parts).difference(part_of.values()))
    if empty:
        raise UserError(
            f"The {len(classes)} images in {len(groups)} groups leave no images for "
            f"{first_of(empty)}; expected more groups than parts, and two or more per class. Use "
            "fewer parts or smaller groups, or add images."
        )
    return part_of


@dataclass
class _Group:
    """Images that are kept together, and the number of images of each class."""

    names: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def _groups(classes: Mapping[str, Collection[str]], pattern: str) -> list[_Group]:
    keys = _group_keys(classes, pattern)
    groups: dict[str, _Group] = defaultdict(_Group)
    for name in sorted(classes):
        group = groups[keys[name]]
        group.names.append(name)
        group.counts.update(set(classes[name]) or {NO_CLASS})
    return list(groups.values())


def _shuffled(groups: list[_Group], seed: str) -> list[_Group]:
    """Return the groups in a random order that depends only on the seed and their names."""

    # In contrast to random generators, hashes are the same in all versions of all libraries.
    def key(group: _Group) -> bytes:
        return hashlib.sha256(f"{seed} {group.names[0]}".encode(errors="surrogateescape")).digest()

    return sorted(groups, key=key)


def _group_keys(names: Iterable[str], pattern: str) -> dict[str, str]:
    """Return the group of each file name.

    Raises:
        UserError: If the pattern is invalid or matches none of the names.
    """
    names = list(names)
    if not pattern:
        return {name: name for name in names}
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--group-by is {pattern!r}, which is not a regular expression: {error}. Expected a "
            "pattern of Python's re module, such as '^(.*)_frame'."
        ) from error
    keys, others = {}, []
    for name in names:
        match = expression.search(name)
        found = match[1 if expression.groups else 0] if match else None
        # A slash at the end distinguishes a group from the file name of an image without group.
        keys[name] = name if found is None else f"{found}/"
        others += [name] if found is None else []
    if len(others) == len(names):
        raise UserError(
            f"--group-by is {pattern!r}, which matches none of the {len(names)} file names: "
            f"{first_of(others, 3)}. Expected a regular expression of a part of these names."
        )
    if others:
        logger.warning(
            "--group-by %r doesn't match %d of %d file names, which are not grouped: %s",
            pattern,
            len(others),
            len(names),
            first_of(others, 3),
        )
    return keys


def _single_classes(groups: list[_Group]) -> set[str]:
    """Return the classes that are in a single group."""
    numbers = Counter(name for group in groups for name in group.counts)
    return {name for name, number in numbers.items() if number == 1}


class _Allocation:
    """Assignment of groups to parts.

    Attributes:
        part_of: Index of the part of each group; -1 if it has not been assigned.
        totals: Number of images of each class.
    """

    def __init__(self, groups: list[_Group], fractions: list[float], levels: list[list[int]]):
        """
        Args:
            groups: Groups in random order.
            fractions: Fraction of the images in each part.
            levels: Parts in the order in which they get the groups of a class that has fewer groups
                than there are parts.
        """
        self.groups = groups
        self.fractions = fractions
        self.levels = levels
        self.part_of = [-1] * len(groups)
        self.totals: Counter[str] = Counter()
        self._members: dict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            self.totals.update(group.counts)
            for name in group.counts:
                self._members[name].append(index)
        self._counts: list[Counter[str]] = [Counter() for _ in fractions]
        self._sizes = [0] * len(fractions)
        self._distribute()
        self._repair()

    def _distribute(self) -> None:
        """Assign all groups."""
        left = {name: len(members) for name, members in self._members.items()}
        largest = max((len(group.names) for group in self.groups), default=0)
        while left:
            name = min(left, key=lambda name: (left[name], self.totals[name], name))
            todo = [index for index in self._members[name] if self.part_of[index] < 0]
            todo.sort(key=lambda index: -self.groups[index].counts[name])
            placed = sum(self._sizes)
            wanted = [
                fraction * self.totals[name] + min(max(fraction * placed - size, -largest), largest)
                for fraction, size in zip(self.fractions, self._sizes, strict=True)
            ]
            for number, index in enumerate(todo):
                self._move(index, self._choose(name, wanted, len(todo) - number))
                for other in self.groups[index].counts:
                    left[other] -= 1
            left = {other: number for other, number in left.items() if number}

    def _choose(self, name: str, wanted: list[float], left: int) -> int:
        """Return the part for the next of the `left` remaining groups of a class."""
        counts = [counts[name] for counts in self._counts]
        parts = list(range(len(counts)))
        lacking = [part for part in parts if not counts[part]]
        if left <= len(lacking):
            first = next(level for level in self.levels if set(level).intersection(lacking))
            parts = [part for part in first if not counts[part]]
        # Rounded, because equal values must not differ by rounding errors.
        return max(
            parts,
            key=lambda part: (
                round(wanted[part] - counts[part], 6),
                round(self.fractions[part] * self.totals[name] - counts[part], 6),
            ),
        )

    def _move(self, index: int, part: int) -> None:
        group, before = self.groups[index], self.part_of[index]
        if before >= 0:
            self._counts[before].subtract(group.counts)
            self._sizes[before] -= len(group.names)
        self._counts[part].update(group.counts)
        self._sizes[part] += len(group.names)
        self.part_of[index] = part

    def missing(self, names: Iterable[str]) -> int:
        """Return in how many parts classes are missing although they have enough groups.

        A class that is missing from a part of an earlier level counts a thousand times as much.
        """
        missing = 0
        for name in names:
            left = len(self._members[name])
            for rank, level in enumerate(self.levels):
                expected = min(left, len(level))
                found = sum(self._counts[part][name] > 0 for part in level)
                missing += max(expected - found, 0) * 1000 ** (len(self.levels) - rank)
                left -= expected
        return missing

    def _repair(self) -> None:
        """Exchange or move groups so that fewer classes are missing from a part."""
        for name in sorted(self.totals, key=lambda name: (len(self._members[name]), name)):
            for part in range(len(self.fractions)):
                if self.missing([name]) and not self._counts[part][name]:
                    self._bring(name, part)

    def _bring(self, name: str, part: int) -> None:
        """Bring a group with a class into a part, if fewer classes are then missing from parts."""
        others = [index for index, place in enumerate(self.part_of) if place == part]
        for index in self._members[name]:
            size = len(self.groups[index].names)
            others.sort(key=lambda other: abs(len(self.groups[other].names) - size))
            for other in (*others, None):
                names = set(self.groups[index].counts)
                names.update(() if other is None else self.groups[other].counts)
                before, place = self.missing(names), self.part_of[index]
                self._move(index, part)
                if other is not None:
                    self._move(other, place)
                if self.missing(names) < before:
                    return
                self._move(index, place)
                if other is not None:
                    self._move(other, part)
