"""Several runs at a time in one process: the models are small, and one alone leaves most of a GPU idle.

Each run has a stream of its own. In turns, every run's next stretch of steps is started, and only then is any of them waited for.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from kda_reference.errors import KdaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kda_model.training.run import Pace, Run


def train_side_by_side(runs: Iterable[Run], at_once: int, pace: Pace) -> Iterator[tuple[Run, KdaError | None]]:
    """Train runs to their ends, and yield each when it has ended, with the error if one ended it.

    Parameters
    ----------
    runs
        In the order in which they are begun; each is made when its turn has come, if they are given by a generator.
    at_once
        How many are trained at a time.
    pace
        Of rows and states.
    """
    waiting = iter(runs)
    active: list[Run] = []
    while True:
        active += islice(waiting, at_once - len(active))
        if not active:
            return
        for run in active:
            if run.ended is None:
                run.start(pace)
        going = []
        for run in active:
            try:
                if run.ended is None:
                    run.finish(pace)
            except KdaError as error:
                yield run, error
                continue
            if run.ended is None:
                going.append(run)
            else:
                yield run, None
        active = going
