"""Crops: every byte once per epoch, ranks apart, the same whoever asks and whenever."""

import warnings

import numpy as np
import pytest
import torch

from model.data import CropSampler, DataError, SourceSpec, open_store


def numbered(n):
    """uint8 [n] in which any eight bytes tell where they are."""
    return np.random.default_rng(5).integers(0, 256, n, np.uint8)


@pytest.mark.parametrize(("n", "length", "batch"), [(1000, 10, 5), (1003, 10, 7), (64, 64, 1), (65, 64, 3), (9, 1, 4)])
def test_an_epoch_covers_every_byte_without_replacement(n, length, batch):
    region = numbered(n)
    sampler = CropSampler(region, length, batch, seed=3)
    windows = -(-n // length)
    assert sampler.samples_per_epoch == windows
    starts = np.concatenate([sampler.starts(i) for i in range(-(-3 * windows // batch))])[: 3 * windows]
    phases = set()
    for epoch in starts.reshape(3, windows):
        assert len(set(epoch)) == windows
        seen = np.bincount((epoch[:, None] + np.arange(length)).ravel() % n, minlength=n)
        assert seen.min() == 1 and seen.sum() == windows * length and seen.max() <= 2
        assert (seen == 2).sum() == windows * length - n
        phases.add(tuple(epoch))
    assert len(phases) == 3 or windows == 1


def test_batches_hold_the_bytes_at_their_starts():
    region = numbered(777)
    for crops, offsets in (("any", None), ("document", np.array([0, 5, 300, 301, 777]))):
        sampler = CropSampler(region, 50, 8, seed=0, crops=crops, offsets=offsets)
        for index in range(30):
            batch = sampler.batch(index)
            assert batch.shape == (8, 50) and batch.dtype == torch.uint8
            for row, start in zip(batch.numpy(), sampler.starts(index)):
                assert bytes(row) == bytes(np.concatenate([region, region])[start : start + 50])


def test_ranks_are_disjoint_and_together_are_one_job():
    region, world = numbered(4096), 4
    one = CropSampler(region, 16, 32, seed=1)
    ranks = [CropSampler(region, 16, 8, seed=1, rank=r, world_size=world) for r in range(world)]
    starts = [[rank.starts(i) for i in range(8)] for rank in ranks]
    seen = np.concatenate([s for rank in starts for s in rank])
    assert len(set(seen)) == len(seen) == one.samples_per_epoch
    for i in range(8):
        assert np.array_equal(np.concatenate([rank[i] for rank in starts]), one.starts(i))


def test_document_crops_do_not_depend_on_the_split_among_ranks():
    options = {"crops": "document", "offsets": np.arange(0, 4097, 64)}
    one = CropSampler(numbered(4096), 16, 32, seed=1, **options)
    ranks = [CropSampler(numbered(4096), 16, 8, seed=1, rank=r, world_size=4, **options) for r in range(4)]
    for i in (0, 1, 1000):
        assert np.array_equal(np.concatenate([rank.starts(i) for rank in ranks]), one.starts(i))
    assert len(np.unique(np.concatenate([one.starts(i) for i in range(100)]))) > 1500


@pytest.mark.parametrize("crops", ["any", "document"])
def test_deterministic_and_stateless(crops):
    region, offsets = numbered(5000), np.arange(0, 5001, 50)

    def make(seed=1, **options):
        return CropSampler(region, 32, 4, seed, crops=crops, offsets=offsets, **options)

    a, b = make(), make()
    forward = [a.batch(i) for i in range(100)]
    backward = [b.batch(i) for i in reversed(range(100))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(forward, backward))
    for other in (make(seed=2), make(stream=1)):
        assert sum(torch.equal(x, other.batch(i)) for i, x in enumerate(forward)) < 3


@pytest.mark.parametrize("crops", ["any", "document"])
def test_resume_equals_unbroken(crops):
    def make(**options):
        offsets = np.arange(0, 3001, 100)
        return CropSampler(numbered(3000), 20, 6, 9, crops=crops, offsets=offsets, **options)

    unbroken = make()
    whole = [unbroken.next() for _ in range(60)]
    first = make()
    head = [first.next() for _ in range(37)]
    second = make()
    second.load_state_dict(first.state_dict())
    tail = [second.next() for _ in range(23)]
    assert all(torch.equal(x, y) for x, y in zip(whole, head + tail))
    halves = [make(rank=r, world_size=2) for r in range(2)]
    assert first.state_dict()["samples"] == 37 * 6
    for half in halves:
        half.load_state_dict(first.state_dict())
        assert half.index == 18


def test_state_of_another_sampler_is_refused():
    state = CropSampler(numbered(3000), 20, 6, 9).state_dict()
    for options, name in (({"seed": 8}, "seed"), ({"stream": 2}, "stream"), ({"seq_len": 10}, "seq_len")):
        arguments = {"seq_len": 20, "batch_size": 6, "seed": 9} | options
        with pytest.raises(DataError, match=f"sampler state {name}="):
            CropSampler(numbered(3000), **arguments).load_state_dict(state)
    with pytest.raises(DataError, match="n_bytes"):
        CropSampler(numbered(2999), 20, 6, 9).load_state_dict(state)


def test_document_crops_stay_inside_or_start_at_the_first_byte():
    sizes = np.random.default_rng(2).integers(1, 200, 60)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    region = numbered(int(offsets[-1]) - 40)  # the last document is cut, as at a split
    sampler = CropSampler(region, 64, 50, seed=4, crops="document", offsets=offsets)
    starts = np.concatenate([sampler.starts(i) for i in range(400)])
    bounds = np.append(offsets[offsets < len(region)], len(region))
    document = np.searchsorted(bounds, starts, side="right") - 1
    long = np.diff(bounds)[document] >= 64
    assert (starts[long] + 64 <= bounds[document + 1][long]).all()
    assert (starts[~long] == bounds[document][~long]).all()
    counts = np.bincount(document, minlength=len(bounds) - 1) / len(starts)
    share = np.diff(bounds) / len(region)
    assert np.abs(counts - share).max() < 5 * np.sqrt(share.max() / len(starts))
    for d in np.flatnonzero(np.diff(bounds) > 120)[:3]:
        inside = starts[document == d]
        assert inside.min() < bounds[d] + 12 and inside.max() > bounds[d + 1] - 64 - 12


def test_a_store_gives_its_train_region_only(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(b"doc %d " % i * 9 for i in range(300)))
    store = open_store(SourceSpec(files=str(tmp_path / "a.txt")), cache, progress=False)
    for crops in ("any", "document"):
        sampler = CropSampler(store, 32, 16, seed=0, crops=crops)
        assert sampler.n_bytes == store.split_byte == len(store.train)
        first_val = int(bytes(store.val).split()[1])
        numbers = [row.tobytes().split() for i in range(200) for row in sampler.batch(i).numpy()]
        whole = {int(w) for words in numbers for w in words[1:-1] if w.isdigit()}
        assert max(whole) < first_val and len(whole) > 250


def test_short_text_repeats_with_one_warning():
    with pytest.warns(UserWarning, match="3 bytes to train on are fewer than seq_len=8") as caught:
        sampler = CropSampler(b"abc", 8, 4, seed=0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in sampler.batch(7).numpy():
            assert bytes(row) in b"abc" * 4
    with pytest.raises(DataError, match="1 bytes to train on; 8 are needed"):
        CropSampler(b"a", 8, 4, seed=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seq_len": 0}, "seq_len"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"rank": 1}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"stream": -1}, "stream"),
        ({"crops": "words"}, "crops"),
        ({"crops": "document"}, "offsets"),
        ({"store_or_bytes": [1, 2]}, "store_or_bytes"),
        ({"store_or_bytes": np.zeros((2, 2), np.uint8)}, "store_or_bytes"),
    ],
)
def test_errors_name_the_argument(options, name):
    arguments = {"store_or_bytes": numbered(100), "seq_len": 10, "batch_size": 2, "seed": 0} | options
    with pytest.raises(DataError, match=name):
        CropSampler(**arguments)
