"""What tokenizers do to whole texts: special tokens around them, and words that go on from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.validate import shown


class Tokenizer(Protocol):
    """transformers' tokenizers."""

    def __call__(self, text: list[str], **options: object) -> dict[str, list[list[int]]]: ...


def check_tokenizer(tokenizer: object) -> None:
    """Raises TypeError where it is none of transformers' tokenizers, nor like one."""
    if not (callable(tokenizer) and hasattr(tokenizer, "batch_decode")):
        raise InputTypeError(
            "tokenizer must be the model's, as transformers' AutoTokenizer.from_pretrained gives it, not "
            f"{shown(tokenizer)}"
        )


def bare_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text alone, without special ones; however long, and without a warning of that."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def special_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer by itself puts before and after a text, such as Llama's beginning of text.

    Args:
        text: any that has tokens.
    """
    for example in ("a", text):
        (bare,) = bare_tokens(tokenizer, [example])
        (whole,) = tokenizer([example], add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return [], []


def continuations(
    tokenizer: Tokenizer, prompts: Sequence[str], words: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """How the words go on from prompts, when each prompt is tokenized with the word as one text.

    A word's first token may take up the prompt's end, as " good" takes up the space of "It was ". Then the
    prompt ends before that.

    Returns:
        What the prompts lose of their last tokens, and the tokens of each word after that.

    Raises:
        ValueError: they are not the same for all prompts.
    """
    found = None
    wholes = [bare_tokens(tokenizer, [prompt + word for prompt in prompts]) for word in words]
    for prompt, ids, *whole in zip(prompts, bare_tokens(tokenizer, prompts), *wholes, strict=True):
        columns = enumerate(zip(ids, *whole, strict=False))
        shortest = min(map(len, (ids, *whole)))
        kept = next((place for place, column in columns if len(set(column)) > 1), shortest)
        here = (ids[kept:], [ids_of_whole[kept:] for ids_of_whole in whole])
        if found is not None and here != found:
            shown_words = ", ".join(map(repr, words[:3]))
            raise InputError(
                f"the tokens of the words {shown_words} depend on the text before, such as {prompt[-40:]!r}; "
                "let the prompt go on after the text, or begin the words with a space"
            )
        found = here
    return found


def shortened(texts: Sequence[str], fits: Callable[[list[str]], list[bool]]) -> list[str]:
    """The longest beginning of each text that fits, by halving; at worst the empty one.

    Args:
        fits: says of texts in the given order which of them fit.
    """
    low, high = [0] * len(texts), [len(text) for text in texts]
    while any(a + 1 < b for a, b in zip(low, high, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        good = fits([text[:end] for text, end in zip(texts, middle, strict=True)])
        low = [m if g else a for a, m, g in zip(low, middle, good, strict=True)]
        high = [b if g else m for b, m, g in zip(high, middle, good, strict=True)]
    return [text[:end] for text, end in zip(texts, low, strict=True)]
