"""What settings may be: each is declared once, with its default and its meaning.

A declaration stands in the field of a dataclass (``setting``) or in a tree of them
(``Setting``), a dict by key. From the tree come a config (``config_of``), its check
(``check``), the help and the page of docs (``rows``).
"""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from wf_vit.errors import UsageError

_KEY = "setting"
# Seeds go through 32 bits in places, with a sign.
LARGEST_SEED = 2**31 - 1
# Steps and images are counted in 32 bits.
LARGEST_COUNT = 2**31 - 1
# Length of a tuple that must not be empty.
ANY = -1


@dataclasses.dataclass(frozen=True)
class Setting:
    """A declaration.

    Attributes:
      default: None is allowed as a value where it is the default; MISSING of
        ``dataclasses`` if there is none.
      meaning: with the unit, in words that complete "config.KEY: ...".
      low: least value, of the items where there are several.
      high: greatest value.
      above: the value is greater than this.
      below: the value is less than this.
      choices: all values, or items, that there are.
      kind: bool, int, float, str, dict of texts, or tuple of what ``items`` is; None
        for that of the default.
      items: kind of the items of a tuple.
      length: how many items there are; None for any number, ANY for at least one.
      one_or_many: whether one item alone stands for a tuple.
      optional: whether None is allowed, too, if it is not the default.
    """

    default: Any
    meaning: str
    _: dataclasses.KW_ONLY
    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    choices: tuple[Any, ...] | None = None
    kind: type | None = None
    items: type = float
    length: int | None = None
    one_or_many: bool = False
    optional: bool = False

    @property
    def may_be_none(self) -> bool:
        """Whether None is a value."""
        return self.optional or self.default is None

    @property
    def of_kind(self) -> type:
        """The kind, declared or that of the default."""
        return self.kind or type(self.default)

    def as_field(self, default: Any, rest: str = "") -> Any:
        """Returns the field of a dataclass, with another default and more to say."""
        changed = dataclasses.replace(
            self, default=default, kind=self.of_kind, meaning=self.meaning + rest
        )
        return dataclasses.field(default=default, metadata={_KEY: changed})

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the kind and in the range."""
        if value is None:
            return self.may_be_none
        if self.of_kind is dict:
            return isinstance(value, Mapping) and all(
                isinstance(part, str) and part
                for pair in value.items()
                for part in pair
            )
        if self.of_kind is not tuple:
            return self._accepts_one(value, self.of_kind)
        if not isinstance(value, tuple | list):
            return self.one_or_many and self._accepts_one(value, self.items)
        fits = self.length in (None, len(value)) or (self.length == ANY and value)
        return bool(fits) and all(self._accepts_one(item, self.items) for item in value)

    def _accepts_one(self, value: Any, kind: type) -> bool:
        if kind in (bool, str):
            return isinstance(value, kind) and value in (self.choices or (value,))
        known = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, known):
            return False
        # Huge whole numbers have no float.
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        return (
            abs(value) <= 1e300
            and value in (self.choices or (value,))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.of_kind is dict:
            return "texts by name"
        if self.of_kind is tuple:
            count = {None: "any number of", ANY: "one or more", 2: "two", 3: "three"}[
                self.length
            ]
            one = {int: "whole number", float: "number", str: "text"}[self.items]
            words = f"{count} {one}s"
            if self.one_or_many:
                words = f"a {one}, or {words}"
        else:
            words = {
                bool: "True or False",
                int: "a whole number",
                float: "a number",
                str: "a text",
            }[self.of_kind]
        if self.choices is not None:
            listing = ", ".join(map(repr, self.choices))
            few = self.of_kind is not tuple
            words = f"one of {listing}" if few else f"some of {listing}"
        words += self._bounds()
        return f"{words}, or none" if self.may_be_none else words

    def _bounds(self) -> str:
        """Returns the range, in words that follow those of the kind."""
        low, high, above, below = (
            "" if number is None else _short(number)
            for number in (self.low, self.high, self.above, self.below)
        )
        first = f" from {low}" if low else f" above {above}" if above else ""
        last = f"up to {high}" if high else f"below {below}" if below else ""
        if first and last:
            joint = " to" if low else " and"
            return f"{first}{joint} {last.removeprefix('up to ') if low else last}"
        if low:
            return f" of {low} or more"
        return first or (f" {last}" if last else "")


Tree = Mapping[str, "Setting | Tree"]
Config = Mapping[str, Any] | ml_collections.ConfigDict


def setting(default: Any, meaning: str, **options: Any) -> Any:
    """Returns the field of a dataclass that is declared; see ``Setting``."""
    declared = Setting(default, meaning, **options)
    if isinstance(default, dict):
        return dataclasses.field(
            default_factory=lambda: dict(default), metadata={_KEY: declared}
        )
    return dataclasses.field(default=default, metadata={_KEY: declared})


def of(declared: type) -> dict[str, Setting]:
    """Returns the declarations of a dataclass, without fields that have none."""
    return {
        field.name: field.metadata[_KEY]
        for field in dataclasses.fields(declared)
        if _KEY in field.metadata
    }


def duration(
    name: str,
    meaning: str,
    *,
    steps: int | None = None,
    epochs: int | float | None = None,
    percent: int | float | None = None,
    low: int = 1,
) -> dict[str, Setting]:
    """Returns the three settings of a duration, of which the first set one counts."""
    bounds = {"low": 0} if low == 0 else {"above": 0}
    options = {"optional": True, "high": LARGEST_COUNT}
    return {
        f"{name}_steps": Setting(
            steps, f"{meaning}, in steps", kind=int, low=low, **options
        ),
        f"{name}_epochs": Setting(
            epochs, f"{meaning}, in epochs", kind=float, **bounds, **options
        ),
        f"{name}_percent": Setting(
            percent,
            f"{meaning}, in percent of the run",
            kind=float,
            **bounds,
            **options | {"high": 100},
        ),
    }


# How a checkpoint is opened: arguments of ``wf_vit.models.pretrained.load``.
OPENING = {
    "num_heads": Setting(
        None, "of the checkpoint, where nothing tells it", kind=int, low=1, high=2**16
    ),
    "which": Setting(
        None,
        "of a file with several state dicts, the one that is meant, such as student",
        kind=str,
    ),
    "prefix": Setting(
        None,
        "of a state dict with several networks, what stands before the names of one",
        kind=str,
    ),
}


def opening(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns what a config says of ``OPENING``."""
    return {name: config[name] for name in OPENING}


def config_of(tree: Tree) -> ml_collections.ConfigDict:
    """Returns a config with every default of a tree; it is not locked."""
    config = ml_collections.ConfigDict()
    for key, declared in tree.items():
        if not isinstance(declared, Setting):
            config[key] = config_of(declared)
            continue
        default = declared.default
        if declared.may_be_none:
            # What is set later has the kind, in spite of the None.
            config[key] = config_dict.placeholder(
                declared.items if declared.one_or_many else declared.of_kind
            )
            if default is not None:
                config[key] = default
        else:
            config[key] = dict(default) if isinstance(default, dict) else default
    return config


def problems(tree: Tree, config: Config, name: str) -> list[str]:
    """Returns what is wrong with the values of a config, a line for each key.

    Args:
      tree: the declarations.
      config: values by key, all of those that are declared.
      name: of the config, for the messages.
    """
    found = []
    for key, declared in tree.items():
        if key not in config:
            found.append(f"{name}.{key} is missing: set it, or start from our config.")
            continue
        value, full = config[key], f"{name}.{key}"
        if not isinstance(declared, Setting):
            if isinstance(value, Mapping | ml_collections.ConfigDict):
                found += problems(declared, value, full)
            else:
                found.append(f"{full} is {_shown(value)}: expected settings by key.")
            continue
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        if not declared.accepts(value):
            found.append(
                f"{full} is {_shown(value)}: expected {declared.expected} "
                f"({declared.meaning})."
            )
    found += [
        f"{name}.{key} is not a setting: expected are {', '.join(tree)}."
        for key in config
        if key not in tree
    ]
    return found


def check(tree: Tree, config: Config, name: str = "config") -> None:
    """Raises UsageError if a value is out of its declared range; names all of them."""
    found = problems(tree, config, name)
    if found:
        raise UsageError("\n".join(found))


def check_fields(instance: Any, name: str) -> None:
    """Raises UsageError if a field of a dataclass is out of its declared range."""
    declared = of(type(instance))
    check(declared, {key: getattr(instance, key) for key in declared}, name)


def rows(tree: Tree, config: Config, name: str = "") -> Iterator[tuple]:
    """Yields (key, value in a config, what is expected, meaning) of each setting."""
    for key, declared in tree.items():
        value = config[key]
        if isinstance(declared, Setting):
            if isinstance(value, ml_collections.ConfigDict):
                value = value.to_dict()
            yield f"{name}{key}", value, declared.expected, declared.meaning
        else:
            yield from rows(declared, value, f"{name}{key}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _short(number: int | float) -> str:
    return {LARGEST_COUNT: "2^31 - 1"}.get(number, f"{number:,.10g}")
