"""The pairs of a run on the Hub: Parquet files that hold the pictures, in one commit with their card."""

import io
import json
from itertools import islice

import numpy as np
import pytest
import yaml
from PIL import Image

import artaug as aa
from artaug import hub
from artaug.hub.pairs import PairsContents
from artaug.testing import FixedCritic, SwatchSynthesizer
from support.hub_server import WRITER, hub_server

pytestmark = pytest.mark.loopback
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
PROMPTS = ["a kitchen", "a harbour", "a garden", "a moor", "a pond", 'a "gate" | of <b>']


class Brightness(aa.Scorer):
    """The mean of a picture."""

    def score(self, image, prompt):
        return float(np.asarray(image.convert("L")).mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with kept and dropped pairs."""
    folder = tmp_path_factory.mktemp("run")
    list(
        aa.improve(
            PROMPTS,
            synthesizer=SwatchSynthesizer(),
            critic=FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=aa.TopFraction(Brightness(), fraction=0.5),
            seed=0,
            store=folder,
        )
    )
    return aa.Run.open(folder)


@pytest.fixture
def server():
    with hub_server() as running:
        yield running


def tables(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    return [parquet.read_table(path) for path in sorted(folder.glob("data/*.parquet"))]


@pytest.mark.parametrize("dropped", [False, True])
def test_the_rows_are_the_pairs_with_their_pictures(run, tmp_path, dropped):
    pytest.importorskip("pyarrow")
    PairsContents(repo="me/pairs", run=run, dropped=dropped).write(tmp_path)
    (table,) = tables(tmp_path)
    attempts = [attempt for attempt in run.attempts() if dropped or isinstance(attempt, aa.Kept)]
    for row, attempt in zip(table.to_pylist(), attempts, strict=True):
        pair = attempt.pair
        assert (row["prompt"], row["seed"], row["round"]) == (pair.prompt, pair.seed, 1)
        assert (row["kept"], row["reason"]) == (isinstance(attempt, aa.Kept), attempt.verdict.reason)
        assert json.loads(row["plan"])["prompt"] == pair.plan.prompt
        for side in ("before", "after"):
            with Image.open(io.BytesIO(row[side]["bytes"])) as image:
                assert image.convert("RGB").tobytes() == getattr(pair, side).tobytes()


def test_the_columns_are_those_that_datasets_shows_as_pictures(run, tmp_path):
    """https://huggingface.co/docs/hub/datasets-image: a struct of bytes and path, and its feature in the metadata."""
    pytest.importorskip("pyarrow")
    text = PairsContents(repo="me/pairs", run=run, dropped=False).write(tmp_path)
    (table,) = tables(tmp_path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.schema.names
    assert features["before"] == features["after"] == {"_type": "Image"}
    card = yaml.safe_load(text.split("---\n")[1])
    assert [feature["name"] for feature in card["dataset_info"]["features"]] == table.schema.names
    assert card["configs"][0]["data_files"][0]["path"] == ["data/train-00000.parquet"]
    assert not any(prompt in text for prompt in PROMPTS)


def test_many_pairs_are_several_files_that_the_card_names(run, tmp_path):
    pytest.importorskip("pyarrow")
    text = PairsContents(repo="me/pairs", run=run, dropped=True, shard_bytes=1).write(tmp_path)
    written = tables(tmp_path)
    assert [row["prompt"] for table in written for row in table.to_pylist()] == PROMPTS
    assert len(written) == len(PROMPTS)
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["configs"][0]["data_files"][0]["path"] == [f"data/train-{number:05d}.parquet" for number in range(6)]


def test_pairs_are_pushed_to_a_dataset_in_one_commit(run, server):
    pytest.importorskip("pyarrow")
    planned = hub.push_pairs(run, "me/pairs", endpoint=server.url, token=WRITER, dry_run=True)
    assert server.requests == []
    pushed = hub.push_pairs(run, "me/pairs", endpoint=server.url, token=WRITER)
    assert planned.files == pushed.files
    assert str(pushed).startswith("pushed to datasets/me/pairs")
    assert len(server.repositories["me/pairs"].messages) == 1
    assert server.repositories["me/pairs"].branches["main"][-1].keys() == {"README.md", "data/train-00000.parquet"}
    assert not any("/api/models/" in path for _, path in server.requests)
    assert any(path == "/api/datasets/me/pairs/commit/main" for _, path in server.requests)


def test_a_run_without_a_pair_and_what_is_no_run_are_refused(run, tmp_path):
    with pytest.raises(aa.InvalidValueError, match="Run"):
        hub.push_pairs("runs/first", "me/pairs", dry_run=True)
    with pytest.raises(aa.InvalidValueError, match="owner/name"):
        hub.push_pairs(run, "pairs", dry_run=True)
    pytest.importorskip("pyarrow")
    attempts = aa.improve(
        PROMPTS,
        synthesizer=SwatchSynthesizer(),
        critic=FixedCritic(aa.Critique()),
        planner=aa.GreedyPlanner(),
        keep=aa.TopFraction(Brightness(), fraction=0.5),
        seed=0,
        store=tmp_path,
    )
    assert len(list(islice(attempts, 6))) == 6
    with pytest.raises(aa.NothingToLearnError, match="no kept pair"):
        hub.push_pairs(aa.Run.open(tmp_path), "me/pairs", dry_run=True)


def test_a_damaged_picture_is_not_pushed(tmp_path):
    pytest.importorskip("pyarrow")
    store = tmp_path / "run"
    attempts = aa.improve(
        PROMPTS[:1],
        synthesizer=SwatchSynthesizer(),
        critic=FixedCritic(ADVICE),
        planner=aa.GreedyPlanner(),
        keep=aa.TopFraction(Brightness(), fraction=1.0),
        seed=0,
        store=store,
    )
    list(attempts)
    pair = next(aa.Run.open(store).pairs())
    Image.new("RGB", pair.size, "red").save(pair.references[1].path)
    with pytest.raises(aa.StorageError, match="another picture"):
        hub.push_pairs(aa.Run.open(store), "me/pairs", dry_run=True)
