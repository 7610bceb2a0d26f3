"""Tasks made of texts: a class for each text, read by a head or from label words, and language modelling."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lora_lens.corpus import Corpus, Texts
from lora_lens.errors import InputError
from lora_lens.readouts import LabelWords, NextTokens, Readout, inner_model
from lora_lens.tasks import Task
from lora_lens.token_examples import TokenExamples

NO_LIMIT = 10**9  # transformers' tokenizers without a limit have a larger number
PROMPT = "{text}\nSentiment:"


class Tokenizer(Protocol):
    """transformers' tokenizers."""

    def __call__(self, text: list[str], **options: object) -> dict[str, list[list[int]]]: ...


@dataclass(frozen=True, eq=False)
class WordTask(Task):
    """Classification by a causal language model, which says how likely each class's word comes next.

    Attributes:
        words: the token ids of each class's word.
    """

    words: tuple[tuple[int, ...], ...] = ()

    def new_readout(self, model: nn.Module, seed: int) -> Readout:
        """Nothing but the model is trained."""
        return self.own_readout(model)

    def own_readout(self, model: nn.Module) -> Readout:
        """The likelihoods of the words, see :class:`lora_lens.readouts.LabelWords`."""
        self.check_fit(model)
        return LabelWords(self.words)

    def check_fit(self, model: nn.Module) -> None:
        """As of a task; words of several tokens are read in their place after the text."""
        longest = max(len(word) for word in self.words)
        for examples in (self.train, self.test):
            examples.check_fit(inner_model(model), more=longest if longest > 1 else 0)

    def _reading(self) -> str:
        return f"{self.pooling} {self.words}"


@dataclass(frozen=True, eq=False)
class LanguageTask(Task):
    """Next-token prediction on blocks of text; its accuracy is the share of tokens that are the likeliest."""

    def __post_init__(self) -> None:
        for part in (self.train, self.test):
            if len(part.lengths.unique()) > 1:
                raise InputError(f"{self.name}: the blocks of a language task must all be of one length")

    def new_readout(self, model: nn.Module, seed: int) -> Readout:
        """Nothing but the model is trained."""
        return self.own_readout(model)

    def own_readout(self, model: nn.Module) -> Readout:
        """The model's next tokens, see :class:`lora_lens.readouts.NextTokens`."""
        self.check_fit(model)
        return NextTokens()

    def _reading(self) -> str:
        return "next tokens"


def text_task(
    corpus: Corpus, tokenizer: Tokenizer, *, pooling: str = "mean", most_tokens: int | None = None
) -> Task:
    """Classification of texts by a head on the model's features.

    Args:
        corpus: texts with classes.
        tokenizer: the model's.
        pooling: "mean" for encoders, "last" for decoders, "model" for a model that pools by itself, such as
            AutoModelForSequenceClassification's; see :func:`lora_lens.readouts.pooled_features`.
        most_tokens: longer texts lose their end, with a warning that counts them; default what the tokenizer
            allows.

    Raises:
        ValueError: the corpus has fewer than two classes, ``most_tokens`` is below 1 or above what the
            tokenizer allows, or a text has no tokens.
    """
    _require_classes(corpus)
    limit = _limit(tokenizer, most_tokens)
    parts = (_tokenized(name, part, tokenizer, limit) for name, part in _parts(corpus))
    return Task(corpus.name, corpus.classes, *parts, pooling=pooling)


def label_word_task(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    prompt: str = PROMPT,
    words: Sequence[str] | None = None,
    most_tokens: int | None = None,
) -> WordTask:
    """Classification of texts by the words that a causal language model expects next.

    Args:
        corpus: texts with classes.
        tokenizer: the model's.
        prompt: what the model is given, with "{text}" where the text goes; it should not end in a space,
            since the words begin with one.
        words: one for each class; default the classes' names with a space before each.
        most_tokens: of the prompt with its text; of longer ones the text loses its end, with a warning that
            counts them; default what the tokenizer allows.

    Raises:
        ValueError: as :func:`text_task`; the prompt has no "{text}", there are not as many different words as
            classes, or one begins with another's tokens.
    """
    _require_classes(corpus)
    words = [f" {name}" for name in corpus.classes] if words is None else list(words)
    if prompt.count("{text}") != 1:
        raise InputError(f"the prompt must hold {{text}} once, where the text goes, not {prompt!r}")
    if len(words) != len(corpus.classes):
        raise InputError(f"{corpus.name} has {len(corpus.classes)} classes, and there are {len(words)} words")
    ids = [tuple(found) for found in tokenizer(words, add_special_tokens=False)["input_ids"]]
    for place, (word, own) in enumerate(zip(words, ids, strict=True)):
        if not own:
            raise InputError(f"the word {word!r} has no tokens; choose another one")
        if twin := [words[i] for i, other in enumerate(ids) if i != place and other[: len(own)] == own]:
            raise InputError(
                f"the tokens of {word!r} begin those of {twin[0]!r}, so their likelihoods cannot be told "
                "apart; choose other words"
            )
    limit = _limit(tokenizer, most_tokens) - max(len(word) for word in ids)
    parts = (
        _tokenized(name, part, tokenizer, limit, *prompt.split("{text}")) for name, part in _parts(corpus)
    )
    return WordTask(corpus.name, corpus.classes, *parts, pooling="mean", words=tuple(ids))


def language_task(corpus: Corpus, tokenizer: Tokenizer, *, block: int = 128) -> LanguageTask:
    """Next-token prediction on a corpus, whose classes play no part.

    The texts of each part are joined, with the tokenizer's end of text after each, and cut into blocks; the
    rest of the last block is left out. A block may begin within a text: its first tokens are predicted with
    little before them, so the loss is above that of whole documents. What is compared is its rise.

    Args:
        corpus: training and test texts; long ones make fewer seams.
        tokenizer: the model's.
        block: tokens per block, of which all but the first are predicted.

    Raises:
        ValueError: ``block`` is below 2, or a part has fewer tokens than one block.
    """
    if block < 2:
        raise InputError(f"a block must have at least 2 tokens, one to predict the other, not {block}")
    parts = []
    for part, texts in (("training", corpus.train), ("test", corpus.test)):
        # The tokenizer would warn of texts beyond its limit; they are cut into blocks below.
        found = tokenizer(list(texts.texts), add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [token for text in found for token in [*text, *end]]
        count = len(ids) // block
        if count == 0:
            raise InputError(
                f"the {part} texts of {corpus.name} have {len(ids)} tokens, less than one block of {block}; "
                "use a smaller block or more text"
            )
        ids = ids[: count * block]
        parts.append(
            TokenExamples(
                torch.tensor(ids, dtype=torch.int32),
                torch.full((count,), block),
                torch.zeros(count, dtype=torch.long),
                words=_words(tokenizer, ids),
            )
        )
    return LanguageTask(corpus.name, (), *parts, pooling="mean")


def _parts(corpus: Corpus) -> list[tuple[str, Texts]]:
    return [(f"{corpus.name}, training", corpus.train), (f"{corpus.name}, test", corpus.test)]


def _require_classes(corpus: Corpus) -> None:
    if len(corpus.classes) < 2:
        raise InputError(
            f"{corpus.name} has {len(corpus.classes)} classes, and a classification needs at least two; "
            "plain text is for language_task"
        )


def _limit(tokenizer: Tokenizer, most_tokens: int | None) -> int:
    allowed = min(tokenizer.model_max_length, NO_LIMIT)
    if most_tokens is None:
        return allowed
    if not 1 <= most_tokens <= allowed:
        raise InputError(
            f"most_tokens must be 1 to {allowed}, which is what the tokenizer allows, not {most_tokens}"
        )
    return most_tokens


def _tokenized(
    name: str, texts: Texts, tokenizer: Tokenizer, limit: int, before: str = "", after: str = ""
) -> TokenExamples:
    """The texts' tokens, between those of the prompt's two ends; special tokens only without a prompt."""
    head, tail = (
        tokenizer([part], add_special_tokens=False)["input_ids"][0] if part else []
        for part in (before, after)
    )
    special = not (before or after)
    around = tokenizer.num_special_tokens_to_add() if special else 0
    if limit <= around:
        raise InputError(
            f"the tokenizer puts {around} special tokens around each text, so most_tokens={around + 1} or "
            f"more is needed, not {limit}"
        )
    room = limit - len(head) - len(tail)
    if room < 1:
        raise InputError(
            f"the prompt alone has {len(head) + len(tail)} tokens, and {limit} are allowed in all"
        )
    found = tokenizer(list(texts.texts), add_special_tokens=special, verbose=False)["input_ids"]
    longer = [number for number, ids in enumerate(found) if len(ids) > room]
    if longer:
        # Cut by the tokenizer, which keeps its own end of text; a prompt's tokens are added after the cut.
        shorter = tokenizer(
            [texts.texts[number] for number in longer],
            add_special_tokens=special,
            truncation=True,
            max_length=room,
        )["input_ids"]
        for number, ids in zip(longer, shorter, strict=True):
            found[number] = ids
        warnings.warn(
            f"{name}: {len(longer)} of {len(found)} texts have more than {room} tokens and lost their end",
            stacklevel=4,
        )
    whole = [[*head, *ids, *tail] for ids in found]
    if empty := [number for number, ids in enumerate(whole) if not ids]:
        raise InputError(f"{name}: text {empty[0]} ({texts.texts[empty[0]]!r}) has no tokens; leave it out")
    pad = getattr(tokenizer, "pad_token_id", None)
    tokens = [token for ids in whole for token in ids]
    return TokenExamples(
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor([len(ids) for ids in whole]),
        torch.tensor(texts.labels),
        pad=0 if pad is None else pad,  # any token will do, because the mask hides it
        truncated=len(longer),
        texts=texts.texts,
        words=_words(tokenizer, tokens),
    )


def _words(tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[int, str]:
    ids = sorted(set(tokens))
    return dict(zip(ids, tokenizer.batch_decode([[token] for token in ids]), strict=True))
