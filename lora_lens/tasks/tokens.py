"""Texts as a model takes them: their tokens, one after the other, and batches of texts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import Digest, add_tensor
from lora_lens.tasks.task import Labelled, shuffled_rows

EVALUATION_TOKENS = 2048  # per batch, padding included: with a vocabulary of 50,000 the logits take 0.4 GB
POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True, eq=False)
class TokenExamples(Labelled):
    """Tokenized texts with one label each.

    Attributes:
        tokens: of all texts, one after the other, (tokens,) int32.
        lengths: how many are each text's, (n,) int64, at least 1.
        labels: (n,) int64; all 0 where there are no classes.
        pad: a token id to fill batches with; the mask hides it.
        truncated: how many of the texts these were made from were longer than allowed and lost their end.
        texts: what people wrote, one per example; None for blocks of running text.
        words: what the tokens stand for, by their ids, at least of those that occur.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    pad: int = 0
    truncated: int = 0
    texts: tuple[str, ...] | None = None
    words: Mapping[int, str] = field(default_factory=dict)
    most: ClassVar[int] = EVALUATION_TOKENS

    def __post_init__(self) -> None:
        if len(self.labels) == 0 or len(self.lengths) != len(self.labels):
            raise InputError(f"expected one label per text, not {len(self.labels)} for {len(self.lengths)}")
        if int(self.lengths.min()) < 1 or int(self.lengths.sum()) != len(self.tokens):
            raise InputError("every text needs at least one token, and the lengths must add up to the tokens")

    def __repr__(self) -> str:
        return f"<{len(self)} TokenExamples of {self.lengths.min()} to {self.lengths.max()} tokens>"

    def take(self, rows: Tensor) -> TokenExamples:
        """Some of the texts, by their numbers."""
        return replace(
            self,
            tokens=torch.cat([self._text(row) for row in rows.tolist()]),
            lengths=self.lengths[rows],
            labels=self.labels[rows],
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows.tolist()),
        )

    def joined(self, *others: TokenExamples) -> TokenExamples:
        """These texts, then those of the others; all of one tokenizer."""
        parts = (self, *others)
        texts = [p.texts for p in parts]
        return replace(
            self,
            tokens=torch.cat([p.tokens for p in parts]),
            lengths=torch.cat([p.lengths for p in parts]),
            labels=torch.cat([p.labels for p in parts]),
            truncated=sum(p.truncated for p in parts),
            texts=None if None in texts else tuple(text for part in texts for text in part),
            words={token: word for p in parts for token, word in p.words.items()},
        )

    def pieces(self, row: int) -> list[str]:
        """The tokens of one text in writing; those without a word as their number."""
        return [self.words.get(token, f"#{token}") for token in self._text(row).tolist()]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """input_ids and, unless all are of one length, attention_mask: (batch, tokens), padded right."""
        lengths = self.lengths[rows]
        ids = torch.full((len(rows), int(lengths.max())), self.pad)
        for row, number in enumerate(rows.tolist()):
            ids[row, : lengths[row]] = self._text(number)
        if bool((lengths == lengths[0]).all()):
            return {"input_ids": ids}
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    def in_batches(self, most: int = EVALUATION_TOKENS) -> Iterator[Tensor]:
        """The numbers of all texts, in batches of at most ``most`` tokens; texts of like length together."""
        batch: list[int] = []
        for number in self.lengths.argsort(stable=True).tolist():
            if batch and (len(batch) + 1) * int(self.lengths[number]) > most:
                yield torch.tensor(batch)
                batch = []
            batch.append(number)
        yield torch.tensor(batch)

    def largest(self) -> tuple[int, int]:
        """The number of the longest text, and its tokens."""
        return int(self.lengths.argmax()), int(self.lengths.max())

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches to train on, of texts of like length, in random order.

        Sixteen batches are drawn at once, fewer of a small set, sorted by length, cut and shuffled; each text
        comes once before any comes again, up to the edge of such a draw.
        """
        generator = torch.Generator().manual_seed(seed)
        batches_at_once = max(1, min(POOL, len(self) // batch_size))  # else copies of a text would meet
        for pool in shuffled_rows(len(self), batch_size * batches_at_once, seed):
            batches = pool[self.lengths[pool].argsort(stable=True)].split(batch_size)
            for number in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[number]

    def check_fit(self, model: nn.Module, more: int = 0) -> None:
        """Whether these can be the model's tokens, and ``more`` after the longest text.

        Raises:
            ValueError: a token that the model does not have, or a text longer than its positions.
        """
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        known = getattr(embedding, "num_embeddings", None)
        largest = int(self.tokens.max())
        if known is not None and largest >= known:
            raise InputError(
                f"the texts hold token {largest}, and {type(model).__name__} has {known} tokens: they were "
                "tokenized for another model; use the tokenizer that belongs to this one"
            )
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        longest = int(self.lengths.max()) + more
        if positions is not None and longest > positions:
            raise InputError(
                f"the longest text has {longest} tokens, and {type(model).__name__} takes at most "
                f"{positions}; make the task with most_tokens={positions} or less"
            )

    def trial(self) -> dict[str, Tensor]:
        """A batch to try whether a model takes it: the two shortest texts."""
        return self.batch(self.lengths.argsort(stable=True)[:2])

    def add_to(self, digest: Digest) -> None:
        """Hash all that they hold."""
        for tensor in (self.tokens, self.lengths, self.labels):
            add_tensor(digest, tensor)

    @cached_property
    def _ends(self) -> list[int]:
        return self.lengths.cumsum(0).tolist()

    def _text(self, number: int) -> Tensor:
        end = self._ends[number]
        return self.tokens[end - int(self.lengths[number]) : end]
