"""Tasks made of texts: a class for each text, read by a head or from label words, and language modelling."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.validate import choice, instance, sequence, whole_number
from lora_lens._base.warning import warn
from lora_lens.tasks.corpus import Corpus, Texts
from lora_lens.tasks.readouts import POOLINGS, LabelWords, NextTokens, Readout, inner_model
from lora_lens.tasks.task import Task
from lora_lens.tasks.tokenizing import (
    Tokenizer,
    bare_tokens,
    check_tokenizer,
    continuations,
    shortened,
    special_tokens,
)
from lora_lens.tasks.tokens import TokenExamples

NO_LIMIT = 10**9  # transformers' tokenizers without a limit have a larger number
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
PROMPT = "{text}\nSentiment:"
SAMPLE = 16  # texts on which is seen how the label words are tokenized after a prompt
Tokenized = Callable[[Sequence[str]], list[list[int]]]
CORPUS = "a Corpus, such as lora_lens.tasks.text_corpus makes"


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
        """The likelihoods of the words, see :class:`lora_lens.tasks.readouts.LabelWords`."""
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
        self._check_parts()
        for part in (self.train, self.test):
            if len(part.lengths.unique()) > 1:
                raise InputError(f"{self.name}: the blocks of a language task must all be of one length")

    def new_readout(self, model: nn.Module, seed: int) -> Readout:
        """Nothing but the model is trained."""
        return self.own_readout(model)

    def own_readout(self, model: nn.Module) -> Readout:
        """The model's next tokens, see :class:`lora_lens.tasks.readouts.NextTokens`."""
        self.check_fit(model)
        return NextTokens()

    def _reading(self) -> str:
        return "next tokens"


def text_task(
    corpus: Corpus, tokenizer: Tokenizer, *, pooling: str = "mean", most_tokens: int | None = None
) -> Task:
    """Classification of texts by a head on the model's features.

    Texts have the special tokens that the tokenizer adds by itself, such as [CLS] and [SEP] or a beginning
    of text.

    Args:
        corpus: texts with classes.
        tokenizer: the model's.
        pooling: "mean" for encoders, "last" for decoders, "model" for a model that pools by itself, such as
            AutoModelForSequenceClassification's; see :func:`lora_lens.tasks.readouts.pooled_features`.
        most_tokens: longer texts lose their end, with a warning that counts them; default what the tokenizer
            allows.

    Raises:
        ValueError: the corpus has fewer than two classes, ``most_tokens`` is below 1 or above what the
            tokenizer allows, another pooling, or a text has no tokens.
        TypeError: an argument of another type.

    Example:
        >>> import lora_lens as ll
        >>> films = ll.tasks.Texts(["a fine film", "a waste of time"], [1, 0])
        >>> corpus = ll.tasks.Corpus("films", ("bad", "good"), films, ll.tasks.Texts(["well played"], [1]))
        >>> tokenizer = ll.tasks.bundled.minilm_tokenizer()
        >>> task = ll.tasks.text_task(corpus, tokenizer)
        >>> task.train.pieces(1)
        ['[CLS]', 'a', 'waste', 'of', 'time', '[SEP]']
    """
    _require_classes(corpus)
    choice(pooling, "pooling", POOLINGS)
    how = whole_texts(tokenizer, most_tokens, corpus.train.texts[0])
    return Task(corpus.name, corpus.classes, *tokenized(_named(corpus), tokenizer, *how), pooling=pooling)


def label_word_task(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    prompt: str = PROMPT,
    words: Sequence[str] | None = None,
    most_tokens: int | None = None,
) -> WordTask:
    """Classification of texts by the words that a causal language model expects next.

    Prompt and text are tokenized as one, after the special tokens with which the tokenizer begins a text by
    itself, such as Llama's beginning of text. The words' tokens are those that they have after the prompt.

    Args:
        corpus: texts with classes.
        tokenizer: the model's.
        prompt: what the model is given, with "{text}" where the text goes. If it ends in a space that is part
            of the words' first tokens, the model is given what comes before.
        words: one for each class; default the classes' names with a space before each.
        most_tokens: of the prompt with its text; of longer ones the text loses its end, with a warning that
            counts them; default what the tokenizer allows.

    Raises:
        ValueError: as :func:`text_task`; the prompt has no "{text}" or another name in braces, there are not
            as many different words as classes, one begins with another's tokens, or they depend on the text
            before.
        TypeError: an argument of another type.

    Example:
        >>> import lora_lens as ll
        >>> films = ll.tasks.Texts(["a fine film", "a waste of time"], [1, 0])
        >>> corpus = ll.tasks.Corpus("films", ("bad", "good"), films, ll.tasks.Texts(["well played"], [1]))
        >>> tokenizer = ll.tasks.bundled.minilm_tokenizer()
        >>> words = [" bad", " good"]
        >>> task = ll.tasks.label_word_task(corpus, tokenizer, prompt="{text} It was", words=words)
        >>> tokenizer.decode([word[0] for word in task.words])
        'bad good'
    """
    _require_classes(corpus)
    limit = _limit(tokenizer, most_tokens)
    words = [f" {name}" for name in corpus.classes] if words is None else sequence(words, "words", "strings")
    for word in words:
        if not instance(word, str, "a word", "a string"):
            raise InputError("the word '' has no tokens; choose another one")
    if instance(prompt, str, "prompt", "a string").count("{text}") != 1:
        raise InputError(f"the prompt must hold {{text}} once, where the text goes, not {prompt!r}")
    if others := [name for name in PLACEHOLDER.findall(prompt) if name != "text"]:
        raise InputError(
            f"the prompt has {{{others[0]}}}, which nothing is put into; the only placeholder is {{text}}, "
            f"where the text goes: {prompt!r}"
        )
    if len(words) != len(corpus.classes):
        raise InputError(f"{corpus.name} has {len(corpus.classes)} classes, and there are {len(words)} words")
    head, tail = prompt.split("{text}")
    texts = corpus.train.texts + corpus.test.texts
    # Words go on from the prompt's end, which is each text's own end in a prompt that ends with the text.
    some = texts[:SAMPLE] if tail.strip() else texts
    end, ids = continuations(tokenizer, [f"{head}{text}{tail}" for text in some], words)
    for place, (word, own) in enumerate(zip(words, ids, strict=True)):
        if not own:
            raise InputError(f"the word {word!r} has no tokens; choose another one")
        if getattr(tokenizer, "unk_token_id", None) in own:
            raise InputError(
                f"the tokenizer does not know the word {word!r} after the prompt; choose another"
            )
        if twin := [words[i] for i, other in enumerate(ids) if i != place and other[: len(own)] == own]:
            raise InputError(
                f"the tokens of {word!r} begin those of {twin[0]!r}, so their likelihoods cannot be told "
                "apart; choose other words"
            )
    before, _ = special_tokens(tokenizer, texts[0])
    limit -= max(len(word) for word in ids)

    def contexts(texts: Sequence[str]) -> list[list[int]]:
        found = bare_tokens(tokenizer, [f"{head}{text}{tail}" for text in texts])
        return [[*before, *ids[: len(ids) - len(end)]] for ids in found]

    def cut(texts: Sequence[str]) -> list[list[int]]:
        if (alone := len(contexts([""])[0])) >= limit:
            raise InputError(f"the prompt alone has {alone} tokens, and {limit} are allowed in all")
        return contexts(shortened(texts, lambda some: [len(ids) <= limit for ids in contexts(some)]))

    parts = tokenized(_named(corpus), tokenizer, limit, contexts, cut)
    return WordTask(corpus.name, corpus.classes, *parts, pooling="mean", words=tuple(map(tuple, ids)))


def language_task(corpus: Corpus, tokenizer: Tokenizer, *, block: int = 128) -> LanguageTask:
    """Next-token prediction on a corpus, whose classes play no part.

    The texts of each part are joined, with the tokenizer's end of text after each, and cut into blocks; the
    rest of the last block is left out. Each block begins with the special tokens with which the tokenizer
    begins a text by itself, such as Llama's and Gemma's beginning of text, without which such models predict
    badly; GPT-2's and Qwen's tokenizers have none. A block may begin within a text: its first tokens are
    predicted with little before them, so the loss is above that of whole documents. What is compared is its
    rise.

    Args:
        corpus: training and test texts; long ones make fewer seams.
        tokenizer: the model's.
        block: tokens per block, a beginning of text included, of which all but the first are predicted.

    Raises:
        ValueError: ``block`` has no room for a token to predict, or a part has fewer tokens than one block.
        TypeError: an argument of another type.

    Example:
        >>> import lora_lens as ll
        >>> tokenizer, corpus = ll.tasks.bundled.minilm_tokenizer(), ll.tasks.bundled_texts.articles()
        >>> ll.tasks.language_task(corpus, tokenizer, block=64).first(train=20, test=10).train
        <20 TokenExamples of 64 to 64 tokens>
    """
    instance(corpus, Corpus, "corpus", CORPUS)
    check_tokenizer(tokenizer)
    before, _ = special_tokens(tokenizer, corpus.train.texts[0])
    block = whole_number(block, "block")
    if block < (least := max(2, len(before) + 1)):
        raise InputError(f"a block must have at least {least} tokens, one to predict the other, not {block}")
    room = block - len(before)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for part, texts in (("training", corpus.train), ("test", corpus.test)):
        ids = [token for text in bare_tokens(tokenizer, texts.texts) for token in [*text, *end]]
        count = len(ids) // room
        if count == 0:
            raise InputError(
                f"the {part} texts of {corpus.name} have {len(ids)} tokens, less than one block of {block}; "
                "use a smaller block or more text"
            )
        tokens = [t for i in range(count) for t in (*before, *ids[i * room : (i + 1) * room])]
        parts.append(
            TokenExamples(
                torch.tensor(tokens, dtype=torch.int32),
                torch.full((count,), block),
                torch.zeros(count, dtype=torch.long),
                words=_words(tokenizer, tokens),
            )
        )
    return LanguageTask(corpus.name, (), *parts, pooling="mean")


def _require_classes(corpus: Corpus) -> None:
    instance(corpus, Corpus, "corpus", CORPUS)
    if len(corpus.classes) < 2:
        raise InputError(
            f"{corpus.name} has {len(corpus.classes)} classes, and a classification needs at least two; "
            "plain text is for language_task"
        )


def _limit(tokenizer: Tokenizer, most_tokens: int | None) -> int:
    check_tokenizer(tokenizer)
    allowed = min(tokenizer.model_max_length, NO_LIMIT)
    if most_tokens is None:
        return allowed
    most_tokens = whole_number(most_tokens, "most_tokens")
    if not 1 <= most_tokens <= allowed:
        raise InputError(
            f"most_tokens must be 1 to {allowed}, which is what the tokenizer allows, not {most_tokens}"
        )
    return most_tokens


def whole_texts(tokenizer: Tokenizer, most_tokens: int | None, text: str) -> tuple[int, Tokenized, Tokenized]:
    """How :func:`tokenized` takes texts by themselves, with the special tokens that go around each.

    Args:
        text: any of them.

    Raises:
        ValueError, TypeError: as :func:`text_task`.
    """
    limit = _limit(tokenizer, most_tokens)
    before, after = special_tokens(tokenizer, text)
    room = limit - len(before) - len(after)
    if room < 1:
        around = len(before) + len(after)
        raise InputError(
            f"the tokenizer puts {around} special tokens around each text, so most_tokens={around + 1} or "
            f"more is needed, not {limit}"
        )

    def whole(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]

    def cut(texts: Sequence[str]) -> list[list[int]]:
        return [[*before, *ids[:room], *after] for ids in bare_tokens(tokenizer, texts)]

    return limit, whole, cut


def _named(corpus: Corpus) -> dict[str, Texts]:
    return {f"{corpus.name}, training": corpus.train, f"{corpus.name}, test": corpus.test}


def tokenized(
    parts: Mapping[str, Texts], tokenizer: Tokenizer, limit: int, whole: Tokenized, cut: Tokenized
) -> list[TokenExamples]:
    """Texts in tokens, part by part; those of more than ``limit`` lose their end."""
    pad = getattr(tokenizer, "pad_token_id", None)
    examples = []
    for name, texts in parts.items():
        found = whole(texts.texts)
        if longer := [row for row, ids in enumerate(found) if len(ids) > limit]:
            for row, ids in zip(longer, cut([texts.texts[row] for row in longer]), strict=True):
                found[row] = ids
            warn(
                f"{name}: {len(longer)} of {len(found)} texts have more than {limit} tokens and lost their "
                "end",
            )
        if empty := [row for row, ids in enumerate(found) if not ids]:
            raise InputError(
                f"{name}: text {empty[0]} ({texts.texts[empty[0]]!r}) has no tokens; leave it out"
            )
        tokens = [token for ids in found for token in ids]
        examples.append(
            TokenExamples(
                torch.tensor(tokens, dtype=torch.int32),
                torch.tensor([len(ids) for ids in found]),
                torch.tensor(texts.labels),
                pad=0 if pad is None else pad,  # any token will do, because the mask hides it
                truncated=len(longer),
                texts=texts.texts,
                words=_words(tokenizer, tokens),
            )
        )
    return examples


def _words(tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[int, str]:
    ids = sorted(set(tokens))
    return dict(zip(ids, tokenizer.batch_decode([[token] for token in ids]), strict=True))
