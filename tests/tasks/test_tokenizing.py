from __future__ import annotations

import pytest
import torch
from small_language import small
from small_tokenizers import TEMPLATES, tokenizer_like
from tokenizers import Tokenizer, models

import lora_lens as ll
from lora_lens.tasks.tokenizing import shortened, special_tokens

KINDS = list(TEMPLATES)
BEGINNING = {kind: [1] if kind in ("llama3", "llama2", "gemma", "bert") else [] for kind in KINDS}
END = {kind: [2] if kind in ("t5", "bert") else [] for kind in KINDS}
FILMS = ll.tasks.Corpus(
    "films",
    ("bad", "good"),
    ll.tasks.Texts(["no plot, no point!", "a fine and funny film", 'so "good" I cried'], [0, 1, 1]),
    ll.tasks.Texts(["not one laugh", "it is worth a look."], [0, 1]),
)


def rows(part) -> list[list[int]]:
    """Every text's tokens."""
    return [found.tolist() for found in part.tokens.split(part.lengths.tolist())]


def bare(kind: str, text: str) -> list[int]:
    return tokenizer_like(kind)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_adds_by_itself_is_found(kind):
    assert special_tokens(tokenizer_like(kind), "a film") == (BEGINNING[kind], END[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_task_has_the_tokenizer_s_own_special_tokens_also_where_it_is_cut(kind):
    tokenizer = tokenizer_like(kind)
    task = ll.tasks.text_task(FILMS, tokenizer)
    assert rows(task.train) == tokenizer(list(FILMS.train.texts))["input_ids"]
    with pytest.warns(UserWarning, match="lost their end"):
        cut = ll.tasks.text_task(FILMS, tokenizer, most_tokens=5)
    room = 5 - len(BEGINNING[kind]) - len(END[kind])
    ids = bare(kind, FILMS.train.texts[0])
    assert rows(cut.train)[0] == [*BEGINNING[kind], *ids[:room], *END[kind]]


@pytest.mark.parametrize("prompt", ["{text}\nSentiment:", "Film: {text} It was", "{text} It was "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_with_its_word_is_tokenized_as_one_text(kind, prompt):
    words = ["bad", "good"] if prompt.endswith(" ") else [" bad", " good"]
    task = ll.tasks.label_word_task(FILMS, tokenizer_like(kind), prompt=prompt, words=words)
    for part, texts in ((task.train, FILMS.train.texts), (task.test, FILMS.test.texts)):
        for ids, text in zip(rows(part), texts, strict=True):
            for word, own in zip(words, task.words, strict=True):
                whole = bare(kind, prompt.replace("{text}", text) + word)
                assert [*ids, *own] == [*BEGINNING[kind], *whole]


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma"])
def test_a_long_text_in_a_prompt_keeps_what_fits(kind):
    whole = ll.tasks.label_word_task(FILMS, tokenizer_like(kind))
    room = int(whole.train.lengths.max()) + max(map(len, whole.words)) - 3
    with pytest.warns(UserWarning, match="lost their end"):
        task = ll.tasks.label_word_task(FILMS, tokenizer_like(kind), most_tokens=room)
    longest = int(whole.train.lengths.argmax())
    ids, text = rows(task.train)[longest], FILMS.train.texts[longest]
    beginnings = [text[:end] for end in range(len(text))]
    fitting = [
        found
        for start in beginnings
        if len(found := BEGINNING[kind] + bare(kind, f"{start}\nSentiment:"))
        <= room - max(map(len, task.words))
    ]
    assert ids == fitting[-1] and len(ids) < int(whole.train.lengths[longest])


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_of_running_text_begins_as_a_text_does(kind):
    block, before = 8, BEGINNING[kind]
    task = ll.tasks.language_task(FILMS, tokenizer_like(kind), block=block)
    joined = [token for text in FILMS.train.texts for token in [*bare(kind, text), 2]]
    room = block - len(before)
    assert rows(task.train) == [
        [*before, *joined[i * room : (i + 1) * room]] for i in range(len(joined) // room)
    ]
    with pytest.raises(ValueError, match="a block must have at least 2 tokens"):
        ll.tasks.language_task(FILMS, tokenizer_like(kind), block=1)


def test_the_words_likelihoods_are_those_after_the_whole_prompt():
    model, tokenizer = small("llama"), tokenizer_like("llama2")
    task = ll.tasks.label_word_task(FILMS, tokenizer)
    readout = task.own_readout(model)
    with torch.no_grad():
        found, _ = readout(model, task.test.batch(torch.arange(2)), task.test.labels)
        for row, text in enumerate(FILMS.test.texts):
            for column, word in enumerate((" bad", " good")):
                ids = tokenizer(f"{text}\nSentiment:{word}")["input_ids"]
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                own = range(len(ids) - len(task.words[column]), len(ids))
                expected = sum(float(logs[place - 1, ids[place]]) for place in own)
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-4)


def test_words_that_depend_on_the_text_before_are_refused():
    with pytest.raises(ValueError, match=r"'ing', 'ed' depend on the text before, such as .*begin the words"):
        ll.tasks.label_word_task(FILMS, tokenizer_like("gpt2"), prompt="{text}", words=["ing", "ed"])


@pytest.mark.parametrize("wrong", [None, "gpt2", torch.nn.Linear(2, 2), Tokenizer(models.BPE())])
@pytest.mark.parametrize("make", [ll.tasks.text_task, ll.tasks.label_word_task, ll.tasks.language_task])
def test_what_is_no_tokenizer_is_refused(make, wrong):
    with pytest.raises(TypeError, match="tokenizer must be the model's, as transformers' AutoTokenizer"):
        make(FILMS, wrong)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (ll.tasks.text_task, {"most_tokens": 5.5}, TypeError, "most_tokens must be a whole number"),
        (ll.tasks.text_task, {"pooling": "means"}, ValueError, "pooling must be .* did you mean 'mean'"),
        (ll.tasks.label_word_task, {"words": "ab"}, TypeError, "words must be a sequence of strings"),
        (ll.tasks.label_word_task, {"words": [" a", 3]}, TypeError, "a word must be a string, not 3"),
        (ll.tasks.label_word_task, {"prompt": None}, TypeError, "prompt must be a string, not None"),
        (ll.tasks.language_task, {"block": "8"}, TypeError, "block must be a whole number, not '8'"),
        (ll.tasks.language_task, {"corpus": None}, TypeError, "corpus must be a Corpus, such as"),
        (ll.tasks.text_task, {"corpus": ["a"]}, TypeError, "corpus must be a Corpus, such as"),
    ],
)
def test_arguments_of_other_types_are_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**{"corpus": FILMS, "tokenizer": tokenizer_like("gpt2")} | options)


def test_texts_are_shortened_to_the_longest_beginning_that_fits():
    texts = ["abcdef", "", "ab c"]
    assert shortened(texts, lambda some: [len(text) <= 4 for text in some]) == ["abcd", "", "ab "]
    assert shortened(texts, lambda some: [False] * len(some)) == ["", "", ""]
    assert shortened([], lambda some: []) == []


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "bert"])
def test_a_question_has_one_beginning_whoever_adds_it(kind, written):
    tokenizer, model = tokenizer_like(kind), small("llama")
    template = "{{ bos_token }}" * written + "{{ messages[0]['content'] }} Answer:"
    seen = []

    def see(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0][0].tolist())

    handle = model.get_input_embeddings().register_forward_pre_hook(see)
    ll.forgetting.replies(model, tokenizer, ["a film"], most_tokens=1)
    assert seen[-1] == BEGINNING[kind] + bare(kind, "a film")
    tokenizer.chat_template = template
    try:
        ll.forgetting.replies(model, tokenizer, ["a film"], most_tokens=1)
    finally:
        tokenizer.chat_template = None
        handle.remove()
    assert (seen[-1].count(1) == max(len(BEGINNING[kind]), written) and seen[-1][0] == 1) or kind == "gpt2"
    assert seen[-1][seen[-1].count(1) :] == bare(kind, "a film Answer:")
