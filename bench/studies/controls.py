"""Controls: what the teacher sees in place of the demonstrations."""

from collections.abc import Callable
from dataclasses import replace

from ia2mini.episode import Episode, seeded, shuffled


def controlled(episode: Episode, teacher: str, other: Callable[[], Episode], seed: int = 0) -> Episode:
    """The episode with a control in place of what the teacher sees; `teacher` "true": as it is.

    "none": nothing; "other": the demonstrations of the episode `other()`; "shuffled": the training rows' answers have
    changed places, no row keeps its own place (labels may still agree). Evaluation by ICL sees the true ones.
    """
    if teacher == "true":
        return episode
    source = other() if teacher == "other" else episode
    lists = {name: getattr(source, name) for name in ("demonstrations", "more_demonstrations")}
    if teacher == "none":
        lists = {name: [[] for _ in shown] for name, shown in lists.items()}
    elif teacher == "shuffled":
        ring = shuffled(episode.train, seeded(seed, 0, "answers in other places"))
        moved = {a: replace(a, answer=b.answer, label=b.label) for a, b in zip(ring, ring[1:] + ring[:1])}
        lists = {name: [[moved[row] for row in rows] for rows in shown] for name, shown in lists.items()}
    return replace(episode, **lists)
