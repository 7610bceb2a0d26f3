from __future__ import annotations

import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from small_tokenizers import tokenizer_like
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import lora_lens as ll
from lora_lens.tasks.text import LanguageTask, WordTask
from lora_lens.tasks.tokens import TokenExamples

FILMS = ll.tasks.Corpus(
    "films",
    ("bad", "good"),
    ll.tasks.Texts(["one two three four five six", "a long long long long long film", "fine"], [0, 0, 1]),
    ll.tasks.Texts(["no two films are alike", "yes"], [0, 1]),
)
PLAIN = ll.tasks.Corpus(
    "plain", (), ll.tasks.Texts(["some words. " * 9], [0]), ll.tasks.Texts(["other words. " * 9], [0])
)


@pytest.fixture(scope="module")
def minilm_tokenizer():
    return ll.tasks.bundled.minilm_tokenizer()


def rows(part: TokenExamples) -> list[list[int]]:
    """Every text's tokens."""
    return [found.tolist() for found in part.tokens.split(part.lengths.tolist())]


def test_a_text_task_holds_what_the_tokenizer_gives(minilm_tokenizer):
    task = ll.tasks.text_task(FILMS, minilm_tokenizer)
    assert type(task) is ll.Task and (task.name, task.classes, task.pooling) == (
        "films",
        ("bad", "good"),
        "mean",
    )
    for part, texts in ((task.train, FILMS.train), (task.test, FILMS.test)):
        assert rows(part) == minilm_tokenizer(list(texts.texts))["input_ids"]
        assert part.labels.tolist() == list(texts.labels) and part.texts == texts.texts
        assert (part.truncated, part.pad) == (0, minilm_tokenizer.pad_token_id)
    assert task.test.pieces(1) == ["[CLS]", "yes", "[SEP]"]


def test_longer_texts_lose_their_end_with_a_count(minilm_tokenizer):
    with pytest.warns(UserWarning) as caught:
        task = ll.tasks.text_task(FILMS, minilm_tokenizer, most_tokens=6)
    assert [str(w.message) for w in caught] == [
        "films, training: 2 of 3 texts have more than 6 tokens and lost their end",
        "films, test: 1 of 2 texts have more than 6 tokens and lost their end",
    ]
    assert {w.filename for w in caught} == {__file__}
    assert (task.train.truncated, task.test.truncated) == (2, 1)
    whole = minilm_tokenizer(list(FILMS.train.texts))["input_ids"]
    assert rows(task.train) == [[*ids[:5], ids[-1]] for ids in whole[:2]] + [whole[2]]  # with their own [SEP]
    assert task.train.texts == FILMS.train.texts


def test_the_tokenizer_s_own_limit_holds_without_one(minilm_tokenizer):
    long = ll.tasks.Corpus(
        "long", ("a", "b"), ll.tasks.Texts(["word " * 600, "x"], [0, 1]), ll.tasks.Texts(["y"], [0])
    )
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 512 tokens"):
        task = ll.tasks.text_task(long, minilm_tokenizer)
    assert task.train.lengths.tolist() == [512, 3]
    assert ll.tasks.text_task(long, byte_tokenizer()).train.lengths[0] > 600  # which has none


@pytest.mark.parametrize("most", [0, -1, 513])
def test_limits_that_the_tokenizer_does_not_allow_are_refused(most, minilm_tokenizer):
    with pytest.raises(ValueError, match=f"most_tokens must be 1 to 512, .* not {most}"):
        ll.tasks.text_task(FILMS, minilm_tokenizer, most_tokens=most)


@pytest.mark.parametrize("most", [1, 2])
def test_a_limit_that_leaves_no_room_for_the_text_is_refused(most, minilm_tokenizer):
    with pytest.raises(ValueError, match=rf"2 special tokens .* most_tokens=3 or more.*not {most}"):
        ll.tasks.text_task(FILMS, minilm_tokenizer, most_tokens=most)


def test_a_text_without_tokens_is_refused_by_its_number():
    only_ab = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    corpus = ll.tasks.Corpus(
        "odd", ("a", "b"), ll.tasks.Texts(["ab", "\u200b", "ba"], [0, 1, 1]), ll.tasks.Texts(["a"], [0])
    )
    with pytest.raises(ValueError, match=r"odd, training: text 1 \('\\u200b'\) has no tokens; leave it out"):
        ll.tasks.text_task(corpus, only_ab)
    assert rows(ll.tasks.label_word_task(corpus, only_ab, prompt="{text}a", words=["a", "b"]).train)[1] == [0]


@pytest.mark.parametrize("make", [ll.tasks.text_task, ll.tasks.label_word_task])
@pytest.mark.parametrize("classes", [(), ("only",)])
def test_a_classification_needs_classes(make, classes):
    corpus = ll.tasks.Corpus("plain", classes, PLAIN.train, PLAIN.test)
    with pytest.raises(
        ValueError, match=f"plain has {len(classes)} classes.*plain text is for language_task"
    ):
        make(corpus, byte_tokenizer())


def test_a_tokenizer_without_a_pad_token_stays_as_it_is():
    tokenizer = byte_tokenizer()
    before = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length, len(tokenizer))
    tasks = [make(FILMS, tokenizer) for make in (ll.tasks.text_task, ll.tasks.label_word_task)]
    assert before == (None, tokenizer.padding_side, tokenizer.model_max_length, len(tokenizer))
    assert tokenizer.pad_token is None and [task.train.pad for task in tasks] == [0, 0]


def test_a_word_task_puts_the_text_into_the_prompt():
    tokenizer = byte_tokenizer()
    task = ll.tasks.label_word_task(FILMS, tokenizer, prompt="Film: {text} It was")
    assert type(task) is WordTask and task.classes == ("bad", "good")
    assert task.words == tuple(tuple(tokenizer(word)["input_ids"]) for word in (" bad", " good"))
    whole = [tokenizer(f"Film: {text} It was")["input_ids"] for text in FILMS.test.texts]
    assert rows(task.test) == whole  # " no" is one token, " " and "no" would be two
    usual = ll.tasks.label_word_task(FILMS, tokenizer)
    assert tokenizer.decode(usual.test.batch(torch.tensor([1]))["input_ids"][0]) == "yes\nSentiment:"


def test_a_long_text_in_a_prompt_loses_its_own_end():
    tokenizer = byte_tokenizer()
    words = [" bad", " quite good"]
    longest = max(len(tokenizer(word)["input_ids"]) for word in words)
    after = tokenizer(" It was")["input_ids"]
    whole = tokenizer(list(FILMS.train.texts))["input_ids"]
    room = max(map(len, whole)) - 1
    most = room + len(after) + longest
    with pytest.warns(UserWarning, match="films, training: 2 of 3 texts") as caught:
        task = ll.tasks.label_word_task(
            FILMS, tokenizer, prompt="{text} It was", words=words, most_tokens=most
        )
    assert caught[0].filename == __file__
    assert rows(task.train) == [[*ids[:room], *after] for ids in whole]
    assert int(task.train.lengths.max()) + longest == most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "no place"}, r"the prompt must hold \{text\} once.*not 'no place'"),
        ({"prompt": "{text} {label}:"}, r"prompt has \{label\}, .*the only placeholder is \{text\}"),
        ({"prompt": "{text} {text}"}, r"must hold \{text\} once"),
        ({"words": [" one"]}, "films has 2 classes, and there are 1 words"),
        ({"words": [" one", ""]}, "the word '' has no tokens"),
        ({"words": [" one", " one"]}, "begin those of"),
        ({"words": [" x", " xy"]}, "the tokens of ' x' begin those of ' xy'.*choose other words"),
        ({"words": [" xy", " x"]}, "the tokens of ' x' begin those of ' xy'"),
        ({"most_tokens": 8}, r"the prompt alone has \d+ tokens, and \d+ are allowed in all"),
    ],
)
def test_prompts_and_words_that_cannot_work_are_refused(settings, message):
    tokenizer = byte_tokenizer()
    x, xy = (tokenizer(word)["input_ids"] for word in (" x", " xy"))
    assert xy[: len(x)] == x
    with pytest.raises(ValueError, match=message):
        ll.tasks.label_word_task(FILMS, tokenizer, **settings)


def test_running_text_is_joined_and_cut_into_blocks():
    tokenizer = byte_tokenizer()
    corpus = part_of("tweets", 5, 3)
    task = ll.tasks.language_task(corpus, tokenizer, block=16)
    assert type(task) is LanguageTask and task.classes == ()
    joined = [
        t for text in corpus.train.texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    blocks = len(joined) // 16
    assert rows(task.train) == [joined[16 * i : 16 * (i + 1)] for i in range(blocks)]
    assert tokenizer.eos_token_id in task.train.tokens and task.train.labels.tolist() == [0] * blocks
    assert task.train.texts is None and "".join(task.train.pieces(0)) == tokenizer.decode(joined[:16])
    assert "attention_mask" not in task.train.batch(torch.arange(2))


def test_blocks_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, one to predict the other, not 1"):
        ll.tasks.language_task(PLAIN, byte_tokenizer(), block=1)
    with pytest.raises(ValueError, match=r"the training texts of plain have \d+ tokens, less than one block"):
        ll.tasks.language_task(PLAIN, byte_tokenizer(), block=1000)
    uneven = ll.tasks.text_task(FILMS, byte_tokenizer())
    with pytest.raises(ValueError, match="odd: the blocks of a language task must all be of one length"):
        LanguageTask("odd", (), uneven.train, uneven.test, pooling="mean")


def test_the_fingerprint_tells_the_readouts_of_the_same_texts_apart():
    tokenizer = byte_tokenizer()
    tasks = [
        *(ll.tasks.text_task(FILMS, tokenizer, pooling=pooling) for pooling in ("mean", "last", "model")),
        ll.tasks.label_word_task(FILMS, tokenizer),
        ll.tasks.label_word_task(FILMS, tokenizer, words=[" poor", " fine"]),
        ll.tasks.label_word_task(FILMS, tokenizer, prompt="{text} is"),
        *(ll.tasks.language_task(FILMS, tokenizer, block=block) for block in (2, 4)),
        ll.tasks.probed(small("llama"), ll.tasks.text_task(FILMS, tokenizer)),
    ]
    assert len({task.fingerprint() for task in tasks}) == len(tasks)
    assert tasks[3].fingerprint() == ll.tasks.label_word_task(FILMS, byte_tokenizer()).fingerprint()
    assert tasks[3].subset(train=2).fingerprint() != tasks[3].fingerprint()


def test_a_subset_keeps_the_kind_of_task():
    words = ll.tasks.label_word_task(FILMS, byte_tokenizer())
    part = words.subset(train=2, test=1)
    assert type(part) is WordTask and part.words == words.words
    assert (len(part.train), len(part.test)) == (2, 1) and part.train.texts[1] == "fine"
    running = ll.tasks.language_task(FILMS, byte_tokenizer(), block=4).first(test=1)
    assert type(running) is LanguageTask and running.test.lengths.tolist() == [4]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_longest_word_must_fit_behind_the_longest_text(kind):
    task = ll.tasks.label_word_task(FILMS, byte_tokenizer(), words=[" bad", " quite good"])
    needed = int(max(task.train.lengths.max(), task.test.lengths.max())) + max(map(len, task.words))
    ll.evaluate(small(kind, positions=needed), task, examples=task.train)
    with pytest.raises(ValueError, match=rf"{needed} tokens, and .* takes at most {needed - 1}"):
        task.own_readout(small(kind, positions=needed - 1))


def test_words_that_the_tokenizer_does_not_know_are_refused():
    train, test = ll.tasks.Texts(("a film", "a play"), (0, 1)), ll.tasks.Texts(("one",), (0,))
    corpus = ll.tasks.Corpus("films", ("bad", "☃"), train, test)
    with pytest.raises(ValueError, match="the tokenizer does not know the word ' ☃'"):
        ll.tasks.label_word_task(corpus, tokenizer_like("bert"))
