"""What a sweep trains and in which order, without training: learning curves are made up here."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from training.config import TrainConfig
from training.objectives.settings.align import AlignGrid
from tuning import axes, space
from tuning.config import TuneConfig
from tuning.search import Piece, Search


def sweep(epochs: int = 27, **settings: Any) -> TuneConfig:
    train = TrainConfig.of(store="s", epochs=epochs, lr=1e-3)
    return TuneConfig(
        train=train, **{"grid": AlignGrid(alignment_weights=(0, 0.5), projection_dims=(0,)), **settings}
    )


@dataclass
class Folder:
    """What trials' folders would hold, and what was trained."""

    config: TuneConfig
    merit: Any
    histories: dict[tuple[str, Any, int], list[float]] = field(default_factory=dict)
    lost: set[tuple[str, Any, int]] = field(default_factory=set)
    epochs: int = 0

    def search(self) -> Search:
        """As a start finds it."""
        found = Search(self.config, space.arms(self.config))
        for (arm, values, seed), history in self.histories.items():
            block = found.known("resnet18", arm == "baseline", dict(values))
            if seed in block.seeds:
                lost = "diverged" if (arm, values, seed) in self.lost else ""
                found.restore(block, seed, history, lost)
        found.start()
        return found

    def key(self, piece: Piece) -> tuple[str, Any, int]:
        own = piece.configuration
        return own.arm.name, tuple(own.values.items()), piece.seed

    def train(self, search: Search, piece: Piece) -> None:
        key, until = self.key(piece), self.config.rungs[piece.rung]
        history = self.histories.setdefault(key, [])
        while len(history) < until:
            merit = self.merit(piece, len(history) + 1)
            if math.isnan(merit):
                self.lost.add(key)
                break
            history.append(merit)
            self.epochs += 1
        search.record(piece, history, lost="diverged" if key in self.lost else "")

    def work(
        self, search: Search, side_by_side: int = 1, most: float = math.inf, seed: int = 0
    ) -> list[Piece]:
        """Trains in any order that so many workers may end in."""
        rng, running, done = random.Random(seed), [], []
        while len(done) < most:
            while len(running) < side_by_side and (piece := search.next()) is not None:
                running.append(piece)
            if not running:
                break
            piece = running.pop(rng.randrange(len(running)))
            self.train(search, piece)
            done.append(piece)
        return done


def lr_is_all(piece: Piece, epoch: int) -> float:
    """Best at 0.01; the method's adds one; seeds differ by tenths, and the first epochs say as much."""
    lr = piece.configuration.values.get("lr", 1e-3)
    gain = piece.configuration.arm.name == "method"
    return 50 - 10 * abs(math.log10(lr) + 2) + gain + 0.1 * piece.seed + 0.01 * epoch


def test_a_grid_trains_every_cell_once_with_every_seed_and_the_baseline_in_its_part_of_it() -> None:
    config = sweep(
        axis=("lr=1e-3,1e-2", "temperature=0.05,0.2"),
        grid=AlignGrid(alignment_weights=(0.3, 1.0), projection_dims=(8, 0)),
        seeds=(0, 1),
        fresh_seeds=0,
    )
    done = Folder(config, lr_is_all).work(Search(config, space.arms(config)))
    assert not done, "nothing before `start`"
    folder = Folder(config, lr_is_all)
    done = folder.work(folder.search(), side_by_side=3)
    counts = Counter((piece.configuration.arm.name, piece.seed) for piece in done)
    assert counts == {(arm, s): n for arm, n in (("baseline", 2), ("method", 16)) for s in (0, 1)}
    assert set(map(folder.key, done)) == folder.histories.keys() and folder.epochs == 36 * 27
    assert {name for p in done if p.configuration.arm.is_baseline for name in p.configuration.values} == {
        "lr"
    }


def test_the_choice_is_by_the_mean_over_seeds_and_the_winner_meets_the_best_baseline_on_fresh_ones() -> None:
    def merit(piece: Piece, epoch: int) -> float:
        lr = piece.configuration.values["lr"]
        return {1e-3: (70.0, 60.0), 1e-2: (66.0, 67.0)}[lr][piece.seed] if piece.stage == "search" else 1.0

    config = sweep(axis=("lr=1e-3,1e-2",), seeds=(0, 1), fresh_seeds=3)
    folder = Folder(config, merit)
    search = folder.search()
    done = folder.work(search, side_by_side=2)
    finals = [piece for piece in done if piece.stage == "final"]
    assert all(piece.configuration.values["lr"] == 1e-2 for piece in finals), "1e-3 has the best single trial"
    assert Counter((p.configuration.arm.name, p.seed) for p in finals) == {
        (arm, seed): 1 for arm in ("baseline", "method") for seed in (2, 3, 4)
    }
    assert done.index(finals[0]) == 8 and search.is_done
    best = search.best(search.arms)
    assert best is not None and best.configuration.values["lr"] == 1e-2


@pytest.mark.parametrize("side_by_side", [1, 4])
def test_asha_finds_the_best_of_a_grid_at_a_fraction_of_its_cost_and_seeds_stay_together(
    side_by_side: int,
) -> None:
    config = sweep(axis=("lr=log(1e-4,1,9)",), seeds=(0, 1), fresh_seeds=0, scheduler="asha")
    assert config.rungs == (3, 9, 27)
    folder = Folder(config, lr_is_all)
    search = folder.search()
    done = folder.work(search, side_by_side)
    for arm in search.arms:
        best = search.best([arm])
        assert best is not None and best.configuration.values["lr"] == pytest.approx(0.01) and best.stands(2)
    # 9 blocks to epoch 3, 3 of them to 9, one to 27: of either arm, twice.
    assert folder.epochs == 2 * 2 * (9 * 3 + 3 * 6 + 18) == pytest.approx(0.26 * 2 * 2 * 9 * 27, rel=0.01)
    for block in search.blocks:
        assert {len(block.merits.get(rung, {})) for rung in range(3)} <= {0, 2}
    assert len({(folder.key(piece), piece.rung) for piece in done}) == len(done)


@pytest.mark.parametrize(
    ("epochs", "settings", "rungs"),
    [
        (30, {}, (3, 10, 30)),
        (2, {}, (1, 2)),
        (100, {"reduction_factor": 4}, (6, 25, 100)),
        (30, {"grace_epochs": 1}, (1, 3, 9, 30)),
        (30, {"grace_epochs": 20}, (20, 30)),
        (27, {"grace_epochs": 1}, (1, 3, 9, 27)),
    ],
)
def test_rungs_are_spread_evenly(epochs: int, settings: dict[str, Any], rungs: tuple[int, ...]) -> None:
    assert sweep(epochs=epochs, scheduler="asha", **settings).rungs == rungs


def test_without_a_number_of_trials_what_is_good_so_far_goes_on_first() -> None:
    config = sweep(axis=("lr=log(1e-4,1)",), search="random", hours=1, fresh_seeds=0, scheduler="asha")
    folder = Folder(config, lr_is_all)
    search = folder.search()
    done = folder.work(search, most=60)
    whole = [place for place, piece in enumerate(done) if piece.rung == 2]
    assert whole and whole[0] < 30 and len(search.blocks) > 20
    search.spend()
    assert folder.work(search) == [] and search.is_done


def test_when_the_budget_is_spent_the_best_of_each_arm_is_trained_to_its_end() -> None:
    config = sweep(axis=("lr=log(1e-4,1,9)",), seeds=(0, 1), scheduler="asha", hours=1, fresh_seeds=0)
    folder = Folder(config, lr_is_all)
    search = folder.search()
    folder.work(search, most=12)
    assert search.spend() and not search.spend(), "told once"
    done = []
    while (piece := search.next()) is not None:  # the budget is looked at before each
        folder.train(search, piece)
        done.append(piece)
        search.spend()
    assert [piece.rung for piece in done] == [2] * 4 and search.is_done
    assert all((best := search.best([arm])) is not None and best.stands(2) for arm in search.arms)


def test_a_configuration_that_lost_a_seed_is_neither_promoted_nor_chosen_and_the_rest_goes_on() -> None:
    def merit(piece: Piece, epoch: int) -> float:
        diverges = piece.seed == 1 and piece.configuration.values["lr"] == pytest.approx(0.01) and epoch == 2
        return math.nan if diverges else lr_is_all(piece, epoch)

    config = sweep(axis=("lr=log(1e-4,1,9)",), seeds=(0, 1), fresh_seeds=2, scheduler="asha")
    folder = Folder(config, merit)
    search = folder.search()
    done = folder.work(search, side_by_side=2)
    assert all(p.rung == 0 for p in done if p.configuration.values["lr"] == pytest.approx(0.01))
    best = search.best([search.arms[0]])
    assert best is not None and best.configuration.values["lr"] in (
        pytest.approx(0.0316),
        pytest.approx(0.00316),
    )
    assert sum(piece.stage == "final" for piece in done) == 4


def test_a_sweep_of_which_every_training_is_lost_ends() -> None:
    config = sweep(axis=("lr=1e-3,1e-2",), fresh_seeds=2, scheduler="asha")
    folder = Folder(config, lambda piece, epoch: math.nan)
    search = folder.search()
    assert len(folder.work(search)) == 4 and search.is_done and search.best(search.arms) is None


@pytest.mark.parametrize(
    "settings", [{}, {"scheduler": "asha"}, {"search": "tpe", "trials": 6, "scheduler": "asha"}]
)
def test_a_sweep_that_is_killed_anywhere_trains_no_epoch_twice_and_ends_with_the_same(
    settings: dict[str, Any],
) -> None:
    def config() -> TuneConfig:
        return sweep(epochs=9, axis=("lr=log(1e-5,1,6)",), seeds=(0, 1), fresh_seeds=2, **settings)

    whole = Folder(config(), lr_is_all)
    whole.work(whole.search())
    for seed in range(12):
        rng, folder = random.Random(seed), Folder(config(), lr_is_all)
        for _ in range(4):  # starts that are killed
            search = folder.search()
            folder.work(search, side_by_side=2, most=rng.randrange(1, 8), seed=seed)
            if (piece := search.next()) is not None and rng.random() < 0.7:  # in the middle of a piece
                history = folder.histories.setdefault(folder.key(piece), [])
                for epoch in range(len(history) + 1, min(len(history) + 2, config().rungs[piece.rung])):
                    history.append(lr_is_all(piece, epoch))
                    folder.epochs += 1
        search = folder.search()
        folder.work(search, side_by_side=2, seed=seed)
        assert search.is_done and folder.epochs == sum(map(len, folder.histories.values()))
        best = search.best(search.arms)
        assert best is not None and best.stands(len(config().rungs) - 1)
        if not settings.get("search"):
            assert best.configuration.values["lr"] == pytest.approx(0.01)
            assert folder.histories.keys() == whole.histories.keys()


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_draws_lie_in_their_ranges_are_all_different_and_the_baseline_gets_as_many(search: str) -> None:
    config = sweep(
        search=search,
        trials=8,
        fresh_seeds=0,
        axis=(
            "lr=log(1e-4,1e-1)",
            "warmup_epochs=uniform(0,5)",
            "alignment-weight=log(0.1,1)",
            "projection-dim=int(4,64)",
        ),
    )
    folder = Folder(config, lr_is_all)
    found = folder.search()
    folder.work(found, side_by_side=3)
    by_arm: dict[str, list[dict[str, Any]]] = {"baseline": [], "method": []}
    for block in found.blocks:
        by_arm[block.configuration.arm.name].append(block.configuration.values)
    assert all(len(each) == 8 and len({str(v) for v in each}) == 8 for each in by_arm.values())
    for values in by_arm["method"]:
        assert 1e-4 <= values["lr"] <= 0.1 and 0 <= values["warmup_epochs"] <= 5
        assert 0.1 <= values["alignment_weight"] <= 1 and type(values["projection_dim"]) is int
        assert float(f"{values['lr']:.3g}") == values["lr"], "so that the folder's name is the value"
    assert all(values.keys() == {"lr", "warmup_epochs"} for values in by_arm["baseline"])


def test_tpe_learns_from_what_it_has_seen() -> None:
    def mean_distance(search: str) -> float:
        config = sweep(
            search=search,
            trials=30,
            fresh_seeds=0,
            axis=("lr=log(1e-6,1)",),
            grid=AlignGrid(alignment_weights=(0,)),
        )
        folder = Folder(config, lr_is_all)
        found = folder.search()
        folder.work(found)
        late = [block.configuration.values["lr"] for block in found.blocks[15:]]
        return sum(abs(math.log10(lr) + 2) for lr in late) / len(late)

    assert mean_distance("tpe") < 0.6 * mean_distance("random")


def test_a_space_that_is_used_up_ends_the_search() -> None:
    config = sweep(search="random", trials=50, axis=("lr=1e-3,1e-2",), fresh_seeds=0)
    folder = Folder(config, lr_is_all)
    search = folder.search()
    assert len(folder.work(search)) == 4 and search.is_done


def test_a_method_without_a_baseline_has_one_arm_and_no_final_comparison() -> None:
    config = sweep(axis=("lr=1e-3,1e-2",), grid=AlignGrid(alignment_weights=(0,)), fresh_seeds=3)
    folder = Folder(config, lr_is_all)
    search = folder.search()
    assert not search.has_pairs and len(folder.work(search)) == 2 and search.is_done


def test_trials_are_named_by_what_they_vary() -> None:
    config = sweep(axis=("lr=1e-3,1e-2", "temperature=0.05,0.1", "embeddings=a/b,c"), seeds=(3,))
    names = {
        space.trial_name(
            space.settings(config, space.Configuration(0, arm, values), 3, "s3://b/sweep?region=x")
        )
        for arm in space.arms(config)
        for values in arm.grid()
    }
    assert "resnet18-baseline-lr0.001-s3" in names and len(names) == 2 + 8
    assert "resnet18-w0.5-d0-embeddingsa_b-lr0.01-temperature0.05-s3" in names


def test_what_an_earlier_space_had_is_compared_and_takes_no_place_of_what_is_searched_now() -> None:
    folder = Folder(sweep(axis=("lr=1e-2",), scheduler="asha", fresh_seeds=0), lr_is_all)
    folder.work(folder.search(), most=2)  # both arms at the first rung, killed there
    folder.config = sweep(axis=("lr=1e-3,3e-3",), scheduler="asha", fresh_seeds=0)
    search = folder.search()
    folder.work(search)
    for arm in search.arms:
        best = search.best([arm])
        assert best is not None and best.stands(2) and best.configuration.values["lr"] == 3e-3


def test_random_and_tpe_go_on_with_other_values_and_with_another_axis() -> None:
    for search in ("random", "tpe"):
        folder = Folder(
            sweep(
                search=search, trials=4, axis=("label_smoothing=0,0.1", "lr=log(1e-4,1e-1)"), fresh_seeds=0
            ),
            lr_is_all,
        )
        folder.work(folder.search())
        folder.config = sweep(
            search=search, trials=6, axis=("label_smoothing=0,0.2", "lr=log(1e-4,1e-1)"), fresh_seeds=0
        )
        found = folder.search()
        old = sum(not block.configuration.arm.fits(block.configuration.values) for block in found.blocks)
        assert len(folder.work(found)) == 12 - (8 - old)
        folder.config = sweep(
            search=search, trials=3, axis=("lr=log(1e-4,1e-1)", "weight_decay=log(1e-4,1)"), fresh_seeds=0
        )
        assert len(folder.work(folder.search())) == 6, "what has no weight decay is no draw of this space"


def test_the_same_axes_in_another_order_are_the_same_trials() -> None:
    flags = ("lr=1e-3,1e-2", "label_smoothing=0,0.1")
    names = [
        {
            space.trial_name(space.settings(config, space.Configuration(0, arm, values), 0, "/s"))
            for arm in space.arms(config)
            for values in arm.grid()
        }
        for config in (sweep(axis=flags), sweep(axis=flags[::-1]))
    ]
    assert names[0] == names[1] and len(names[0]) == 8
    long = sweep(axis=("mixup=0.123", "drop_path=0.123", "whitening=0.123", f"optimizer={'a' * 200}"))
    (arm, _) = space.arms(long)
    name = space.trial_name(space.settings(long, space.Configuration(0, arm, next(arm.grid())), 0, "/s"))
    assert len(name) < 180


def test_seeds_that_were_ever_searched_on_are_not_fresh() -> None:
    config = sweep(seeds=(0,), fresh_seeds=2)
    search = Search(config, space.arms(config))
    assert search.fresh_seeds() == (1, 2)
    search.searched |= {1, 2}
    assert search.fresh_seeds() == (3, 4)


def test_a_piece_that_ends_short_of_its_rung_holds_nobody_up() -> None:
    config = sweep(axis=("lr=log(1e-4,1,9)",), fresh_seeds=0, scheduler="asha")
    folder = Folder(config, lr_is_all)
    search = folder.search()
    piece = search.next()
    assert piece is not None
    search.record(piece, [1.0])
    folder.work(search)
    assert search.is_done and all(
        (b := search.best([arm])) is not None and b.stands(2) for arm in search.arms
    )


def test_tpe_keeps_away_from_where_trainings_diverge() -> None:
    def cliff(piece: Piece, epoch: int) -> float:
        return math.nan if piece.configuration.values["lr"] > 0.02 else lr_is_all(piece, epoch)

    def lost(search: str) -> int:
        grid = AlignGrid(alignment_weights=(0,))
        config = sweep(search=search, trials=40, fresh_seeds=0, axis=("lr=log(1e-4,10)",), grid=grid)
        folder = Folder(config, cliff)
        found = folder.search()
        folder.work(found)
        return sum(bool(block.lost) for block in found.blocks[15:])

    assert lost("tpe") < lost("random")


def test_an_axis_of_the_method_stands_in_place_of_its_grid() -> None:
    config = sweep(axis=("alignment-weight=0.1,0.2",), grid=AlignGrid(alignment_weights=(0,)))
    baseline, method = space.arms(config)
    assert [values["alignment_weight"] for values in method.grid()] == [0.1, 0.2] and baseline.axes == ()


def test_a_large_grid_is_no_burden() -> None:
    axis = ("lr=log(1e-4,1,50)", "weight_decay=log(1e-4,1,50)")
    folder = Folder(sweep(axis=axis, scheduler="asha", fresh_seeds=0), lr_is_all)
    begun = time.monotonic()
    search = folder.search()
    folder.work(search, most=3000)
    again = folder.search()
    assert len(again.blocks) == 5000 and time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("projection-dim=int(1.5,3.7)", "LOW and HIGH must be whole numbers"),
        ("lr", "must be NAME=VALUE,VALUE"),
        ("lr=", "must be NAME=VALUE,VALUE"),
        ("store=a,b", r"store is the same for all trials of a sweep; pass --store, and another --sweep"),
        ("seed=1,2", r"a sweep sets seed for each trial; did you mean --seeds"),
        ("lrr=1,2", "lrr is no setting; did you mean lr"),
        ("threads=1,2", "threads is the same for all trials of a sweep; pass --threads"),
        ("lr=log(0,1)", "LOW must be above 0"),
        ("lr=log(1,0.1)", "LOW must be below HIGH"),
        ("lr=log(1)", "takes LOW,HIGH"),
        ("lr=log(1,2,1)", "2 points or more"),
        ("lr=int(1,2)", "lr is a number; use log(...)"),
        ("projection-dim=log(1,2)", "projection_dim is a whole number; use int(...)"),
        ("alignment=uniform(0,1)", "alignment is no number; list its values"),
        ("alignment=cosine,dot", "'dot' is none of symmetric"),
        ("center-texts=yes,no", "'yes' must be true or false"),
        ("lr=1e-3,1e-3", "give each value once"),
        ("batch-size=2.5", "'2.5' must be a whole number"),
    ],
)
def test_an_axis_that_is_none_is_refused_with_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match="axis=") as error:
        axes.parse(text, "align")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"axis": ("backbone=a,b",)}, "did you mean --backbones"),
        ({"axis": ("lr=1,2", "lr=3,4")}, "axis=lr: named twice"),
        ({"axis": ("epochs=1,2",)}, "after the same number of them"),
        ({"axis": ("eval-split=val,test",)}, "the choice is made on one split"),
        ({"axis": ("alignment-weight=0,0.5",)}, "is the baseline, which is there in any case"),
        ({"test_split": "train"}, "is the --train-split"),
        ({"scheduler": "asha", "epochs": 1}, "nothing to compare before their end"),
        ({"search": "tpe"}, "pass --trials, --hours or --gpu-hours"),
        ({"trials": 3}, "pass --search random or tpe"),
        ({"test_split": "val"}, "the choice is made on"),
        ({"test_split": "test", "fresh_seeds": 0}, "of which there are none"),
        ({"grace_epochs": 2}, "needs --scheduler asha"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re_escape(told)):
        space.arms(sweep(**settings))


def re_escape(text: str) -> str:
    import re

    return re.escape(text)
