"""Untrained language models of a few thousand weights, and a tokenizer for them: for tests on texts."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lora_lens as ll

VOCABULARY = 400


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of bytes as GPT-2's, with an end of text but no token to pad with."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(ll.tasks.bundled_texts.sentiment("movies").train.texts[:300], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>")


def small(
    kind: str, vocabulary: int = VOCABULARY, positions: int = 256, **settings: object
) -> PreTrainedModel:
    """One of bert, bert classifier, llama and gpt2, with two blocks of width 32; the same every time.

    Its weights are large enough that answers to different texts differ.
    """
    common = {"vocab_size": vocabulary, "initializer_range": 0.2, **settings}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {name: size for name, size in sizes.items() if name not in settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            config = LlamaConfig(
                **sizes, **common, max_position_embeddings=positions, bos_token_id=None, eos_token_id=0
            )
            return LlamaForCausalLM(config).eval()
        if kind == "gpt2":
            config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=positions, **common)
            return GPT2LMHeadModel(config).eval()
        model = {"bert": BertModel, "bert classifier": BertForSequenceClassification}[kind]
        return model(BertConfig(**sizes, **common, max_position_embeddings=positions)).eval()


def part_of(name: str, train: int, test: int) -> ll.tasks.Corpus:
    """The first texts of an embedded corpus."""
    whole = ll.tasks.bundled_texts.sentiment(name)
    parts = (
        ll.tasks.Texts(part.texts[:count], part.labels[:count])
        for part, count in ((whole.train, train), (whole.test, test))
    )
    return ll.tasks.Corpus(name, whole.classes, *parts)
