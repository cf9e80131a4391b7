"""The data sets: `digits` lies in this package, `mnist` is downloaded when it is asked for."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bpkit.data.dataset import Dataset

# The files of LeCun, Cortes and Burges, as mirrored for PyTorch and by Google; SHA-256 as compressed.
_MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                  "https://storage.googleapis.com/cvdf-datasets/mnist/")  # fmt: skip
_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def digits(dtype: torch.dtype = torch.float32, test: int = 360, seed: int = 0) -> Dataset:
    """Return 1,797 handwritten digits of 8 x 8 pixels, from 0 to 1, as vectors of 64.

    Parameters
    ----------
    dtype : torch.dtype
        Of the inputs.
    test : int
        Number of test samples; the rest is for training.
    seed : int
        Of the shuffle before the split.

    Notes
    -----
    The test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI
    Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0, in scikit-learn's copy; see SOURCE.txt.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    if not 0 <= test < len(labels):
        raise ValueError(f"digits has {len(labels)} samples, so the test part has 0 to {len(labels) - 1}, not {test}")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs, targets = pixels[rows].to(dtype) / 16, labels[rows].long()
    cut = len(labels) - test
    return Dataset("digits", inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])


def mnist(cache: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32) -> Dataset:
    """Return MNIST: 60,000 training and 10,000 test digits of 28 x 28 pixels, from 0 to 1, as vectors of 784.

    The four files (11 MB) are downloaded once, checked by SHA-256, and kept in the cache.

    Parameters
    ----------
    cache : path, optional
        Default: ``$BPKIT_CACHE``, else ``$XDG_CACHE_HOME/bpkit``, else ``~/.cache/bpkit``.
    dtype : torch.dtype
        Of the inputs.

    Raises
    ------
    ConnectionError
        If a file is neither in the cache nor to be had, with its checksum, from a mirror.

    Notes
    -----
    Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits" (1998), CC BY-SA 3.0.
    """
    folder = Path(cache) if cache is not None else _cache_folder()
    files = (_fetch(name, digest, folder / "mnist") for name, digest in _MNIST_FILES.items())
    x, t, test_x, test_t = map(_read_idx, files)
    return Dataset("mnist", _pixels(x, dtype), t.long(), _pixels(test_x, dtype), test_t.long())


def _pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.flatten(1).to(dtype) / 255


def _cache_folder() -> Path:
    """Return the folder for downloads, without making it."""
    if own := os.environ.get("BPKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpkit"


def _fetch(name: str, digest: str, folder: Path) -> bytes:
    """Return a file's bytes from the cache, or from the first mirror that has it, checked in either case."""
    path, errors = folder / name, []
    if path.exists() and hashlib.sha256(data := path.read_bytes()).hexdigest() == digest:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    for mirror in _MNIST_MIRRORS:
        try:
            torch.hub.download_url_to_file(mirror + name, str(path), hash_prefix=digest, progress=False)
            return path.read_bytes()
        except (OSError, RuntimeError) as error:  # not there, or another checksum
            errors.append(f"{mirror}: {error}")
    raise ConnectionError(f"{name} is not in {folder} and could not be downloaded ({'; '.join(errors)}). Connect to "
                          "the network once, or put the file there; bp.data.digits() needs no network.")  # fmt: skip


def _read_idx(data: bytes) -> Tensor:
    """Return the uint8 array of a compressed IDX file (the format is given on MNIST's page)."""
    raw = gzip.decompress(data)
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    body = np.frombuffer(raw, np.uint8, offset=4 + shape.nbytes)
    if raw[:3] != b"\0\0\x08" or len(body) != shape.prod():
        raise ValueError("not an IDX file of unsigned bytes")
    return torch.from_numpy(body.reshape(shape).copy())
