"""A text as samples for a language model: tokens are characters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bpkit.data.dataset import Dataset


@dataclass(frozen=True, repr=False)
class Text(Dataset):
    """Samples of tokens, with the next tokens as targets.

    Parameters
    ----------
    characters : str
        Character i is token i.
    """

    characters: str = field(default="", kw_only=True)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text; ValueError at a character that the data set does not hold."""
        numbers = {character: i for i, character in enumerate(self.characters)}
        if unknown := sorted(set(text) - set(numbers)):
            raise ValueError(f"{self.name} holds no {unknown[0]!r}: its characters are {self.characters!r}")
        return torch.tensor([numbers[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Return the text of tokens."""
        return "".join(self.characters[int(token)] for token in tokens)


def text(length: int = 32, test: float = 0.1, source: str | None = None) -> Text:
    """Return a text cut into samples of `length` characters, each with the characters that come next as targets.

    Parameters
    ----------
    length : int
        Tokens of a sample.
    test : float
        Share of the samples, from the end of the text, for testing.
    source : str, optional
        The text; by default the 36,000 characters of tales.txt, written by rule for this package (see SOURCE.txt).

    Raises
    ------
    ValueError
        If the length is below 1 or the text is too short for a training sample.
    """
    whole = Path(__file__).with_name("tales.txt").read_text(encoding="utf-8") if source is None else source
    count = (len(whole) - 1) // length if length > 0 else 0
    if not 0 <= test < 1 or count < 1:
        raise ValueError(f"{len(whole)} characters give no sample of {length} with {test} of them for testing")
    characters = "".join(sorted(set(whole)))
    empty = torch.zeros(1, length, dtype=torch.int64)
    tokens = Text("text", empty, empty, empty, empty, characters=characters).encode(whole)
    inputs, targets = (tokens[i : i + count * length].view(count, length) for i in (0, 1))
    cut = count - int(count * test)
    return Text("text", inputs[:cut], targets[:cut], inputs[cut:], targets[cut:], characters=characters)
