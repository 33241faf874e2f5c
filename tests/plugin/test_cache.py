"""The teacher cache: what is kept is what the teacher says, whatever stops a build or damages a file."""

import fcntl
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dskd_plugin.cache import build as building
from dskd_plugin.cache import manifest, shards
from dskd_plugin.cache.build import batches, build
from dskd_plugin.cache.cached_teacher import CachedTeacher
from dskd_plugin.cache.fingerprint import difference, fingerprint
from dskd_plugin.cache.needs import Want, key_of, needed, positions_of, wanted
from dskd_plugin.cache.open import check_rows, check_whole, open_cache
from dskd_plugin.cache.ranks import Ranks
from dskd_plugin.cache.store import Store
from dskd_plugin.errors import DSKDSetupError, SettingError
from dskd_plugin.preflight import mistakes_of
from dskd_plugin.settings import parse_settings
from dskd_plugin.teachers.resolve import parts_of

pytestmark = pytest.mark.axolotl
CPU, ALONE = torch.device("cpu"), Ranks()
DO = "Run `dskd cache build RECIPE`."


@pytest.fixture(scope="module")
def prepare(tiny, tmp_path_factory, plugins_forgotten):
    """``prepare(**changes)``: a small recipe, its sides and its rows."""
    from benchmarks.tiny import small_recipe
    from dskd_plugin.host import prepared

    place = tmp_path_factory.mktemp("prepared")
    kept = os.environ.get("AXOLOTL_LOG_LEVEL")

    def run(teacher=None, **changes):
        recipe = small_recipe(tiny, place)
        recipe = {**recipe, "val_set_size": 0.25, **changes.pop("recipe", {})}
        recipe["dskd"] = {"teacher": {**recipe["dskd"]["teacher"], **(teacher or {})}, **changes}
        file = place / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        with plugins_forgotten():
            (one,) = prepared.prepare(file)
        return one

    yield run
    os.environ.pop("AXOLOTL_LOG_LEVEL", None)
    if kept is not None:
        os.environ["AXOLOTL_LOG_LEVEL"] = kept


@pytest.fixture(scope="module")
def run(prepare):
    return prepare(span_weight=1.0)


@pytest.fixture(scope="module")
def teacher(run):
    from dskd_plugin.host.teacher_source import live

    return live(run.sides.run, device=CPU, packed=False, attn_implementation="sdpa")


@pytest.fixture
def said():
    """What the order that was made last has told its user."""
    return []


@pytest.fixture
def order(run, teacher, tmp_path, said):
    """``order(**changes)``: float32 states of all rows into one folder."""
    from dskd_plugin.host.teacher_source import order_of

    def make(prepared=run, datasets=None, folder=tmp_path / "cache", **changes):
        said.clear()
        datasets = prepared.datasets if datasets is None else datasets
        options = {"load": lambda: teacher, "say": said.append, "states": "float32", "batch_tokens": 256}
        return replace(order_of(prepared.sides, folder, datasets, **options), **changes)

    return make


def opened(order, sides, datasets, **more):
    return open_cache(order.folder, sides, datasets, ranks=ALONE, device=CPU, advice=DO, **more)


def samples_of(datasets):
    for dataset in datasets.values():
        for row in dataset:
            positions = next(iter(needed(dataset_of(row)))).positions
            yield torch.tensor(row["teacher_input_ids"]), torch.from_numpy(positions).long()


def dataset_of(*rows):
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def batch_of(samples, bins):
    """What a step asks: flat ids, lengths, samples of each packed row, and rows in an order of their own."""
    ids, lengths = torch.cat([ids for ids, _ in samples]), torch.tensor([len(ids) for ids, _ in samples])
    starts = lengths.cumsum(0) - lengths
    rows = torch.cat([positions + start for (_, positions), start in zip(samples, starts, strict=True)])
    return ids, lengths, torch.tensor(bins), rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def equal(found, expected, tolerance=1e-6):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_teacher_in_any_batch(run, teacher, order, said):
    one = order()
    build(one, ALONE)
    assert said[0].startswith(f"{one.folder}: 48 samples, 0 of them there; to compute: 48 samples of 2,595 tokens, ")
    cached = opened(one, run.sides, run.datasets)
    samples = list(samples_of(run.datasets))
    random.Random(0).shuffle(samples)
    for start in range(0, 48, 6):
        batch = batch_of(samples[start : start + 6], [1, 3, 2])
        found = cached.rows(*batch)
        assert found.dtype == torch.float32 and equal(found, teacher.rows(*batch))
    empty = cached.rows(*batch[:3], torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0, 48) and cached.width == 48
    assert torch.equal(cached.head.weight_VD, teacher.head.weight_VD) and cached.head.vocab_size == 418
    # Nothing of the tokenizer is kept: it may have got a token since, for which the head has a row.
    assert set(manifest.read(one.folder, DO).head) == {"scale", "softcap"}


def test_samples_that_are_computed_alone_are_kept_bit_for_bit(run, teacher, order):
    one = order(batch_tokens=1)
    build(one, ALONE)
    cached = opened(one, run.sides, run.datasets)
    for ids, positions in samples_of(run.datasets):
        batch = ids, torch.tensor([len(ids)]), torch.tensor([1]), positions
        assert torch.equal(cached.rows(*batch), teacher.rows(*batch))


def test_half_precision_is_the_nearest(run, teacher, order):
    one = order(batch_tokens=1, states="bfloat16")
    build(one, ALONE)
    cached = opened(one, run.sides, run.datasets)
    ids, positions = next(samples_of(run.datasets))
    batch = ids, torch.tensor([len(ids)]), torch.tensor([1]), positions
    assert torch.equal(cached.rows(*batch), teacher.rows(*batch).bfloat16().float())


def test_positions_are_those_that_the_collator_asks_for(run):
    from dskd_plugin.host.collator import pair_rows

    asked_for_spans = 0
    for dataset in run.datasets.values():
        for one in needed(dataset):
            row = dataset[one.place]
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            batch = pair_rows(ids, labels, [[(0, row)]], cross_attention=False)
            asked = torch.cat([batch.teacher_text.rows_M, batch.spans.teacher_rows_Q]).unique()
            asked_for_spans += len(batch.spans.teacher_rows_Q)
            assert asked.tolist() == one.positions.tolist()
            assert one.key == key_of(np.array(row["teacher_input_ids"])) and one.length == len(row["teacher_input_ids"])
    assert asked_for_spans


def test_positions_of_a_method_that_reads_on_are_those_that_the_collator_asks_for(prepare, order, tmp_path):
    """And a cache of rows that another method pairs lacks them, which is told before a step."""
    from dskd_plugin.host.collator import pair_rows

    said = ["returned lamps", "lamps\n- items 🙂🙂 naïvecafé\n- code"]
    rows = [
        {"messages": [{"role": "user", "content": f"red {k}"}, {"role": "assistant", "content": text}]}
        for k in range(8)
        for text in said
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(file), "ds_type": "json", "type": "chat_template"}
    by_bytes, further = prepare(method="bpm", recipe={"datasets": [entry]}), 0
    for dataset in by_bytes.datasets.values():
        for one in needed(dataset):
            row = dataset[one.place]
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            batch = pair_rows(ids, labels, [[(0, row)]], cross_attention=False)
            asked = torch.cat([batch.teacher_text.rows_M, batch.reach.teacher_rows_Q]).unique()
            further += len(batch.reach.teacher_rows_Q)
            assert asked.tolist() == one.positions.tolist()
    assert further
    starts = prepare(method="overlap_kd", recipe={"datasets": [entry]})
    build(order(starts), ALONE)
    with pytest.raises(SettingError, match="which tokens the method pairs is 'bytes' and was 'starts'"):
        opened(order(starts), by_bytes.sides, by_bytes.datasets)
    build(order(by_bytes), ALONE)
    opened(order(by_bytes), by_bytes.sides, by_bytes.datasets)


def test_positions_beyond_the_row_and_of_cut_spans_are_left_out():
    targets, spans = np.array([0, 1, 4, 9, 4]), np.array([1, 2, 5, 7, 1, 2, 8, 10, 3, 4, 0, 2])
    assert positions_of(9, targets, spans).tolist() == [0, 3, 4, 5]
    assert positions_of(9, np.zeros(0, int), np.zeros(0, int)).tolist() == []
    more = np.array([3, 2, 0, 0, 5])
    assert positions_of(9, targets, np.zeros(0, int), more).tolist() == [0, 1, 2, 3]


def test_one_sample_in_several_datasets_is_computed_once_with_all_that_any_of_them_needs():
    rows = [{"teacher_input_ids": [5, 6, 7, 8], "aligned_teacher": targets} for targets in ([1], [3], [], [2, 3])]
    found = wanted([dataset_of(*rows[:3]), dataset_of(rows[3])])
    ((key, want),) = found.items()
    assert key == key_of(np.array([5, 6, 7, 8])) and want.positions.tolist() == [0, 1, 2] and want.at == (0, 0)


def test_keys_do_not_collide_where_halves_do(tmp_path):
    (tmp_path / "shards").mkdir()
    keys = [bytes(16), bytes(15) + b"\1", b"\xff" * 16, b"\xff" * 8 + bytes(8)]
    samples = [
        shards.Computed(key, np.array([k, 7], np.int32), torch.full((2, 3), float(k))) for k, key in enumerate(keys)
    ]
    store = Store(tmp_path, [shards.write(tmp_path, samples[:2]), shards.write(tmp_path, samples[2:])])
    assert len(store) == 4
    for number, key in enumerate(keys):
        into = torch.empty(2, 3)
        store.pick([store.find(key, np.array([7, number]))], into)
        assert (into == number).all()
        assert store.find(key, np.array([5])) is None and store.find(key, np.array([8])) is None
    assert store.find(b"\xfe" * 16, np.array([0])) is None and Store(tmp_path, []).find(keys[0], np.array([0])) is None


def test_states_are_mapped_and_not_read(tmp_path):
    (tmp_path / "shards").mkdir()
    sample = shards.Computed(bytes(16), np.arange(1 << 14, dtype=np.int32), torch.randn(1 << 14, 1024))
    info = shards.write(tmp_path, [sample])
    assert info.bytes > 64 << 20
    before = psutil.Process().memory_info().rss
    store = Store(tmp_path, [info])
    assert psutil.Process().memory_info().rss - before < 8 << 20
    into = torch.empty(1, 1024)
    store.pick([store.find(bytes(16), np.array([777]))], into)
    assert torch.equal(into[0], sample.states_nE[777])
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_read_ahead_reads_the_rows_that_are_asked_for(run, order, monkeypatch):
    """In a worker of the dataloader, and nowhere else."""
    from torch.utils.data import DataLoader, get_worker_info

    from dskd_plugin.batch import KEY, ask
    from dskd_plugin.host.collator import PaddedPairCollator

    one = order()
    build(one, ALONE)
    cached = opened(one, run.sides, run.datasets)
    collator = PaddedPairCollator(run.sides.tokenizers[0], sources=[cached])
    assert not pickle.loads(pickle.dumps(collator)).sources
    picked, log = [], one.folder / "read"

    def read(store, found):
        assert get_worker_info() is not None
        with log.open("a") as stream:
            stream.write(f"{rows_of(found)}\n")

    monkeypatch.setattr(Store, "read", read)
    monkeypatch.setattr(Store, "pick", lambda store, found, into: picked.append(rows_of(found)))
    dataset = run.datasets["training"]
    for workers in (0, 1):
        batches = DataLoader(dataset, batch_size=4, collate_fn=collator, num_workers=workers)
        for batch in batches:
            ask(batch[KEY], cached)
        assert len(picked) == len(dataset) // 4
        assert workers == 0 or log.read_text().splitlines() == picked
        assert log.is_file() == (workers > 0)
        picked.clear()


def rows_of(found):
    return str([(one.shard, one.rows_N.tolist()) for one in found])


def test_batches_are_of_like_length_and_never_above_the_budget():
    lengths = [3, 9, 9, 1, 30, 4, 4]
    wants = {bytes([k]): Want((0, k), length, np.zeros(1)) for k, length in enumerate(lengths)}
    found = [[wants[key].length for key in batch] for batch in batches(wants, 20)]
    assert found == [[30], [9, 9], [4, 4, 3, 1]]


def test_a_device_map_gives_the_same_rows(run, teacher):
    from dskd_plugin.host.teacher_source import live

    mapped = live(run.sides.run, device="auto", packed=False, attn_implementation="sdpa")
    batch = batch_of(list(samples_of(run.datasets))[:4], [1] * 4)
    assert equal(mapped.rows(*batch), teacher.rows(*batch)) and mapped.input_device == CPU


def test_answers_that_nobody_could_know_are_read_by_the_live_teacher(run, teacher, order):
    one = order()
    build(one, ALONE)
    cached = opened(one, run.sides, run.datasets, fallback=teacher)
    samples = list(samples_of(run.datasets))[:5]
    for new in (1, 3):
        samples[new] = samples[new][0].flip(0), samples[new][1]
    samples[4] = samples[4][0], torch.arange(len(samples[4][0]))  # known, but not at all of these places
    batch = batch_of(samples, [2, 1, 2])
    assert equal(cached.rows(*batch), teacher.rows(*batch))
    with pytest.raises(SettingError, match="expected the teacher's states of every sample of the run, got none of one"):
        opened(one, run.sides, run.datasets).rows(*batch)


# -- builds ------------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_computed(run, order, said):
    first = {"training": run.datasets["training"].select(range(20))}
    one = order(datasets=first)
    (shard,) = build(one, ALONE).shards
    marked = (one.folder / shard.file).stat().st_mtime_ns
    whole = order()
    done = build(whole, ALONE)
    assert "48 samples, 20 of them there; to compute: 28 samples" in said[0]
    assert done.samples == 48 and shard in done.shards and (one.folder / shard.file).stat().st_mtime_ns == marked
    assert len(done.made_for) == 1
    again = order(load=lambda: pytest.fail("the teacher was loaded"))
    assert build(again, ALONE) == done and "48 of them there" in said[0]


def test_another_method_of_the_same_teacher_adds_what_it_needs_and_reads_the_rest(prepare, run, order):
    build(order(), ALONE)
    attending = prepare(alignment="cma", spaces="both", target="projected")
    one = order(attending)
    before = manifest.read(one.folder, DO)
    cached = CachedTeacher(one.folder, before, vocab_size=418, device=CPU, advice=DO)
    with pytest.raises(SettingError, match=r"head\.safetensors: expected the teacher's embeddings, for alignment: cma"):
        check_rows(cached, before, attending.sides, attending.datasets, DO)
    build(one, ALONE)
    after = opened(one, attending.sides, attending.datasets)
    assert after.embedding.shape == (418, 48)
    opened(order(), run.sides, run.datasets)
    assert len(manifest.read(one.folder, DO).made_for) == 2


def test_what_a_killed_process_was_writing_is_removed(order):
    """The names are those of our half-written files and of the ones that safetensors writes first."""
    one = order()
    done = build(one, ALONE)
    names = (".tmpHlBXna", "head.safetensors.7.partial", "shards/.tmp3aQ9zB", "shards/ab.safetensors.7.partial")
    left = [one.folder / name for name in names]
    for file in left:
        file.write_bytes(b"half of it")
    assert build(one, ALONE) == done
    assert not [file for file in left if file.exists()]


def in_a_fork(work):
    def with_a_lock_of_its_own():
        # A process that is killed while it draws a bar would keep the lock that its parent's bars wait for.
        tqdm.set_lock(threading.RLock())
        work()

    process = multiprocessing.get_context("fork").Process(target=with_a_lock_of_its_own)
    process.start()
    return process


def test_killed_at_any_moment_it_goes_on(run, teacher, order, monkeypatch):
    """kill -9 after ever longer times, until a build has come to its end."""
    monkeypatch.setattr(building, "SHARD_BYTES", 1)
    one = order(batch_tokens=1)
    moments, kills = random.Random(1), 0
    for attempt in range(40):
        process = in_a_fork(lambda: build(one, ALONE))
        process.join(0.02 + moments.random() * 0.02 * attempt)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        finished = shards.finished(one.folder)
        assert not shards.damaged(one.folder, finished, afresh=True)
    assert process.exitcode == 0 and kills >= 2
    done = manifest.read(one.folder, DO)
    assert done.samples == 48 and len(done.shards) == 48
    assert {file.name for file in one.folder.rglob("*") if file.is_file()} == {
        *("lock", "manifest.json", "verified.json", "head.safetensors"),
        *(Path(shard.file).name for shard in done.shards),
        *(Path(shard.file).with_suffix(".json").name for shard in done.shards),
    }
    cached = opened(one, run.sides, run.datasets)
    batch = batch_of(list(samples_of(run.datasets))[:6], [1] * 6)
    assert equal(cached.rows(*batch), teacher.rows(*batch))


def failing(teacher, batches, error):
    """The teacher, which reads so many batches and then raises the error."""

    class Failing:
        head, input_device, embedding = teacher.head, CPU, teacher.embedding
        left = batches

        def rows(self, *batch):
            self.left -= 1
            if self.left < 0:
                raise error
            return teacher.rows(*batch)

    return Failing()


def test_an_interrupted_build_keeps_what_it_has(teacher, order, said):
    with pytest.raises(KeyboardInterrupt):
        build(order(load=lambda: failing(teacher, 3, KeyboardInterrupt())), ALONE)
    rest = order()
    build(rest, ALONE)
    assert "48 samples, 0 of them" not in said[0]


def test_a_batch_that_does_not_fit_is_told_with_the_way_on(teacher, order, said):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    told = r"--batch-tokens: expected batches that fit .* got one that does not \(CUDA out of memory[^\n]*\)\. What is"
    with pytest.raises(DSKDSetupError, match=told):
        build(order(load=lambda: failing(teacher, 2, full)), ALONE)
    rest = order()
    build(rest, ALONE)
    assert "48 samples, 0 of them" not in said[0]


def test_two_processes_share_the_work(run, teacher, order, tmp_path):
    one = order(folder=tmp_path / "shared")

    def rank(number):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=number, world_size=2)
        build(one, Ranks.here())
        torch.distributed.destroy_process_group()

    ranks = [in_a_fork(lambda number=number: rank(number)) for number in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    done = manifest.read(one.folder, DO)
    assert sorted(shard.samples > 10 for shard in done.shards) == [True, True] and done.samples == 48
    cached = opened(one, run.sides, run.datasets)
    batch = batch_of(list(samples_of(run.datasets)), [1] * 48)
    assert equal(cached.rows(*batch), teacher.rows(*batch))


def test_an_error_of_one_process_is_that_of_all(tmp_path):
    def rank(number):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=number, world_size=2)
        ranks = Ranks.here()
        assert ranks.first_does(lambda: number) == 0
        with pytest.raises(SettingError, match=r"b: expected 1, got 2\."):
            ranks.agree(error=SettingError("b", 1, 2, "Do it.") if number else None)

    ranks = [in_a_fork(lambda number=number: rank(number)) for number in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_two_builds_into_one_folder(order):
    one = order()
    one.folder.mkdir()
    with (one.folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(
            SettingError, match="expected a folder into which nothing else is built, got one of a build"
        ):
            build(one, ALONE)
    build(one, ALONE)


def test_a_disk_without_room_is_told_before_the_teacher_is_loaded(order, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    one = order(load=lambda: pytest.fail("the teacher was loaded"))
    with pytest.raises(SettingError, match=r"MiB of free space for the teacher's states and head, got 0\.0 MiB\. Free"):
        build(one, ALONE)


def test_the_room_for_the_head_is_told_and_needed(order, monkeypatch):
    """A teacher's head takes more than the states of a few rows."""
    said = []
    one = order(say=said.append)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=one.head_bytes))
    with pytest.raises(SettingError, match="free space"):
        build(one, ALONE)
    monkeypatch.undo()
    build(one, ALONE)
    assert f"the teacher's head, {one.head_bytes / 2**20:,.1f} MiB" in said[0]
    assert one.head_bytes <= (one.folder / "head.safetensors").stat().st_size < one.head_bytes + 1000
    build(one, ALONE)
    assert "the teacher's head" not in said[-1]


def test_a_disk_that_gets_full_leaves_nothing_half_written(order):
    one = order()
    (one.folder / "shards").mkdir(parents=True)
    read, write = os.pipe()

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the head fits, the states do not
        try:
            build(one, ALONE)
        except SettingError as error:
            os.write(write, str(error).encode())

    in_a_fork(limited).join()
    told = os.read(read, 4000).decode()
    assert f"{one.folder}: expected room and permission to write " in told and "it goes on from here." in told, told
    assert not list(one.folder.rglob("*.partial")) and not list(one.folder.rglob("shards/*"))
    assert build(one, ALONE).samples == 48


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"expected the checksum \w{16}, got \w{16}: its content has changed"),
        (cut, r"expected [\d,]+ bytes, got [\d,]+: the file is cut short"),
        (Path.unlink, r"expected [\d,]+ bytes, got no such file"),
    ],
)
@pytest.mark.parametrize("what", ["shard", "head"])
def test_a_damaged_file_is_named_and_made_again(run, order, damage, message, what):
    one = order()
    done = build(one, ALONE)
    opened(one, run.sides, run.datasets)
    file = one.folder / (done.shards[0].file if what == "shard" else "head.safetensors")
    damage(file)
    with pytest.raises(SettingError, match=f"{file}: {message}. Run `dskd cache build RECIPE`"):
        opened(one, run.sides, run.datasets)
    from dskd_plugin.cli import main

    result = CliRunner().invoke(main, ["cache", "verify", str(one.folder)])
    assert result.exit_code == 1 and str(file) in result.output
    build(order(), ALONE)
    opened(one, run.sides, run.datasets)
    assert CliRunner().invoke(main, ["cache", "verify", str(one.folder)]).exit_code == 0


def test_what_was_read_whole_is_not_read_again(run, order, monkeypatch):
    one = order()
    done = build(one, ALONE)
    check_whole(one.folder, done, DO)
    monkeypatch.setattr(shards, "sha256", lambda *_: pytest.fail("read again"))
    check_whole(one.folder, done, DO)
    os.utime(one.folder / done.shards[0].file)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        check_whole(one.folder, done, DO)


def another(tiny, folder):
    shutil.copytree(tiny["teacher"], folder)
    return folder


def test_another_teacher_is_refused_and_the_same_under_another_name_is_not(prepare, run, order, tiny, tmp_path):
    one = order()
    build(one, ALONE)
    copy = another(tiny, tmp_path / "copy")
    moved = prepare({"model": str(copy)}, span_weight=1.0)
    opened(one, moved.sides, moved.datasets)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for refuse in (lambda: opened(one, moved.sides, moved.datasets), lambda: build(order(moved), ALONE)):
        with pytest.raises(
            SettingError, match=r"\(model.safetensors \w{32}\), got one of another teacher, .*/teacher'"
        ):
            refuse()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 77.0}))
    with pytest.raises(SettingError, match=r"\(config.json \w{32}\), got one of another teacher"):
        opened(one, moved.sides, moved.datasets)


def test_another_dtype_of_the_teacher_or_of_the_states(prepare, order, run):
    one = order()
    build(one, ALONE)
    half = prepare({"dtype": "bfloat16"}, span_weight=1.0)
    said = r"the teacher with dskd.teacher.dtype 'bfloat16', got one with 'float32'. .* --out <another folder>"
    with pytest.raises(SettingError, match=said):
        opened(one, half.sides, half.datasets)
    with pytest.raises(SettingError, match=r"--dtype: expected float32, as in .*, got bfloat16"):
        build(order(states="bfloat16"), ALONE)


@pytest.mark.parametrize("kind", ["template", "rules", "student", "rows"])
def test_missing_rows_are_counted_and_the_reason_is_named(prepare, run, order, tmp_path, monkeypatch, tiny, kind):
    one = order()
    build(one, ALONE)
    changed, reason = run, "; since it was made, "
    if kind == "template":
        template = tmp_path / "t.jinja"
        template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
        changed = prepare({"chat_template": str(template)}, span_weight=1.0)
        reason += "the teacher's chat template is '"
    if kind == "rules":
        monkeypatch.setattr(manifest, "RULES", 99)
        reason += "version of the alignment rules is 99 and was "
    if kind == "student":
        changed = prepare(recipe={"base_model": tiny["teacher"]})
        reason += "the student's tokenizer is '"
    datasets = dict(changed.datasets)
    # One row that no build has seen.
    row = {**datasets["training"][0], "teacher_input_ids": [3, 4, 5, 6], "aligned_teacher": [2]}
    datasets["training"] = dataset_of(row)
    datasets.pop("validation")
    if kind == "rows":
        reason = ". Run `dskd cache build RECIPE`"
    with pytest.raises(SettingError) as error:
        opened(one, changed.sides, datasets)
    text = str(error.value)
    assert (
        "expected the teacher's states of all 1 samples of the run, got those of 0; 1 lack some or all places" in text
    )
    assert "(the first: training row 0, '" in text and reason in text and text.endswith("It adds what is missing.")


def test_a_folder_that_is_no_cache(order, run, tmp_path):
    one = order()
    build(one, ALONE)
    file = one.folder / "manifest.json"
    content = json.loads(file.read_text())
    for broken, message in (
        (json.dumps({**content, "format": 7}), "expected a teacher cache of format 2, got format 7 of dskd"),
        (file.read_text()[:-50], "got a file that is cut short"),
        (json.dumps({**content, "colour": 1}), "expected the entries of a teacher cache, got TypeError"),
    ):
        file.write_text(broken)
        for refuse in (lambda: opened(one, run.sides, run.datasets), lambda: build(order(), ALONE)):
            with pytest.raises(SettingError, match=message):
                refuse()
    file.unlink()
    for refuse in (lambda: opened(one, run.sides, run.datasets), lambda: manifest.read(tmp_path, "Build it.")):
        with pytest.raises(SettingError, match="expected the folder of a teacher cache, got one without") as error:
            refuse()
        assert "emove" not in str(error.value)
    with pytest.raises(SettingError, match="expected the manifest of the shards beside it, got none"):
        build(order(), ALONE)


def test_a_recipe_that_names_no_cache_is_told_at_once(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe["dskd"]["teacher"]["cache"] = "states"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def said(command):
        return mistakes_of("axolotl.cli.main", ["axolotl", command, "r.yaml"], [])

    assert said("train") == (
        "dskd.teacher.cache: expected the folder of a teacher cache, or auto, got 'states', which does not exist in "
        f"{tmp_path}. Run `dskd cache build r.yaml`."
    )
    assert said("preprocess") is None  # the rows come first
    (tmp_path / "states").mkdir()
    assert "'states', without a manifest.json. Run `dskd cache build r.yaml`." in said("evaluate")
    recipe["dskd"]["teacher"]["cache"] = "auto"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert said("train") is None


def test_fine_tuning_has_no_use_for_a_cache():
    with pytest.raises(ValueError, match=r"dskd\.teacher\.cache: expected it unset beside method: sft, got 'x'"):
        parse_settings({"teacher": {"model": "t", "cache": "x"}, "method": "sft"})


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_builds_tells_and_verifies(prepare, run, tmp_path, plugins_forgotten):
    from dskd_plugin.cli import main

    file, folder = tmp_path / "r.yaml", tmp_path / "states"
    written = yaml.safe_load(Path(run.sides.run.recipe["axolotl_config_path"]).read_text())
    named = {"teacher": {**written["dskd"]["teacher"], "cache": str(folder)}}  # which is not there yet
    file.write_text(yaml.safe_dump({**written, "dskd": {**written["dskd"], **named}}))
    with plugins_forgotten():
        result = CliRunner().invoke(main, ["cache", "build", str(file), "--device", "cpu"])
        assert result.exit_code == 0, result.output
    assert "rows of 48 x bfloat16" in result.output and "Done: 48 samples, " in result.output
    assert "In the recipe" not in result.output
    told = CliRunner().invoke(main, ["cache", "info", str(folder)]).output
    assert "48 samples" in told and f"teacher: {written['dskd']['teacher']['model']}, float32" in told
    assert "states: bfloat16, 48 wide, in 1 shards" in told and "made for: rules " in told
    assert CliRunner().invoke(main, ["cache", "verify", str(folder)]).exit_code == 0
    result = CliRunner().invoke(main, ["cache", "info", str(tmp_path)])
    assert result.exit_code == 1 and "expected the folder of a teacher cache, got one without" in result.output


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """``hub(commit)``: the folder of a snapshot of org/teacher, without its weights, which main is then."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--teacher"

    def at(commit):
        shutil.copytree(tiny["teacher"], model / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)
        return model / "snapshots" / commit

    return at


def test_a_hub_teacher_is_computed_once(hub, tiny, run, tmp_path, plugins_forgotten, monkeypatch):
    """``auto`` names the same folder while the weights of a hub id are not here yet and when they are."""
    from dskd_plugin.cli import main
    from dskd_plugin.host import teacher_source

    snapshot, weights = hub("a" * 40), Path(tiny["teacher"]) / "model.safetensors"
    written = yaml.safe_load(Path(run.sides.run.recipe["axolotl_config_path"]).read_text())
    named = {"teacher": {"model": "org/teacher", "dtype": "float32", "cache": "auto"}}
    file = tmp_path / "r.yaml"
    recipe = {**written, "dataset_prepared_path": str(tmp_path / "prepared"), "dskd": {**written["dskd"], **named}}
    file.write_text(yaml.safe_dump(recipe))
    loaded, real = [], teacher_source.live

    def fetch_and_load(*args, **kwargs):
        shutil.copy(weights, snapshot)
        loaded.append(snapshot)
        return real(*args, **kwargs)

    monkeypatch.setattr(teacher_source, "live", fetch_and_load)

    def built():
        with plugins_forgotten():
            result = CliRunner().invoke(main, ["cache", "build", str(file), "--device", "cpu"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "to compute: 48 samples" in built()
    shutil.copy(weights, snapshot / "consolidated.safetensors")  # another tool fetches the rest of the repository
    assert "48 samples, 48 of them there; to compute: 0 samples" in built()
    assert len(loaded) == len(list((tmp_path / "prepared").glob("dskd-cache-*"))) == 1


def test_the_folder_of_auto_is_one_for_each_teacher(hub, tiny, tmp_path):
    from types import SimpleNamespace

    from dskd_plugin.host.teacher_source import automatic_folder

    def of(model, **more):
        settings = parse_settings({"teacher": {"model": str(model), "cache": "auto", **more}})
        parts = SimpleNamespace(parts=parts_of(settings.teacher))
        recipe = {"dataset_prepared_path": str(tmp_path / "prepared" / "rows")}
        return automatic_folder(SimpleNamespace(run=SimpleNamespace(settings=settings, teacher=parts, recipe=recipe)))

    hub("a" * 40)
    first = of("org/teacher")
    assert of("org/teacher") == first != of("org/teacher", dtype="float32")
    hub("b" * 40)  # weights of the same configuration
    assert of("org/teacher") != first and of("org/teacher", revision="a" * 40) == first
    # A folder has its weights here, and may be trained again in place.
    folder = another(tiny, tmp_path / "big")
    local = of(folder)
    assert of(tiny["teacher"]) == local
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2}, folder / "model.safetensors")
    assert of(folder) != local


def test_the_benchmark_runs(tmp_path):
    from benchmarks.cache import main

    main(["--size", "tiny", "--repeats", "1", "--results", str(tmp_path / "results.csv")])
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert any(",cache," in row and '"build, tokens/s"' in row and "bare decoder" in row for row in rows)
    assert rows[-1].endswith("python -m benchmarks.cache --size tiny --repeats 1")


# -- a teacher by its content ------------------------------------------------------------------------------------------


def test_a_fingerprint_sees_each_part_and_not_the_place(tiny, tmp_path):
    def of(folder):
        return fingerprint(parts_of(parse_settings({"teacher": {"model": str(folder)}}).teacher))

    folder = tmp_path / "big"
    shutil.copytree(tiny["teacher"], folder)
    assert difference(of(tiny["teacher"]), of(folder)) is None
    first = of(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2}, folder / "model.safetensors")
    assert difference(first, of(folder))[0] == "model.safetensors"
    (folder / "model.safetensors").unlink()
    assert difference(first, of(folder)) is None and of(folder)["weights"] == {}
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    assert difference(first, of(folder))[0] == "model-00001-of-00001.safetensors"


def test_weights_in_a_form_that_is_not_loaded_do_not_make_another_teacher(tiny, tmp_path):
    def of(folder):
        return fingerprint(parts_of(parse_settings({"teacher": {"model": str(folder)}}).teacher))

    folder = another(tiny, tmp_path / "big")
    whole, first = folder / "model.safetensors", of(folder)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        shutil.copy(whole, folder / name)
    assert of(folder) == first and list(first["weights"]) == ["model.safetensors"]
    names = [f"model-{k}-of-00002.safetensors" for k in ("00001", "00002")]
    for name in names:
        shutil.copy(whole, folder / name)
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert of(folder) == first  # transformers prefers the one file
    whole.unlink()
    sharded = of(folder)
    assert list(sharded["weights"]) == names
    (folder / names[1]).unlink()  # not fetched yet, or removed
    assert list(of(folder)["weights"]) == names[:1] and difference(sharded, of(folder)) is None
