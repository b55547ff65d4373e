"""Random and damaged recipes, as files and as key=value, and what must come of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuzz_check import SECONDS, Hang, ViolationError, peak_memory, time_limit
from fuzzing import DAMAGE
from manylora.recipe import Recipe, RecipeError, load_recipe

GROUPS = ("adapter", "train", "evaluate", "fields", "mixture", "discovery")
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 10**6, 10**40, -(2**63), 0.0, 0.1, 1e-3, -2.5, 1e308),
    *(float("inf"), float("nan"), "", " ", "x", "lora", "hydralora", "auto", "samples", "1e-3"),
    *("a" * 3000, "\u00e9\U0001f600", "../..", "a\tb", [], [1], ["q_proj"], [[]], {}, {"a": 1}),
    *(
        {"weights": {"a": -1}},
        {"temperature": 0},
        {"TASK": "path"},
        "owner/name@revision",
        ["a", 3],
    ),
)
TEXTS = (
    *(
        "",
        "a: 1",
        "- 1",
        "data: samples",
        "{",
        "}",
        "[",
        "]",
        "&a [*a, *a]",
        "!!python/object:os.x",
    ),
    *(
        "!!binary aGk=",
        "2026-01-01",
        "? a",
        "<<: *a",
        "%YAML 9",
        "---\n...",
        "\t",
        "'",
        '"',
        "|",
        ">",
    ),
    *("!!set {a, b}", "0x_", "1_000", "1:20:30", "~", "null", "= 1", "*x", "!t", "a: b: c", "0o9"),
    *(
        "!!int x",
        "!!float y",
        "!!timestamp z",
        ".inf",
        "-.inf",
        ".nan",
        "{a: {a: {a: 1}}}",
        "9" * 5000,
    ),
    *(
        "2026-99-99",
        "{[1]: 2}",
        "? [1, 2]\n: 3",
        "!!omap [1]",
        "!!bool maybe",
        "\ud800",
        "\0",
        "\x1b",
    ),
)
BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 28))]
)


@dataclass(frozen=True)
class RecipeCase:
    content: bytes | None
    overrides: list[str]


def make_recipe_case(number: int, seed: int = 0) -> RecipeCase:
    rng = random.Random(f"recipe:{seed}:{number}")
    values = _values(rng)
    overrides = [_override(rng) for _ in range(rng.choice((0, 0, 1, 3)))]
    if number % 4 == 0:
        return RecipeCase(None, ["data=samples", *overrides, _override(rng)])
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    if rng.random() < 0.05:
        text += rng.choice((BOMB, BOMB + "\ntrain: *a27", "\n".join(rng.choices(TEXTS, k=3))))
    content = text.encode("utf-8", "surrogatepass")
    if number % 4 == 1:
        content = rng.choice(DAMAGE)(rng, content)
    return RecipeCase(content[:400_000], overrides)


def _values(rng: random.Random) -> dict[Any, Any]:
    values: dict[Any, Any] = {"data": "samples"}
    sound = rng.random() < 0.4
    for _ in range(rng.choice((0, 1, 2, 6))):
        group, key = rng.choice(list(DEFAULTS))
        value = DEFAULTS[group, key] if sound else rng.choice(VALUES)
        if group is None:
            values[key] = value
        elif isinstance(values.setdefault(group, {}), dict):
            values[group][key] = value
    if not sound and rng.random() < 0.2:
        odd = rng.choice((1, None, True, 2.5, "dta", "data.x", "", "\u00e9"))
        values[odd] = rng.choice(VALUES)
    return values


def _defaults() -> dict[tuple[str | None, str], Any]:
    """The value of each (group, key) of a recipe that says nothing but its data."""
    plain = Recipe(data="samples").model_dump(mode="json")
    keys: dict[tuple[str | None, str], Any] = {}
    for name, value in plain.items():
        keys[None, name] = value
        if isinstance(value, dict):
            keys |= {(name, inner): each for inner, each in value.items()}
    return keys


DEFAULTS = _defaults()


def _override(rng: random.Random) -> str:
    group, key = rng.choice(list(DEFAULTS))
    name = key if group is None else f"{group}.{key}"
    name = rng.choice(
        (name, name, name, name, f"{name}.x", f"{name}x", "", ".", f".{name}", "a..b")
    )
    given = rng.choice((DEFAULTS[group, key], rng.choice(VALUES)))
    value = rng.choice(TEXTS) if rng.random() < 0.4 else yaml.safe_dump(given).strip()
    return rng.choice((f"{name}={value}", f"{name}={value}", f"{name}={value}", name, f"={value}"))


def check_recipe(case: RecipeCase, folder: Path) -> str:
    """ "right", where the recipe read is the same when saved and read again, or "refused"."""
    path = None
    if case.content is not None:
        path = folder / "case.yaml"
        path.write_bytes(case.content)
    before = peak_memory(reset=True)
    try:
        with time_limit(SECONDS):
            recipe = load_recipe(path, case.overrides)
    except RecipeError as error:
        _check_refusal(str(error), path)
        return "refused"
    except Hang:
        raise ViolationError(f"no end within {SECONDS} s") from None
    except Exception as error:
        raise ViolationError(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        grown = peak_memory() - before
        if grown > 64 * 2**20 + 30 * len(case.content or b""):
            raise ViolationError(f"{grown / 2**20:.0f} MiB")
    try:
        recipe.save(folder)
        again = load_recipe(folder)
    except Exception as error:
        raise ViolationError(
            f"saved and read: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    if repr(again.model_dump()) != repr(recipe.model_dump()):
        raise ViolationError(f"not the same recipe when saved: {recipe!r} and {again!r}"[:500])
    return "right"


def _check_refusal(message: str, path: Path | None) -> None:
    if len(message) > 6000:
        raise ViolationError(f"a message of {len(message)} characters: {message[:300]!r}")
    if "Traceback" in message or not message.strip():
        raise ViolationError(f"not a message for a person: {message[:300]!r}")
    if path is not None and str(path) not in message and "=" not in message:
        raise ViolationError(f"the message does not name the file: {message[:300]!r}")
