"""Made-up remarks of praise and blame, always there: a text task for demonstrations and tests.

A small grammar makes them: ``the <thing> <verb> [negation] [degree] <word>``, and two such clauses joined by ``but``,
of which the second decides, or by ``and``, which agree. Negations turn a word around, so that neither counting words
nor looking at the last one is enough.
"""

from __future__ import annotations

from collections.abc import Iterator

from archsmith.core.rng import numpy_stream

CLASSES = ("blame", "praise")
COUNT = 1600

_THINGS = ("film", "story", "music", "ending", "cast", "script", "camera", "first half", "dialogue", "humour")
_VERBS = ("is", "was", "seemed", "felt")
_NEGATIONS = ("not", "never", "hardly")
_DEGREES = ("very", "really", "quite", "rather")
_WORDS = {
    1: ("good", "funny", "moving", "clever", "fresh", "warm", "gripping", "charming", "sharp", "bright"),
    0: ("bad", "dull", "slow", "clumsy", "stale", "cold", "boring", "silly", "flat", "weak"),
}


def phrases(count: int = COUNT) -> tuple[list[str], list[int]]:
    """Return distinct remarks and their classes (numbers into ``CLASSES``), always the same ones.

    Args:
        count: How many.
    """
    # Raw words of the generator, so that no version of numpy draws others.
    draws = iter(numpy_stream(0, "phrases").bit_generator.random_raw(64 * count).tolist())
    found: dict[str, int] = {}
    while len(found) < count:
        join = next(draws) % 4
        first, held = _clause(draws)
        if join >= 2:
            text, label = first, held
        else:
            second, label = _clause(draws)
            if join == 1 and label != held:
                continue
            text = f"{first} {'but' if label != held else 'and'} {second}"
        found.setdefault(text, label)
    return list(found), list(found.values())


def _clause(draws: Iterator[int]) -> tuple[str, int]:
    def pick(options: tuple[str, ...]) -> str:
        return options[next(draws) % len(options)]

    turned, stressed, class_ = (next(draws) % n for n in (3, 2, 2))
    parts = [f"the {pick(_THINGS)} {pick(_VERBS)}"]
    parts += [pick(_NEGATIONS)] if turned == 0 else []
    parts += [pick(_DEGREES)] if stressed else []
    parts.append(pick(_WORDS[class_]))
    return " ".join(parts), class_ if turned else 1 - class_
