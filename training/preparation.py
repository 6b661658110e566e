"""From the settings given to those that a run will have: everything is found and checked before a worker
starts."""

from __future__ import annotations

import secrets
import sys
import time
from typing import TYPE_CHECKING

from pipeline.errors import MissingError, OtherSettingsError, SettingsError
from pipeline.store import Store, locations
from training import run_folder
from training.config import TrainConfig
from training.models.settings import short_name
from training.run_folder import read_json

if TYPE_CHECKING:
    from training.objectives.protocol import Facts

FEW_STEPS = 1000
"""A plain network gained until 2,000 to 6,000 on sets of some hundred to some thousand pictures."""


def default_run(config: TrainConfig) -> str:
    """A new folder below runs/, named by what differs between runs, by the time and by chance."""
    # Two runs begun in the same second, or on two machines, must not meet in one folder.
    when = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return f"runs/{title(config)}-{when}"


def title(config: TrainConfig) -> str:
    """Backbone, what tells runs of the method apart, seed: the name of a trial's folder."""
    method = config.method.title() or config.objective.rpartition(".")[2]
    return f"{short_name(config.model.backbone)}-{method}-s{config.seed}"


def prepare(config: TrainConfig) -> tuple[TrainConfig, dict[str, str]]:
    """The settings as the run will have them, checked, and the variants of the store that are trained on:
    addresses whole, embeddings named.

    A run that was begun before lends what was left open, see `run_folder.resumed`.

    Raises:
        ValueError: settings that do not fit the store, or the run that is to be resumed.
    """
    config = config.but(
        run=run_folder.address(config.run or default_run(config)),
        store=run_folder.address(config.store),
        init_from=config.model.init_from and run_folder.address(config.model.init_from),
    )
    locations.check_writable("run", config.run)
    from training.data import few_shot
    from training.models import backbones, chain, weights
    from training.objectives.protocol import objective_of

    recorded = read_json(config.run, "config.json")
    config = backbones.resolved(config, recorded)
    if recorded is not None:
        config = run_folder.resumed(config, recorded)
        run_folder.check_store(config.run, recorded, Store(config.store))
    begun = recorded is not None and _has_checkpoint(config.run)
    if config.model.init_from and not begun:
        told, state = chain.check(config)
        print(f"train: {told}", file=sys.stderr)
        config = _started_from(config, state, resumed=recorded is not None)
    facts = check(config)
    notes = objective_of(config).notes(config, Store(config.store), facts)
    for note in filter(None, (few_shot.scarce(config, Store(config.store)), *notes)):
        print(f"train: {note}", file=sys.stderr)
    if config.model.pretrained and not config.model.brings_weights and not begun:
        weights.fetch_weights(config.model.backbone)
    return config.but(**facts.found), facts.variants


def _started_from(config: TrainConfig, state: str, *, resumed: bool) -> TrainConfig:
    """The settings with the weights that --init-from names now.

    Raises:
        OtherSettingsError: the run goes on before its first checkpoint, and began with other ones.
    """
    start, then = config.model.init_from, config.model.init_state
    if then not in ("", state):
        if resumed:
            message = (
                f"run={config.run}: has no checkpoint yet, and {start} has other weights than when it began; "
                "pass another --run to start from those."
            )
            raise OtherSettingsError(message)
        print(f"train: note: {start} has other weights than those on record ({then})", file=sys.stderr)
    return config.but(init_state=state)


def length(config: TrainConfig) -> list[str]:
    """What to say of a new training's length: of epochs that are several passes because the recipe asks for
    steps, and of a training that is too short to compare anything by (docs/evidence.md)."""
    from training.data.few_shot import rows_of

    rows = len(rows_of(config, Store(config.store), config.data.train_split, training=True))
    samples, batch = config.epoch_samples(rows), config.optim.batch_size
    steps = samples * config.optim.epochs // batch
    told = []
    if samples > rows * config.data.epoch_repeats:
        told = [
            f"an epoch is {samples / rows:.1f} passes over {rows} pictures, {samples // batch} steps "
            f"(--min-epoch-steps {config.data.min_epoch_steps})"
        ]
    if (
        steps >= FEW_STEPS
        or config.method.own_model
        or config.model.pretrained
        or config.model.init_from
        or config.preset == "smoke"
    ):
        return told
    smaller = "" if told else ", or a smaller --batch-size"  # of which an epoch would have as many steps
    few = f"{steps} steps in all are few for a network that starts from nothing; pass --epochs "
    return [*told, f"{few}{-(-FEW_STEPS * batch // samples)} or more{smaller}."]


def _has_checkpoint(run: str) -> bool:
    from training.engine import checkpoint

    try:
        checkpoint.find(run)
    except MissingError:
        return False
    return True


def check(config: TrainConfig) -> Facts:
    """Finds every fault that can be found without starting workers; returns what the method found."""
    from training.data.few_shot import rows_of
    from training.data.order import Rows
    from training.models import backbones, optimizers
    from training.objectives.protocol import objective_of

    store = Store(config.store)
    store.require_complete("images")
    config = backbones.resolved(config)
    if config.model.freeze_backbone and not (config.model.init_from or config.model.pretrained):
        message = "freeze_backbone: what does not train must be trained; add --init-from RUN or --pretrained."
        raise SettingsError(message)
    if not config.method.own_model:
        backbones.probe(
            config.model.backbone,
            config.model.image_size,
            config.model.patch_size,
            small_stem=config.model.small_stem,
            drop_path=config.model.drop_path,
            architecture=config.model.architecture,
        )
    optimizers.check_optimizer(config.optim.optimizer, config.optim.betas)
    store.split_shards(config.data.eval_split)
    if not len(Rows(store, config.data.eval_split)):
        message = (
            f"eval_split={config.data.eval_split}: none of its pictures can be used, and training is judged "
            f"by it; `gpt4image status --store {config.store}` says why. Mend them, or pass another "
            "--eval-split."
        )
        raise SettingsError(message)
    rows = len(rows_of(config, store, config.data.train_split, training=True))
    rows_of(config, store, config.data.eval_split)
    if rows < config.optim.batch_size:
        message = (
            f"batch_size={config.optim.batch_size}: the split {config.data.train_split} has {rows} usable "
            f"images; pass --batch-size {max(2, rows // 2 * 2)} or less."
        )
        raise SettingsError(message)
    facts: Facts = objective_of(config).check(config, store)
    return facts
