"""Data sets, the order of samples, shards, and MNIST's download without a network."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from bpkit.data import Dataset, digits, mnist, sets, shard_sizes, text


def small(n: int = 10) -> Dataset:
    x = torch.arange(n, dtype=torch.float32)[:, None]
    return Dataset("small", x, torch.arange(n), x[:2], torch.arange(2))


def test_digits() -> None:
    data = digits()
    assert (data.inputs.shape, data.test_inputs.shape) == ((1437, 64), (360, 64))
    assert data.inputs.dtype is torch.float32 and data.targets.dtype is torch.int64
    assert float(data.inputs.min()) == 0 and float(data.inputs.max()) == 1
    assert data.targets.unique().tolist() == list(range(10)) == data.test_targets.unique().tolist()
    assert torch.equal(digits(torch.float64).inputs.float(), data.inputs)
    assert not torch.equal(digits(seed=1).inputs, data.inputs)
    assert len(digits(test=0)) == 1797
    with pytest.raises(ValueError, match="1797 samples"):
        digits(test=1797)


def test_digits_are_those_of_scikit_learn() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    data = digits(torch.float64)
    rows = torch.cat([data.inputs, data.test_inputs])
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows * 16, torch.from_numpy(source.data)[order])
    assert torch.equal(torch.cat([data.targets, data.test_targets]), torch.from_numpy(source.target)[order])


def test_one_order_for_a_seed() -> None:
    data = small()
    assert torch.equal(data.order(3, 7), data.order(3, 7))
    assert not torch.equal(data.order(3, 7), data.order(4, 7))
    assert not torch.equal(data.order(3, 7), data.order(3, 8))
    x, t = data.batch(2, 4, 7)
    assert torch.equal(x[:, 0].long(), t) and torch.equal(t, data.indices(2, 4, 7))
    data.order(0, 7).zero_()  # the caller's copy
    data.indices(0, 4, 7).zero_()
    assert sorted(data.order(0, 7).tolist()) == list(range(10))


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_each_sample_once_an_epoch(size: int) -> None:
    data = small()
    stream = torch.cat([data.indices(step, size, 5) for step in range(60 // size)])
    for epoch in range(len(stream) // 10):
        assert torch.equal(stream[10 * epoch : 10 * epoch + 10], data.order(epoch, 5))


def test_bad_batches_are_named() -> None:
    with pytest.raises(ValueError, match="batch of 11 is larger than small, which has 10"):
        small().batch(0, 11)
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        small().batch(0, 0)
    with pytest.raises(ValueError, match="10 training inputs, but 9 training targets"):
        Dataset("odd", torch.zeros(10, 1), torch.zeros(9), torch.zeros(0, 1), torch.zeros(0))
    with pytest.raises(ValueError, match="at least one training sample"):
        small(2).shards(2)[0].__class__("none", *[torch.zeros(0)] * 4)


@pytest.mark.parametrize(
    ("samples", "n", "uneven", "sizes"),
    [
        (10, 3, None, [4, 3, 3]),
        (2, 4, None, [1, 1, 0, 0]),
        (0, 2, None, [0, 0]),
        (10, 3, [7, 0, 3], [7, 0, 3]),
        (10, 2, [3, 1], [8, 2]),
        (10, 3, [0.5, 0.25, 0.25], [5, 3, 2]),
        (256, 3, [0.1, 0.1, 0.8], [26, 25, 205]),
    ],
)
def test_shard_sizes(samples: int, n: int, uneven: list | None, sizes: list[int]) -> None:
    assert shard_sizes(samples, n, uneven) == sizes and sum(sizes) == samples


def test_shards_cut_in_order() -> None:
    parts = small().shards(3, [5, 3, 2])
    assert [len(p) for p in parts] == [5, 3, 2]
    assert torch.equal(torch.cat([p.targets for p in parts]), small().targets)
    assert len(parts[0].test_inputs) == 2
    with pytest.raises(ValueError, match="10 training samples, fewer than 11 shards"):
        small().shards(11)
    with pytest.raises(ValueError, match="shard 1 of small would be empty"):
        small().shards(2, [10, 0])
    for n, uneven, said in ((0, None, "at least one shard"), (2, [1], "2 sizes"), (2, [-1, 2], "negative")):
        with pytest.raises(ValueError, match=said):
            shard_sizes(10, n, uneven)


def test_to() -> None:
    data = small().to(dtype=torch.float64)
    assert data.inputs.dtype is torch.float64 and data.targets.dtype is torch.int64


def idx(array: torch.Tensor) -> bytes:
    """Write an IDX file."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.to(torch.uint8).numpy().tobytes(), mtime=0)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A tiny MNIST, with its checksums in place of the real ones."""
    made = {
        "train-images-idx3-ubyte.gz": idx(torch.arange(3 * 4).view(3, 2, 2)),
        "train-labels-idx1-ubyte.gz": idx(torch.tensor([1, 2, 3])),
        "t10k-images-idx3-ubyte.gz": idx(torch.full((2, 2, 2), 255)),
        "t10k-labels-idx1-ubyte.gz": idx(torch.tensor([4, 5])),
    }
    monkeypatch.setattr(sets, "_MNIST_FILES", {k: hashlib.sha256(v).hexdigest() for k, v in made.items()})
    return made


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], tmp_path: Path) -> tuple[Path, Path]:
    """Two mirrors on this disk, of which the second has the files; the first has none."""
    found = tmp_path / "one", tmp_path / "two"
    for folder in found:
        folder.mkdir()
    for name, content in files.items():
        (found[1] / name).write_bytes(content)
    monkeypatch.setattr(sets, "_MNIST_MIRRORS", tuple(f"{folder.as_uri()}/" for folder in found))
    return found


def test_mnist_downloads_once_from_the_first_mirror_that_has_it(mirrors: tuple[Path, Path], tmp_path: Path) -> None:
    data = mnist(tmp_path)
    assert data.inputs.shape == (3, 4) and data.targets.tolist() == [1, 2, 3]
    assert float(data.test_inputs.min()) == 1.0 and data.test_targets.tolist() == [4, 5]
    names = sorted(path.name for path in mirrors[1].iterdir())
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == names
    for path in mirrors[1].iterdir():
        path.unlink()
    assert torch.equal(mnist(tmp_path).inputs, data.inputs)


def test_mnist_offline_says_what_to_do(mirrors: tuple[Path, Path], tmp_path: Path) -> None:
    for path in mirrors[1].iterdir():
        path.unlink()
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*digits\(\) needs no network"):
        mnist(tmp_path)


def test_mnist_refuses_another_checksum(mirrors: tuple[Path, Path], tmp_path: Path) -> None:
    (mirrors[1] / "train-images-idx3-ubyte.gz").write_bytes(b"other")
    with pytest.raises(ConnectionError, match=r"train-images.*invalid hash value"):
        mnist(tmp_path)
    assert list((tmp_path / "mnist").iterdir()) == []


def test_a_damaged_cache_is_downloaded_again(mirrors: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert mnist(tmp_path).targets.tolist() == [1, 2, 3]


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BPKIT_CACHE", raising=False)
    assert sets._cache_folder() == tmp_path / "bpkit"
    monkeypatch.setenv("BPKIT_CACHE", str(tmp_path / "own"))
    assert sets._cache_folder() == tmp_path / "own"


def test_text_gives_next_characters() -> None:
    data = text(length=16)
    assert data.inputs.dtype is torch.int64 and data.inputs.shape[1:] == (16,) == data.targets.shape[1:]
    assert torch.equal(data.inputs[:, 1:], data.targets[:, :-1])
    assert torch.equal(data.inputs[1:, 0], data.targets[:-1, -1])
    whole = (Path(sets.__file__).with_name("tales.txt")).read_text()
    read = data.decode(torch.cat([data.inputs.flatten(), data.test_inputs.flatten()]))
    assert whole.startswith(read) and len(whole) - len(read) <= 16
    assert torch.equal(data.encode(data.decode(range(data.vocabulary))), torch.arange(data.vocabulary))
    assert len(data.test_inputs) == int(0.1 * (len(data) + len(data.test_inputs)))
    assert data.shards(3)[1].vocabulary == data.vocabulary == data.to("cpu", torch.float64).vocabulary
    assert data.to("cpu", torch.float64).inputs.dtype is torch.int64


def test_text_of_ones_own() -> None:
    data = text(2, test=0, source="ababc")
    assert data.inputs.tolist() == [[0, 1], [0, 1]] and data.targets.tolist() == [[1, 0], [1, 2]]
    with pytest.raises(ValueError, match="holds no 'z'"):
        data.encode("az")
    for length in (0, 5):
        with pytest.raises(ValueError, match=f"5 characters give no sample of {length}"):
            text(length, source="ababc")


def test_samples_are_not_followed_by_autograd() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    made = Dataset("numbers", x * 2, x, x[:1], x[:1])
    assert not any(t.requires_grad for t in (made.inputs, made.targets, made.test_inputs, made.test_targets))
    assert torch.equal(made.inputs, x.detach() * 2)
