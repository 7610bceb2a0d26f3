from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lora_lens as ll
from lora_lens.tasks import bundled_texts
from lora_lens.tasks.bundled_texts import CORPORA, articles, genres, ratings, sentiment
from lora_lens.tasks.corpus import Corpus, same_text

DATA = Path(__file__).parents[2] / "data"
FILE = DATA / "corpora.json.xz"
TEXTS = {"movies": (8482, 2121), "products": (2977, 719), "tweets": (3323, 817), "newspaper": (4111, 1004)}
RATED = {"movies": (8060, 2010), "products": (2389, 587), "tweets": (2705, 667), "newspaper": (2366, 561)}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script that made the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DATA)
        yield import_module("prepare_text")


@pytest.fixture(scope="module")
def content() -> dict:
    return json.loads(lzma.decompress(FILE.read_bytes()))


@pytest.fixture
def own_file(tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the file that is read in place of the embedded one."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (FILE.name, "SHA256SUMS"):
        shutil.copy(DATA / name, folder)
    monkeypatch.setattr(ll.tasks.bundled, "PACKAGE", tmp_path)
    bundled_texts._held.cache_clear()
    yield folder / FILE.name
    bundled_texts._held.cache_clear()


def every_corpus() -> list[Corpus]:
    return [*map(sentiment, CORPORA), genres(), genres(3599), articles()]


@pytest.mark.parametrize("name", CORPORA)
def test_sizes_are_those_stated(name):
    table, corpus = ratings(name), sentiment(name)
    assert ((~table["test"]).sum(), table["test"].sum()) == TEXTS[name]
    assert (len(corpus.train), len(corpus.test)) == RATED[name]
    assert corpus.name == name and corpus.classes == ("negative", "positive")
    assert f"- {name}: {RATED[name][0]:,} and {RATED[name][1]:,}\n" in sentiment.__doc__
    row = next(line for line in (DATA / "README.md").read_text().splitlines() if f"| {name} |" in line)
    assert [int(cell.replace(",", "")) for cell in row.split("|")[3:7]] == [*TEXTS[name], *RATED[name]]


def test_a_training_text_of_one_corpus_is_a_test_text_of_none():
    corpora = every_corpus()
    train, test = ({same_text(t) for c in corpora for t in getattr(c, p).texts} for p in ("train", "test"))
    assert not train & test
    # all texts in some corpus: the rated ones, the others in genres, and the articles
    assert len(train) > 8060 + 2389 + 2705 + 2366 and len(test) > 2010 + 587 + 667 + 561


def test_no_text_is_there_twice_or_unclean():
    texts = [text for name in CORPORA for text in ratings(name)["text"]]
    assert max(Counter(map(same_text, texts)).values()) == 1
    assert not [t for t in texts if "&amp;" in t or "&lt;" in t or "&gt;" in t or t != " ".join(t.split())]


@pytest.mark.parametrize(("name", "groups"), [("products", 300), ("newspaper", 498), ("tweets", 4012)])
def test_a_review_an_article_and_a_family_of_tweets_are_on_one_side(name, groups, script):
    table = ratings(name)
    assert table["group"].nunique() == groups < len(table)
    assert table.groupby("group")["test"].nunique().eq(1).all()
    assert table[table["test"]]["group"].nunique() == round(groups / 5)
    rows = [script.Row(*row) for row in table[["group", "rating", "text"]].itertuples(index=False)]
    assert script.groups_to_test(name, rows) == set(table[table["test"]]["group"])
    assert script.groups_to_test(name, rows, seed=1) != set(table[table["test"]]["group"])


@pytest.mark.parametrize("name", CORPORA)
def test_labels_are_the_signs_of_the_ratings_in_the_file(name, content):
    rated = dict(zip(content[name]["texts"], content[name]["ratings"], strict=True))
    corpus = sentiment(name)
    for part in (corpus.train, corpus.test):
        assert all(label == (rated[text] > 0) for text, label in zip(part.texts, part.labels, strict=True))
    held = {*corpus.train.texts, *corpus.test.texts}
    assert held == {text for text, rating in rated.items() if abs(rating) >= 0.5}
    assert all(-4 <= rating <= 4 and round(rating, 2) == rating for rating in rated.values())


def test_texts_and_ratings_are_those_of_the_source():
    movies, tweets, newspaper = ratings("movies"), ratings("tweets"), ratings("newspaper")
    assert movies.iloc[2].tolist() == ["Effective but too tepid biopic", -0.6, 3, False]
    louder = tweets[tweets["group"] == 35]
    assert louder["text"].tolist() == [
        "Anger is ugly.", "Anger is ugly!", "Anger is UGLY!!", "Anger is UGLY!!!", "Anger is very ugly!",
    ]  # fmt: skip
    assert louder["rating"].tolist() == [-1.01, -1.44, -2.43, -2.71, -1.89]
    assert newspaper["text"][1] == (
        "Events include sprinting, broad jumping, yule log rolling, wreath tossing and a toy sack relay."
    )
    assert "We were 17 deep last night & the love was so strong" in tweets["text"][2]  # "&amp;" there


def test_genres_are_balanced_and_grow():
    few, more = genres(50), genres(100)
    for corpus, train, test in ((few, 40, 10), (more, 80, 20), (genres(), 2400, 600)):
        assert Counter(corpus.train.labels) == dict.fromkeys(range(4), train)
        assert Counter(corpus.test.labels) == dict.fromkeys(range(4), test)
    assert set(few.train.texts) < set(more.train.texts) and set(few.test.texts) < set(more.test.texts)
    assert genres(50).fingerprint() == few.fingerprint() != more.fingerprint()
    own = {name: set(ratings(name)["text"]) for name in CORPORA}
    pairs = zip(few.train.texts, few.train.labels, strict=True)
    assert all(text in own[few.classes[label]] for text, label in pairs)


def test_the_first_texts_are_of_all_classes():
    for corpus in (*map(sentiment, CORPORA), genres()):
        first = Counter(corpus.train.labels[:200])
        assert len(first) == len(corpus.classes)
        for label, count in Counter(corpus.train.labels).items():
            assert abs(first[label] / 200 - count / len(corpus.train)) < 0.12  # over 3 standard errors


def test_an_article_is_its_sentences_in_order():
    corpus = articles()
    assert corpus.classes == () and corpus.name == "newspaper articles"
    assert (len(corpus.train), len(corpus.test)) == (398, 100)
    assert set(corpus.train.labels) == {0}
    table = ratings("newspaper")
    joined = " ".join(table[table["group"] == 416]["text"])
    assert joined in corpus.test.texts and joined.startswith(
        "What do these numbers say about America? A.T.&T. handled roughly 120 million long-distance calls"
    )
    words = sum(len(text.split()) for text in (*corpus.train.texts, *corpus.test.texts))
    assert words == sum(len(text.split()) for text in table["text"])


@pytest.mark.parametrize("load", [sentiment, ratings])
def test_an_unknown_corpus_is_told_the_known_ones(load):
    with pytest.raises(
        ValueError, match="name must be one of 'movies', 'products', 'tweets', 'newspaper', not 'films'"
    ):
        load("films")


@pytest.mark.parametrize("asked", [0, 4, 3600])
def test_too_few_or_too_many_texts_per_genre_are_told_the_bounds(asked):
    with pytest.raises(ValueError, match=f"per_genre must be 5 to 3599, .* not {asked}"):
        genres(asked)


def test_texts_per_genre_are_a_whole_number():
    with pytest.raises(TypeError):
        genres(50.0)


def test_a_damaged_or_missing_file_is_named(own_file):
    assert len(sentiment("tweets").test) == 667
    raw = bytearray(own_file.read_bytes())
    raw[5000] ^= 1
    own_file.write_bytes(raw)
    bundled_texts._held.cache_clear()
    with pytest.raises(ValueError, match=r"corpora.json.xz is damaged"):
        sentiment("tweets")
    own_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"corpora.json.xz is missing"):
        articles()


def test_changing_a_table_changes_no_other():
    table = ratings("tweets")
    table.loc[0, "text"] = "changed"
    assert ratings("tweets")["text"][0] != "changed"


SAMPLE = {
    "movies": "1\t2.266666\tA  &amp;amp;  B\r\n2\t-0.004\tDull.\r\n3\t1\t \r\n4\t-3\tBad\r\n",
    "products": "7_1\t0.5\tbad\r\n7_2\t-1.005\tWorks.\r\n",
    "tweets": "1\t2\tI love it\r\n2\t0\tother words here\r\n3\t3\tI LOVE it!!\r\n4\t3\tI really love it\r\n",
}


def test_the_script_cleans_drops_repeats_and_groups_what_is_alike(script):
    made = json.loads(lzma.decompress(script.packed(SAMPLE, "free")))
    assert made["licence"] == "free"
    assert made["movies"]["texts"] == ["A & B", "Dull.", "Bad"]
    assert made["movies"]["ratings"] == [2.27, 0, -3]
    assert made["movies"]["groups"] == [1, 2, 4]  # 3 is empty
    assert made["products"]["texts"] == ["Works."] and made["products"]["groups"] == [7]  # "bad" is above
    assert made["tweets"]["groups"] == [1, 2, 1, 1]  # {i, love, it}, 3 of 4 words shared with the last one
    assert [sum(made[name]["test"]) for name in SAMPLE] == [1, 0, 0]  # of 3, 1 and 2 groups, a fifth


def test_the_script_makes_the_same_bytes_twice_and_others_of_other_texts(script):
    assert script.packed(SAMPLE, "free") == script.packed(SAMPLE, "free") != script.packed(SAMPLE, "other")


def test_the_script_refuses_another_archive(script, tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"other.tar.gz is not the source archive of vaderSentiment-3.3.2"):
        script.read_archive(tmp_path / "other.tar.gz")


def test_the_script_replaces_its_own_checksum_alone(script, tmp_path):
    (tmp_path / "SHA256SUMS").write_text("aa  corpora.json.xz\nbb  zz.npz\n")
    (tmp_path / "corpora.json.xz").write_bytes(b"x")
    script.write_checksum(tmp_path / "corpora.json.xz")
    own = hashlib.sha256(b"x").hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{own}  corpora.json.xz\nbb  zz.npz\n"


def test_the_file_is_small_and_carries_its_licence(content):
    assert FILE.stat().st_size < 1.2e6
    assert "Copyright (c) 2016 C.J. Hutto" in content["licence"]
    assert "THE SOFTWARE IS PROVIDED" in content["licence"]


def test_the_file_belongs_to_the_wheel():
    stated = (DATA.parent / "pyproject.toml").read_text()
    assert '"data/corpora.json.xz" = "lora_lens/data/corpora.json.xz"' in stated
