"""Documents, tokens and batches: the same ones for every rank count, source format and resume."""

import gzip
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import launch_jobs
import ranks
from conda_dist.launch.cluster.process_group import World
from conda_dist.launch.data import cache, preparation, sources
from conda_dist.launch.data import tokenizer as bpe
from conda_dist.launch.data.batches import TokenBatches, micro_batches, row_range
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError, DataConfig
from launch_jobs import LIBRARY, train

DOCUMENTS = [file.read_text() for file in sorted((LIBRARY / "email").glob("*.py"))] + [""]


@pytest.fixture
def alone() -> Iterator[World]:
    """A job of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield World(0, 1, 0, torch.device("cpu"), group, group)
    dist.destroy_process_group()


def load(folder: Path, *arguments: Any) -> Config:
    small = ["--tokenizer.vocab_size", "400", "--training.sequence_length", "32"]
    small += ["--data.val_fraction", "0.2", "--data.cache", str(folder / "cache")]
    return options.load(None, [*small, *map(str, arguments)])


def texts(folder: Path, *arguments: Any) -> list[str]:
    return [text for text, _ in sources.open_source(load(folder, *arguments).data).documents()]


# Which rows belong to whom.


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_rows_are_dealt_out_whole(batch: int, size: int, micro: int) -> None:
    if size > batch:
        with pytest.raises(ConfigError, match=f"at least {size}"):
            row_range(batch, 0, size)
        return
    dealt, passes = [], set()
    for rank in range(size):
        first, last = row_range(batch, rank, size)
        rows = np.arange(first, last)[:, None]
        parts = micro_batches(rows, -(-batch // size), micro)
        assert all(len(part) <= micro for part in parts)
        assert sum(map(len, parts)) == last - first
        passes.add(len(parts))
        dealt += [int(row) for part in parts for row in part[:, 0]]
    assert dealt == list(range(batch))
    assert len(passes) == 1  # every rank runs as many forward passes as the others


@given(st.integers(2, 400), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_is_every_window_once(count: int, length: int, batch: int, seed: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    if count <= length:
        with pytest.raises(ConfigError, match="fewer than one sequence"):
            TokenBatches(tokens, length, batch, seed)
        return
    batches = TokenBatches(tokens, length, batch, seed)
    steps = -(-batches.windows // batch)
    rows = np.concatenate([batches.rows(step, 0, batch) for step in range(steps)])
    assert rows.shape == (steps * batch, length + 1)
    assert (np.diff(rows) == 1).all()  # a window is consecutive tokens
    starts = rows[: batches.windows, 0]
    assert sorted(starts) == [length * window for window in range(batches.windows)]


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    ours, again, other = (TokenBatches(tokens, 10, 8, seed) for seed in (1, 1, 2))
    whole = [ours.rows(step, 0, 8) for step in range(40)]  # more than three epochs
    assert np.array_equal(again.rows(39, 0, 8), whole[39])
    for size in (2, 3, 5):
        shares = [again.rows(17, *row_range(8, rank, size)) for rank in range(size)]
        assert np.array_equal(np.concatenate(shares), whole[17])
    assert not np.array_equal(other.rows(0, 0, 8), whole[0])
    assert not np.array_equal(ours.rows(0, 0, 8), ours.rows(100, 0, 8))  # epochs differ in order


# Where documents come from.


def test_formats_hold_the_same_documents(tmp_path: Path) -> None:
    for index, text in enumerate(DOCUMENTS):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{index:03}.txt").write_text(text)
    lines = "".join(json.dumps({"n": 1, "body": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "lines.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.table({"body": DOCUMENTS}), tmp_path / "table.parquet")
    (tmp_path / "one.txt").write_text("\n<cut>\n".join(DOCUMENTS))
    expected = [text for text in DOCUMENTS if text]
    field = ("--data.text_field", "body")
    assert texts(tmp_path, "--data.path", tmp_path / "plain") == expected
    assert texts(tmp_path, "--data.path", tmp_path / "lines.jsonl", *field) == expected
    assert texts(tmp_path, "--data.path", tmp_path / "lines.jsonl.gz", *field) == expected
    assert texts(tmp_path, "--data.path", tmp_path / "table.parquet", *field) == expected
    assert texts(tmp_path, "--data.path", tmp_path / "*.parquet", *field) == expected
    cut = ("--data.text_separator", "\n<cut>\n")
    assert texts(tmp_path, "--data.path", tmp_path / "one.txt", *cut) == expected
    both = f"{tmp_path / 'one.txt'},{tmp_path / 'plain'}"
    assert texts(tmp_path, "--data.path", both, *cut) == expected + expected


def test_the_default_is_the_standard_library(tmp_path: Path) -> None:
    found = texts(tmp_path)
    assert (LIBRARY / "json" / "decoder.py").read_text() in found
    assert 5e6 < sum(map(len, found)) < 5e7


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": 1}\n', "'text' is a int, not a text"),
        ("a.jsonl", '{"text": "b"}\n{"body": "c"}\n', r"line 2 has no field 'text'; found body"),
        ("a.jsonl", '{"text": "b"}\n{"text', "line 2, is not JSON"),
        ("a.csv", "text\n", "is not one of"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        texts(tmp_path, "--data.path", file)
    assert str(file) in str(caught.value)


def _damaged() -> dict[str, bytes]:
    """Files of each kind that are cut, flipped, empty or something else."""
    table = pa.table({"text": [f"document {i}" * 9 for i in range(3000)]})
    into = io.BytesIO()
    pq.write_table(table, into)
    parquet, lines = into.getvalue(), gzip.compress(b'{"text": "some"}\n' * 999)
    return {
        "cut.parquet": parquet[: len(parquet) // 2],
        "flipped.parquet": parquet[:50] + bytes(byte ^ 255 for byte in parquet[50:])[:400],
        "spoilt.parquet": parquet[:60] + b"spoilt" * 20 + parquet[180:],
        "empty.parquet": b"",
        "cut.jsonl.gz": lines[: len(lines) // 2],
        "spoilt.jsonl.gz": lines[:20] + b"spoilt" + lines[26:],
        "no.jsonl.gz": b"{}",
        "bytes.jsonl": b'{"text": "\xff"}\n',
        "deep.jsonl": b"[" * 100_000,
    }


@pytest.mark.parametrize("name", _damaged())
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(_damaged()[name])
    with pytest.raises(ConfigError, match=r"cannot be read .*: mend it, or leave it out") as caught:
        texts(tmp_path, "--data.path", file)
    assert str(file) in str(caught.value)


def test_paths_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        texts(tmp_path, "--data.path", tmp_path / "absent")
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"body": ["a"]}), table)
    with pytest.raises(ConfigError, match="has no field 'text'; found body"):
        texts(tmp_path, "--data.path", table)


def test_the_split_is_by_content() -> None:
    held_out = [text for text in DOCUMENTS * 2 if sources.in_validation(text, 0.3)]
    assert 0 < len(held_out) < len(DOCUMENTS)
    assert all(held_out.count(text) == 2 for text in held_out if text)
    wider = [text for text in DOCUMENTS if sources.in_validation(text, 0.6)]
    assert set(held_out) < set(wider)


# Tokens.


def test_tokens_are_the_documents(tmp_path: Path, alone: World) -> None:
    config = load(tmp_path, "--data.path", LIBRARY / "email" / "*.py")
    opened = preparation.open_data(config, alone)
    (entry,) = (tmp_path / "cache").glob("tokens-*")
    tokenizer = bpe.read(entry / "tokenizer.json")
    for name, validation in (("train", False), ("val", True)):
        decoded = tokenizer.decode(
            np.fromfile(entry / f"{name}.bin", np.uint16), skip_special_tokens=False
        )
        expected = [
            text for text in DOCUMENTS if text and sources.in_validation(text, 0.2) == validation
        ]
        assert decoded.split("<|endoftext|>") == [*expected, ""]
    assert opened.vocab_size == 400
    assert opened.validation.shape[1] == 33


def test_the_cache_is_built_once_and_renewed_when_the_text_changes(
    tmp_path: Path, alone: World
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(DOCUMENTS))
    config = load(tmp_path, "--data.path", file, "--data.text_separator", "\n\n")
    first = preparation.open_data(config, alone)
    entries = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").iterdir()}
    assert sorted(entry.name.split("-")[0] for entry in entries) == ["tokenizer", "tokens"]
    assert preparation.open_data(config, alone).fingerprint == first.fingerprint
    now = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").iterdir()}
    assert now == entries
    file.write_text("\n\n".join(reversed(DOCUMENTS)))
    assert preparation.open_data(config, alone).fingerprint != first.fingerprint


def test_a_damaged_cache_entry_is_rebuilt(tmp_path: Path, alone: World) -> None:
    config = load(tmp_path, "--data.path", LIBRARY / "email")
    first = preparation.open_data(config, alone)
    rows = first.batches.rows(3, 0, 8)
    (entry,) = (tmp_path / "cache").glob("tokens-*")
    (entry / "train.bin").unlink()
    (entry / "train.bin").write_bytes(b"cut short")
    again = preparation.open_data(config, alone)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.batches.rows(3, 0, 8), rows)
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_rebuild_leaves_what_is_mapped(tmp_path: Path, alone: World) -> None:
    """As another job has it; and what a killed job left does not get into the new entry."""
    config = load(tmp_path, "--data.path", LIBRARY / "email")
    first = preparation.open_data(config, alone)
    rows = first.batches.rows(3, 0, 8)
    (entry,) = (tmp_path / "cache").glob("tokens-*")
    mapped = (entry / "train.bin").stat().st_ino
    (entry / "val.bin").write_bytes(b"cut short")
    (entry / "entry.json.tmp").write_text("half of a marker")
    preparation.open_data(config, alone)
    assert not (entry / "entry.json.tmp").exists()
    made = (entry / "train.bin").stat().st_ino
    assert made != mapped  # the map of `first` is of a file of its own
    assert np.array_equal(first.batches.rows(3, 0, 8), rows)
    preparation.open_data(config, alone)
    assert (entry / "train.bin").stat().st_ino == made


def build(entry: Path) -> dict[str, Any]:
    def fill(building: Path) -> dict[str, Any]:
        (building / f"content-{dist.get_rank()}").write_bytes(b"x" * 1000)
        time.sleep(0.2)  # so that the others come meanwhile
        return {"rank": dist.get_rank()}

    dist.barrier()
    return cache.build_entry(entry, fill)


def test_one_of_several_builders_builds(tmp_path: Path) -> None:
    first, *others = ranks.run(3, build, tmp_path / "entry")
    assert others == [first] * 2
    assert len(list((tmp_path / "entry").glob("content-*"))) == 1
    assert cache.read_entry(tmp_path / "entry") == first


def test_a_builder_that_waits_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = threading.Event()

    def slowly(building: Path) -> dict[str, Any]:
        begun.set()
        time.sleep(0.2)  # several times what is between two looks at the lock
        return {"built": 1}

    with ThreadPoolExecutor(1) as other:
        first = other.submit(cache.build_entry, tmp_path / "entry", slowly)
        begun.wait()
        assert cache.build_entry(tmp_path / "entry", slowly) == first.result()
    assert capsys.readouterr().err.count("waiting for another job") == 1


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(building: Path) -> dict[str, Any]:
        (building / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        cache.build_entry(tmp_path / "entry", fail)
    assert [file.name for file in (tmp_path / "entry").iterdir()] in ([], ["lock"])


def test_a_failure_to_prepare_ends_all_ranks(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\nnot json\n')
    config = launch_jobs.write_config(tmp_path, broken)
    for result in train(2, config, "--output", tmp_path / "out"):
        assert result.code == 2
        assert re.search(r"error: \S*broken.jsonl, line 2, is not JSON", result.err)
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pretrained_tokenizer(tmp_path: Path, alone: World) -> None:
    settings = load(tmp_path).tokenizer
    file = tmp_path / "bpe.json"
    bpe.train(DOCUMENTS, settings).save(str(file))
    arguments = ("--data.path", LIBRARY / "json", "--tokenizer.path", file)
    assert preparation.open_data(load(tmp_path, *arguments), alone).vocab_size == 400
    assert not list((tmp_path / "cache").glob("tokenizer-*"))
    with pytest.raises(ConfigError, match=r"no token '</s>'.*tokenizer\.end_of_text"):
        preparation.open_data(load(tmp_path, *arguments, "--tokenizer.end_of_text", "</s>"), alone)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"bpe\.json is not a tokenizers JSON file"):
        preparation.open_data(load(tmp_path, *arguments), alone)


def test_too_little_text_is_refused(tmp_path: Path, alone: World) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a single document")
    with pytest.raises(ConfigError, match=r"raise data\.val_fraction"):
        preparation.open_data(load(tmp_path, "--data.path", file), alone)


# Data sets of a hub.


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two JSONL shards, as `datasets` reads them from a folder or a hub."""
    folder = tmp_path_factory.mktemp("hub")
    paragraphs = [part for text in DOCUMENTS for part in text.split("\n\n") if part.strip()]
    for shard in range(2):
        with (folder / f"train-{shard}.jsonl").open("w") as file:
            for text in paragraphs[shard::2]:
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.mark.parametrize("split", ["", "train"])
def test_a_hub_s_validation_documents_are_held_out(hub: Path, tmp_path: Path, split: str) -> None:
    """By their content, or a split of its own."""
    given = ("--data.hf", hub, "--data.hf_val_split", split, "--data.hf_mb", 1.0)
    found = list(sources.open_source(load(tmp_path, *given).data).documents())
    held_out = [text for text, held in found if held]
    training = [text for text, held in found if not held]
    assert len(held_out) > 10
    assert len(training) > 100
    inside = [sources.in_validation(text, 0.2) for text in training]
    assert any(inside) is bool(split)
    if split:
        assert held_out == training[: len(held_out)]
    else:
        assert all(sources.in_validation(text, 0.2) for text in held_out)


def test_no_more_is_read_than_asked_for(hub: Path, tmp_path: Path) -> None:
    given = ("--data.hf", hub, "--data.hf_val_split", "train", "--data.hf_mb", 0.01)
    found = list(sources.open_source(load(tmp_path, *given).data).documents())
    longest = max(len(text) for text, _ in found)
    for wanted, least in ((False, 10_000), (True, 2_000)):
        assert least <= sum(len(text) for text, held in found if held is wanted) < least + longest


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    source = sources.open_source(DataConfig(hf=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"cannot open .*absent, split train"):
        next(iter(source.documents()))


@pytest.mark.thorough
def test_a_hub_s_text_is_read_once(hub: Path, tmp_path: Path) -> None:
    """And a run on it resumes exactly."""
    config = launch_jobs.write_config(tmp_path)
    job = (config, "--data.path", "", "--data.hf", hub)
    launch_jobs.succeed(2, *job, "--output", tmp_path / "whole")
    moved = hub.rename(tmp_path / "moved")
    launch_jobs.succeed(2, *job, "--output", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "step-00000008").rename(tmp_path / "gone")
    launch_jobs.succeed(2, *job, "--output", tmp_path / "parts", "--resume")
    assert launch_jobs.curve(tmp_path / "parts") == launch_jobs.curve(tmp_path / "whole")
    moved.rename(hub)


def test_one_file_is_cut_so_that_some_of_it_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"Paragraph {i} of a book. " * 8 for i in range(2000)))
    documents = texts(tmp_path, "--data.path", file)
    assert "\n\n".join(documents) == file.read_text()
    assert len(documents) > 50
    assert {sources.in_validation(text, 0.1) for text in documents} == {True, False}


def test_separator_as_a_shell_passes_it(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("one\n\ntwo\n\nthree")
    cut = ("--data.text_separator", r"\n\n")
    assert texts(tmp_path, "--data.path", file, *cut) == ["one", "two", "three"]


def test_null_texts_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert texts(tmp_path, "--data.path", file) == ["one", "two"]


def test_a_tokenizer_sees_no_more_than_its_sample() -> None:
    """The last document is cut: what comes after decides nothing."""
    config = options.load(None).tokenizer.model_copy(update={"vocab_size": 260, "sample_mb": 8e-6})
    words = ["aaaa", "bbbbcccccccccccccccc", "d" * 99]
    short = bpe.train(["aaaa", "bbbb"], config)
    assert bpe.fingerprint(bpe.train(words, config)) == bpe.fingerprint(short)
    longer = config.model_copy(update={"sample_mb": 24e-6})
    assert bpe.fingerprint(bpe.train(words, longer)) != bpe.fingerprint(short)
