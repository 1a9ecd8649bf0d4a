"""Controls: what the teacher sees in place of the demonstrations."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ia2mini.episode import Episode, draw_episode, seeded, shuffled
from ia2mini.tasks import Example

TEACHERS = ("true", "shuffled", "other", "none")  # what they see


def controlled(
    episode: Episode, teacher: str, other: Callable[[], Episode], seed: int = 0
) -> Episode:
    """The episode with a control in place of what the teacher sees; `teacher` "true": as it is.

    "none": nothing; "other": the demonstrations of the episode `other()`; "shuffled": the training rows' answers have
    changed places, no row keeps its own place (labels may still agree). Evaluation by ICL sees the true ones.
    """
    if teacher == "true":
        return episode
    if teacher == "other":
        return replace(episode, demonstrations=other().demonstrations)
    moved = {}
    if teacher == "shuffled":
        ring = shuffled(episode.train, seeded(seed, 0, "answers in other places"))
        for row, following in zip(ring, ring[1:] + ring[:1]):
            moved[row] = replace(row, answer=following.answer, label=following.label)

    demonstrations = []
    for shown in episode.demonstrations:
        kept = [] if teacher == "none" else shown
        demonstrations.append([moved[row] for row in kept])
    return replace(episode, demonstrations=demonstrations)


@dataclass
class Control:
    """Draws the episodes of a study (`compare(…, draw=…)`), with a control in place of what the teacher sees.

    The other task of a task is the next one of the study; of the last the first.
    """

    teacher: str
    # training rows of each task of the study, in order
    pools: list[list[Example]] = field(repr=False)

    def __call__(
        self, pool: list[Example], n: int, number: int = 0, seed: int = 0, **choices
    ) -> Episode:
        def other() -> Episode:
            following = (self.pools.index(pool) + 1) % len(self.pools)
            return draw_episode(self.pools[following], n, number, seed, **choices)

        episode = draw_episode(pool, n, number, seed, **choices)
        return controlled(episode, self.teacher, other, seed + number)
