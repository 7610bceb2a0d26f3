"""Small tokenizers of the kinds that there are, trained on the same texts."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import lora_lens as ll

SPECIAL = ["<unk>", "<s>", "</s>"]
# What each adds by itself; the names say after which model's tokenizer it is made.
TEMPLATES = {
    "gpt2": None, "llama3": "<s> $A", "llama2": "<s> $A", "gemma": "<s> $A",
    "t5": "$A </s>", "bert": "<s> $A </s>",
}  # fmt: skip


@cache
def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    """One of ``TEMPLATES``, with ids 0, 1 and 2 for unknown, beginning (or CLS) and end (or SEP)."""
    pieces, trainer = _untrained(kind)
    pieces.train_from_iterator(ll.tasks.bundled_texts.sentiment("movies").train.texts[:300], trainer)
    if (template := TEMPLATES[kind]) is not None:
        pieces.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _untrained(kind: str) -> tuple[Tokenizer, trainers.Trainer]:
    shared = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if kind in ("gpt2", "llama3"):  # pieces of bytes
        pieces = Tokenizer(models.BPE())
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        return pieces, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared)
    if kind == "llama2":  # sentencepiece's BPE: a space before each text, and merges across words
        pieces = Tokenizer(models.BPE(unk_token="<unk>"))
        pieces.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        pieces.decoder = decoders.Metaspace()
        return pieces, trainers.BpeTrainer(**shared)
    if kind == "bert":
        pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
        pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pieces.decoder = decoders.WordPiece()
        return pieces, trainers.WordPieceTrainer(**shared)
    pieces = Tokenizer(models.Unigram())  # sentencepiece's unigrams
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = decoders.Metaspace()
    return pieces, trainers.UnigramTrainer(unk_token="<unk>", **shared)
