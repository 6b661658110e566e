"""New configurations for random search and TPE, drawn by Optuna.

A study is made anew from the blocks for each draw: what is known is in the trials' folders alone, so a sweep
that goes on draws from all that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuning.axes import Axis
from tuning.config import TuneConfig
from tuning.space import Arm, Values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from tuning.search import Block

_CELL = "cell"
_WORST = -1e30
_DRAWS = 50  # until a small space counts as exhausted


def draw(arm: Arm, blocks: Sequence[Block], rungs: Sequence[int], config: TuneConfig) -> Values | None:
    """Values of the arm's axes that no block has; None where so many draws found none."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    taken = [block.configuration.values for block in blocks]
    seed = config.search_seed * 10_007 + len(blocks)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if config.search == "tpe":
        # Blocks that run count as bad ones, so that two that are drawn at once are not the same.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    study = study_of(arm, blocks, rungs, sampler)
    for _ in range(_DRAWS):
        values = _values(arm, study.ask(distributions(arm)).params)
        if values not in taken:
            return values
    return None


def study_of(arm: Arm, blocks: Sequence[Block], rungs: Sequence[int], sampler: Any = None) -> Any:
    """An Optuna study of an arm's blocks: whole trainings as complete trials, those that ended at a rung as
    pruned ones."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize", sampler=sampler)
    known = distributions(arm)
    for block in blocks:
        if not arm.fits(block.configuration.values):
            continue  # of an earlier space
        merits = {rungs[rung]: block.mean(rung) for rung in range(len(rungs)) if block.stands(rung)}
        state = TrialState.RUNNING
        if block.diverged:  # worse than whatever ended: as a failure it would be forgotten, and tried again
            state, merits = TrialState.PRUNED, {rungs[0]: _WORST}
        elif block.lost:
            state = TrialState.FAIL
        elif merits:
            state = TrialState.COMPLETE if rungs[-1] in merits else TrialState.PRUNED
        study.add_trial(
            create_trial(
                state=state,
                params=_params(arm, block.configuration.values, known),
                distributions=known,
                value=merits[rungs[-1]] if state == TrialState.COMPLETE else None,
                intermediate_values=merits,
            )
        )
    return study


def distributions(arm: Arm) -> dict[str, BaseDistribution]:
    """The arm's axes as Optuna has them."""
    from optuna.distributions import CategoricalDistribution

    found: dict[str, BaseDistribution] = {axis.name: _distribution(axis) for axis in arm.axes}
    if len(arm.cells) > 1:
        found[_CELL] = CategoricalDistribution(list(range(len(arm.cells))))
    return found


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "values":
        return CategoricalDistribution(list(axis.values))
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "log")


def _values(arm: Arm, params: dict[str, Any]) -> Values:
    cell: Values = arm.cells[params.get(_CELL, 0)]
    ranges = {axis.name: axis for axis in arm.axes if axis.kind in ("log", "uniform")}
    return cell | {
        name: ranges[name].inside(value) if name in ranges else value
        for name, value in params.items()
        if name != _CELL
    }


def _params(arm: Arm, values: Values, known: dict[str, BaseDistribution]) -> dict[str, Any]:
    params = {axis.name: values[axis.name] for axis in arm.axes}
    if _CELL in known:
        params[_CELL] = arm.cells.index({n: v for n, v in values.items() if n not in params})
    return params
