"""Random dataset splits that are stratified by class and keep groups of images together.

The algorithm is iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the
stratification of multi-label data"): the class with the fewest remaining groups is distributed
first, and each of its groups is assigned to the split (such as "train" or "val") that lacks the
most images of this class. The rarest class of an image therefore determines the image's split.
There are three differences:

- Groups of images are assigned instead of single images, starting with the largest groups.
- A split with too few images so far gets more images of the next class. Otherwise, the rounding
  errors of many small classes would add up.
- The last groups of a class are reserved for splits without this class. A class may still be
  missing from a split if rarer classes determined the splits of its groups. In this case, groups
  are exchanged and, for small datasets, other random orders are tried.
"""

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

# Class assigned to images without classes, so these images are also distributed.
NO_CLASS = ""

TRAIN, VAL, TEST = "train", "val", "test"

# With up to _SMALL groups, several random orders are tried. The first order with the fewest missing
# classes is used.
_SMALL = 500
_ATTEMPTS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Options for splitting a dataset.

    Attributes:
        val: Fraction of the images in "val"; ignored if `folds` is given.
        test: Fraction of the images in "test".
        folds: Number of folds of equal size, "fold0", "fold1", ..., which replace "train" and
            "val"; 0 for a single train/val split. If a class occurs in only one group (see
            `group_by`), this group is in "train", which is used for training in every fold.
        seed: Random seed. The result depends on the seed and the file names, but not on the order
            of the files.
        group_by: Regular expression that is searched for in the file names. Images with the same
            match, or the same first capturing group, are kept together. If empty, each image is a
            group of its own.
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
                "and a test fraction below 1."
            )
        if not self.folds and not (
            0 < self.val < 1 and self.test >= 0 and self.val + self.test < 1
        ):
            raise UserError(
                f"--val is {self.val} and --test is {self.test}; expected fractions whose sum is "
                "below 1, such as 0.2 and 0.1."
            )

    def fractions(self) -> dict[str, float]:
        """Return a dictionary from split name to the intended fraction of the images.

        With folds, the names are "fold0", "fold1", ... instead of "train" and "val".
        """
        if self.folds:
            parts = {f"fold{i}": (1 - self.test) / self.folds for i in range(self.folds)}
        else:
            parts = {TRAIN: 1 - self.val - self.test, VAL: self.val}
        return parts | ({TEST: self.test} if self.test else {})


def split_images(classes: Mapping[str, Collection[str]], split: Split) -> dict[str, str]:
    """Assign each image to a split ("train", "val" or "test") or a fold.

    Images that ``group_by`` keeps together form a group. A class that occurs in a single group is
    in "train". A class that occurs in two or more groups is also in "val" or, with folds, in at
    least two folds, unless groups with several classes make this impossible. This rule has priority
    over the fractions.

    Args:
        classes: Class names of each image, keyed by the image's file name.
        split: Options for splitting the dataset.

    Returns:
        Dictionary from image file name to the name of the image's split or fold.

    Raises:
        UserError: If the pattern in ``group_by`` is invalid, or a split or fold would be empty.
    """
    parts = split.fractions()
    names = list(parts)
    levels = [list(range(split.folds))] if split.folds else [[0], [1]]
    if split.test:
        levels.append([len(names) - 1])
    groups = _groups(classes, split.group_by)
    # If the only group of a class were in a fold, it would be evaluated without any training on
    # this class.
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
            f"Cannot split {len(classes)} images that belong to {len(groups)} groups: no images "
            f"are left for {first_of(empty)}. Expected more groups than splits or folds, and at "
            "least two groups per class. Use fewer splits or folds, use smaller groups, or add "
            "images."
        )
    return part_of


@dataclass
class _Group:
    """Images that must be in the same split, and the number of these images per class."""

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

    # Unlike random numbers, hashes are the same in all library versions.
    def key(group: _Group) -> bytes:
        return hashlib.sha256(f"{seed} {group.names[0]}".encode(errors="surrogateescape")).digest()

    return sorted(groups, key=key)


def _group_keys(names: Iterable[str], pattern: str) -> dict[str, str]:
    """Return the group key of each file name: the text that the pattern matches, or the whole name.

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
            f"--group-by is {pattern!r}, which is not a valid regular expression: {error}. "
            "Expected a pattern for Python's re module, such as '^(.*)_frame'."
        ) from error
    keys, others = {}, []
    for name in names:
        match = expression.search(name)
        found = match[1 if expression.groups else 0] if match else None
        # A trailing slash distinguishes a group from the file name of an ungrouped image.
        keys[name] = name if found is None else f"{found}/"
        others += [name] if found is None else []
    if len(others) == len(names):
        raise UserError(
            f"--group-by is {pattern!r}, which matches none of the {len(names)} file names: "
            f"{first_of(others, 3)}. Expected a regular expression that matches a part of these "
            "names."
        )
    if others:
        logger.warning(
            "--group-by %r doesn't match %d of %d file names. These images are not grouped: %s",
            pattern,
            len(others),
            len(names),
            first_of(others, 3),
        )
    return keys


def _single_classes(groups: list[_Group]) -> set[str]:
    """Return the classes that occur in only one group."""
    numbers = Counter(name for group in groups for name in group.counts)
    return {name for name, number in numbers.items() if number == 1}


class _Allocation:
    """Assignment of groups of images to splits, such as "train" and "val", or to folds.

    Attributes:
        part_of: Split index of each group; -1 if the group has not been assigned yet.
        totals: Number of images of each class.
    """

    def __init__(self, groups: list[_Group], fractions: list[float], levels: list[list[int]]):
        """
        Args:
            groups: Groups of images, in random order.
            fractions: Intended fraction of the images in each split.
            levels: Lists of split indices, highest priority first. If a class occurs in fewer
                groups than there are splits, the splits in the first list are preferred.
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
        """Assign each group of images to a split, starting with the rarest class."""
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
        """Return the index of the split for the next group that contains the class `name`.

        `left` is the number of such groups that have not been assigned yet.
        """
        counts = [counts[name] for counts in self._counts]
        parts = list(range(len(counts)))
        lacking = [part for part in parts if not counts[part]]
        if left <= len(lacking):
            first = next(level for level in self.levels if set(level).intersection(lacking))
            parts = [part for part in first if not counts[part]]
        # The values are rounded, so equal values do not differ by rounding errors.
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
        """Return a penalty for classes that are missing from splits.

        A class that occurs in N groups is expected in N splits, or in all splits if there are fewer
        than N. The lists of splits in ``levels`` are in order of priority. In the last list,
        each split that lacks an expected class adds 1000 to the penalty. In every other list, such
        a split adds 1000 times as much as in the next list.
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
        """Move or swap groups of images, so that fewer classes are missing from splits."""
        for name in sorted(self.totals, key=lambda name: (len(self._members[name]), name)):
            for part in range(len(self.fractions)):
                if self.missing([name]) and not self._counts[part][name]:
                    self._bring(name, part)

    def _bring(self, name: str, part: int) -> None:
        """Move a group with images of the class ``name`` to the split with the index ``part``.

        The group is moved, or swapped with a group in this split, only if this reduces the penalty
        for missing classes.
        """
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
