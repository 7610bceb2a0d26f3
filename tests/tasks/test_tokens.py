from __future__ import annotations

from itertools import islice

import pytest
import torch
from small_language import byte_tokenizer, part_of, small

import lora_lens as ll
from lora_lens.tasks.task import shuffled_rows
from lora_lens.tasks.tokens import EVALUATION_TOKENS, TokenExamples


def examples(*lengths: int, **settings: object) -> TokenExamples:
    """Text number i is made of the tokens 100 i, 100 i + 1, ..., and its label is i."""
    tokens = torch.tensor([100 * i + j for i, n in enumerate(lengths) for j in range(n)], dtype=torch.int32)
    return TokenExamples(tokens, torch.tensor(lengths), torch.arange(len(lengths)), **settings)


@pytest.fixture(scope="module")
def movies() -> TokenExamples:
    return ll.tasks.text_task(part_of("movies", 1000, 10), ll.tasks.bundled.minilm_tokenizer()).train


def padding(found: TokenExamples, batches: list[torch.Tensor]) -> float:
    """The share of padding among all that the model is given."""
    given = sum(len(rows) * int(found.lengths[rows].max()) for rows in batches)
    return 1 - sum(int(found.lengths[rows].sum()) for rows in batches) / given


def test_a_batch_is_padded_right_and_masked():
    found = examples(2, 3, 1, pad=7).batch(torch.tensor([2, 1]))
    assert found["input_ids"].tolist() == [[200, 7, 7], [100, 101, 102]]
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.long


def test_texts_of_one_length_need_no_mask():
    found = examples(2, 3, 2).batch(torch.tensor([0, 2]))
    assert list(found) == ["input_ids"] and found["input_ids"].tolist() == [[0, 1], [200, 201]]


def test_some_of_the_texts_in_another_order_keep_what_is_theirs():
    whole = examples(2, 3, 1, 2, pad=9, truncated=1, texts=("a", "b", "c", "d"), words={300: "x"})
    some = whole.take(torch.tensor([3, 1]))
    assert some.tokens.tolist() == [300, 301, 100, 101, 102] and some.tokens.dtype == torch.int32
    assert (some.lengths.tolist(), some.labels.tolist(), some.texts) == ([2, 3], [3, 1], ("d", "b"))
    assert some.pieces(0) == ["x", "#301"] and some.pad == 9
    assert whole.first(2).tokens.tolist() == [0, 1, 100, 101, 102]
    assert len(whole.first(99)) == 4


def test_joined_texts_follow_one_another_with_what_is_theirs():
    first = examples(2, 1, texts=("no", "a"), words={0: "n", 1: "o"}, truncated=1)
    second = examples(3, texts=("yes",), words={0: "n", 2: "s"}, truncated=2)
    whole = first.joined(second)
    assert [whole._text(row).tolist() for row in range(3)] == [[0, 1], [100], [0, 1, 2]]
    assert whole.labels.tolist() == [0, 1, 0] and whole.lengths.tolist() == [2, 1, 3]
    assert whole.texts == ("no", "a", "yes") and whole.words == {0: "n", 1: "o", 2: "s"}
    assert whole.truncated == 3 and len(first) == 2
    assert first.joined(examples(2)).texts is None
    batch = whole.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]


def test_every_training_text_comes_once_a_pass_and_in_batches_of_like_length(movies):
    passes = list(islice(movies.shuffled(20, seed=0), 2 * 50))
    assert [len(rows) for rows in passes] == [20] * 100
    once = 16 * 20  # what is drawn and sorted at a time; 50 batches are not whole draws
    assert sorted(torch.cat(passes[: once // 20]).tolist()) == sorted(
        next(shuffled_rows(1000, once, seed=0)).tolist()
    )
    counts = torch.cat(passes).bincount(minlength=1000)
    assert counts.min() >= 1 and counts.max() <= 3
    plain = list(islice(shuffled_rows(1000, 20, seed=0), 100))
    assert padding(movies, passes) < 0.1 < 0.4 < padding(movies, plain)
    longest = [int(movies.lengths[rows].max()) for rows in passes]
    assert longest != sorted(longest)  # the batches themselves come in random order


def test_no_text_comes_twice_in_a_batch_of_a_small_set():
    found = examples(*range(1, 41))
    batches = list(islice(found.shuffled(10, seed=0), 8))
    assert all(len(rows.unique()) == 10 for rows in batches)
    assert torch.cat(batches[:4]).sort().values.tolist() == list(range(40))
    assert torch.cat(batches[4:]).sort().values.tolist() == list(range(40))


def test_the_seed_determines_the_batches(movies):
    def drawn(seed: int) -> torch.Tensor:
        return torch.stack(list(islice(movies.shuffled(20, seed), 40)))

    first = drawn(3)
    torch.manual_seed(5)  # the global random state plays no part
    assert torch.equal(first, drawn(3)) and not torch.equal(first, drawn(4))


def test_evaluation_batches_hold_each_text_once_within_the_budget(movies):
    batches = list(movies.in_batches())
    assert sorted(torch.cat(batches).tolist()) == list(range(1000))
    sizes = [len(rows) * int(movies.lengths[rows].max()) for rows in batches]
    assert max(sizes) <= EVALUATION_TOKENS and len(batches) < 1.2 * sum(sizes) / EVALUATION_TOKENS
    assert padding(movies, batches) < 0.08


def test_batches_by_hand_with_a_text_longer_than_the_budget_alone():
    found = examples(4, 2, 50, 2, 3)
    assert [rows.tolist() for rows in found.in_batches(9)] == [[1, 3, 4], [0], [2]]  # 3 * 3, then 4, then 50
    assert [rows.tolist() for rows in found.in_batches(1)] == [[1], [3], [4], [0], [2]]


def test_the_fingerprint_changes_with_any_token_length_and_label():
    def task(found: TokenExamples) -> str:
        return ll.Task("t", tuple("abc"), found, found, pooling="mean").fingerprint()

    tokens, lengths, labels = torch.arange(6, dtype=torch.int32), torch.tensor([2, 3, 1]), torch.arange(3)
    base = task(TokenExamples(tokens, lengths, labels))
    found = {base}
    for place in range(6):
        changed = tokens.clone()
        changed[place] += 1
        found.add(task(TokenExamples(changed, lengths, labels)))
    found.add(task(TokenExamples(tokens, torch.tensor([3, 2, 1]), labels)))
    found.add(task(TokenExamples(tokens, lengths, torch.tensor([0, 2, 2]))))
    assert len(found) == 9
    assert base == task(TokenExamples(tokens.clone(), lengths, labels, pad=5))  # which the mask hides


@pytest.mark.parametrize(
    ("tokens", "lengths", "labels", "message"),
    [
        (3, [2, 1], [0], "one label per text, not 1 for 2"),
        (0, [], [], "one label per text, not 0 for 0"),
        (3, [3, 0], [0, 0], "every text needs at least one token"),
        (4, [2, 1], [0, 0], "the lengths must add up to the tokens"),
    ],
)
def test_examples_that_do_not_add_up_are_refused(tokens, lengths, labels, message):
    with pytest.raises(ValueError, match=message):
        TokenExamples(torch.arange(tokens), torch.tensor(lengths), torch.tensor(labels))


def test_tokens_of_another_model_are_refused():
    task = ll.tasks.text_task(part_of("movies", 8, 4), ll.tasks.bundled.minilm_tokenizer())
    largest = int(max(task.train.tokens.max(), task.test.tokens.max()))
    ll.evaluate(small("bert classifier", vocabulary=largest + 1), task)
    with pytest.raises(
        ValueError, match=rf"token {largest}, and BertForSequence.* has {largest} tokens: they"
    ):
        task.check_fit(small("bert classifier", vocabulary=largest))


@pytest.mark.parametrize("kind", ["bert classifier", "llama", "gpt2"])
def test_texts_longer_than_the_model_s_positions_are_refused(kind):
    corpus = part_of("movies", 8, 4)
    task = ll.tasks.text_task(corpus, byte_tokenizer(), pooling="last")
    longest = int(max(task.train.lengths.max(), task.test.lengths.max()))
    task.check_fit(small(kind, positions=longest))
    with pytest.raises(
        ValueError, match=rf"has {longest} tokens, and .* at most {longest - 1}; make the task"
    ):
        task.check_fit(small(kind, positions=longest - 1))
