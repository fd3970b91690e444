"""The text, as numbers: the help topics of Python, about 460 kB of English."""

import dataclasses
import functools
import pydoc_data.topics

import numpy as np

__all__ = ["Text", "load"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as one number for each character."""

    vocabulary: str  # the characters, in the order of their numbers
    train: np.ndarray  # int32 [characters]
    validation: np.ndarray  # int32 [characters]: the last tenth

    @functools.cached_property
    def bigram_entropy(self) -> float:
        """Entropy of a character given the one before it, in bits: the best of a table of pairs."""
        whole = np.concatenate([self.train, self.validation])
        size = len(self.vocabulary)
        pairs = np.bincount(whole[:-1] * size + whole[1:],
                            minlength=size * size).reshape(size, size)
        given = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
        return float(-np.sum(pairs * np.log2(given, where=given > 0, out=np.zeros_like(given))) /
                     pairs.sum())

    def batch(self, part: np.ndarray, size: int, length: int, seed: tuple[int, ...]) -> np.ndarray:
        """Random windows: int32 [size, length + 1]; the same for the same seed."""
        starts = np.random.default_rng(seed).integers(0, len(part) - length, size)
        return part[starts[:, None] + np.arange(length + 1)]


def load() -> Text:
    """Reads the topics of ``help()`` in alphabetical order."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    vocabulary = "".join(sorted(set(text)))
    numbers = np.searchsorted(np.array(list(vocabulary)), np.array(list(text))).astype(np.int32)
    cut = len(numbers) * 9 // 10
    return Text(vocabulary, numbers[:cut], numbers[cut:])
