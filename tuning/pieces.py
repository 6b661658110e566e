"""Ray Tune's side of the search: it asks here for what to train next, and says here what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuning.driver import Driver


def searcher(driver: Driver) -> Any:
    """Hands Tune one piece after the other; a piece of a training is a trial of Tune's.

    Args:
        driver: of the sweep, which knows where trials compute.
    """
    from ray.tune.search import Searcher

    class Pieces(Searcher):
        def __init__(self) -> None:
            super().__init__()
            self._running: dict[str, dict[str, Any]] = {}

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True  # there is nothing that Tune may set

        def suggest(self, trial_id: str) -> Any:
            begun = driver.begin()
            if begun is None:
                return Searcher.FINISHED if driver.is_done else None
            self._running[trial_id] = begun
            return {name: begun[name] for name in ("name", "settings", "test_split")}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            begun = self._running.pop(trial_id)
            where = f"{driver.sweep}/tune/{begun['name']}-{trial_id}"
            driver.end(begun["name"], begun["piece"], f"crashed twice; {where} says of what" if error else "")

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Tune pickles it into files of the sweep; the driver knows MLflow's address, with its password.
            return object, ()

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def save(self, checkpoint_path: str) -> None:
            """A sweep goes on from its trials' folders and needs nothing of Tune's."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return Pieces()
