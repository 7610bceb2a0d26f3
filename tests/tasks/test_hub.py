from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from text_rows import GOOD, write

from lora_lens.tasks.hub import dataset_corpus, hub_corpus

if TYPE_CHECKING:
    from datasets import Dataset


def loaded(texts: list, labels: list, names: list[str] | None = None) -> Dataset:
    """A data set in memory, its classes with names if these are given."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    return data if names is None else data.cast_column("label", datasets.ClassLabel(names=names))


@pytest.fixture
def news() -> Dataset:
    return loaded(["x", "y"], [1, 0], ["world", "sports"])


def test_a_data_set_s_own_names_are_the_classes(news):
    train = loaded(["a", "b", "c"], [1, 0, 1], ["world", "sports"])
    corpus = dataset_corpus(train, news, "news")
    assert corpus.name == "news" and corpus.classes == ("world", "sports")
    assert corpus.train.texts == ("a", "b", "c") and corpus.train.labels == (1, 0, 1)
    assert corpus.test.texts == ("x", "y") and corpus.test.labels == (1, 0)
    as_numpy = train.with_format("numpy").map(lambda row: row).filter(lambda row: row["text"] != "b")
    swapped = loaded(["a", "d"], [1, 0], ["1", "0"])  # the label 0 is called "1"
    others = swapped.map(lambda row: {"text": row["text"] + "!"})
    assert dataset_corpus(swapped, others, "n").train.labels == (1, 0)
    with pytest.raises(ValueError, match=r"no text: 'world' \(news \(test\), row 2\)"):
        dataset_corpus(as_numpy, news, "news")


def test_a_data_set_without_names_has_its_labels_as_classes():
    test = loaded(["x"], [3])
    assert dataset_corpus(loaded(["a", "b"], [12, 3]), test, "n").classes == ("3", "12")
    words = dataset_corpus(loaded(["a", "b"], ["up", "down"]), loaded(["x"], ["up"]), "n")
    assert words.classes == ("down", "up") and words.train.labels == (1, 0)
    plain = dataset_corpus(loaded(["a", "b"], [0, 0]), test, "n", label=None)
    assert plain.classes == () and plain.train.labels == (0, 0)


def test_at_most_so_many_texts_are_drawn_with_the_seed():
    train = loaded([f"text {i}" for i in range(100)], [i % 2 for i in range(100)])
    test = loaded([f"test {i}" for i in range(15)], [i % 2 for i in range(15)])
    corpus = dataset_corpus(train, test, "n", most=20)
    assert len(corpus.train) == 20 and len(corpus.test) == 15
    numbers = [int(text.split()[1]) for text in corpus.train.texts]
    assert numbers == sorted(numbers) and corpus.train.labels == tuple(i % 2 for i in numbers)
    assert numbers != list(range(20))
    again, other = (dataset_corpus(train, test, "n", most=20, seed=seed) for seed in (0, 1))
    assert again.fingerprint() == corpus.fingerprint() != other.fingerprint()
    assert set(dataset_corpus(train, test, "n", most=10).train.texts) < set(corpus.train.texts)
    assert dataset_corpus(train, test, "n", most=1000).train.texts == tuple(train["text"])


def test_few_texts_are_of_all_classes_in_proportion():
    train = loaded([f"text {i}" for i in range(100)], ["rare"] * 4 + ["usual"] * 96)
    test = loaded([f"test {i}" for i in range(8)], ["rare", "usual"] * 4)
    for seed in range(5):
        corpus = dataset_corpus(train, test, "n", most=25, seed=seed)
        assert corpus.train.labels.count(0) == 1 and corpus.test.labels.count(0) == 4
        assert set(dataset_corpus(train, test, "n", most=2, seed=seed).train.labels) == {0, 1}


def test_data_sets_are_checked_as_files_are(news):
    with pytest.warns(UserWarning, match=r"^n: left out 1 training .* and 1 repeated texts$") as caught:
        dataset_corpus(loaded(["a", "b", "A", "X"], [0, 1, 0, 0]), loaded(["x"], [1]), "n")
    assert caught[0].filename == __file__
    train = loaded(["a", "b"], [0, 1])
    with pytest.raises(
        ValueError, match=r"n \(train\): one text has several labels: 'a' \(rows 1, 2: '0', '1'\)"
    ):
        dataset_corpus(loaded(["a", "A"], [0, 1]), news, "n")
    empty = loaded(["a", "", "b", None], [0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"n \(train\): 2 of 4 .* empty \(rows 2, 4\); .*Dataset\.filter"):
        dataset_corpus(empty, news, "n")
    hidden = loaded(["x", "y"], [-1, -1], ["0", "1"])
    with pytest.raises(ValueError, match=r"n \(test\): 2 of 2 labels are missing .*a part that has them"):
        dataset_corpus(train, hidden, "n")
    with pytest.raises(ValueError, match=r"n \(test\): 1 labels are not whole, such as 0\.5 \(row 1\)"):
        dataset_corpus(train, loaded(["x"], [0.5]), "n")
    with pytest.raises(TypeError, match=r"row 1: a label must be .*, not list \[0, 1\]"):
        dataset_corpus(loaded(["a"], [[0, 1]]), news, "n")
    with pytest.raises(ValueError, match=r"n \(train\) has no column 'sentence'; its columns are 'text'"):
        dataset_corpus(train, news, "n", text="sentence")
    with pytest.raises(ValueError, match=r"n \(train\) is empty"):
        dataset_corpus(train.select([]), news, "n")
    with pytest.raises(TypeError, match=r"n \(train\) must be one datasets\.Dataset.*not DatasetDict"):
        dataset_corpus(pytest.importorskip("datasets").DatasetDict(train=train), news, "n")
    with pytest.raises(ValueError, match="most must be at least 1, not 0"):
        dataset_corpus(train, news, "n", most=0)
    with pytest.raises(TypeError, match=r"most must be a whole number, not 10\.5"):
        dataset_corpus(train, news, "n", most=10.5)
    torn = loaded(["a", "A", "b", "c"], [0, 1, 0, 1])
    with pytest.warns(UserWarning, match="2 rows whose texts have several labels") as caught:
        corpus = dataset_corpus(torn, loaded(["x"], [0]), "n", conflicts="drop")
    assert corpus.train.texts == ("b", "c") and caught[0].filename == __file__


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A local data set of CSV files, as ``load_dataset`` finds them by their names."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "films").mkdir()
    write(tmp_path / "films" / "train.csv", [*GOOD, ("Good one", "pos")])
    write(tmp_path / "films" / "test.csv", [("a fine film", "pos")])
    return tmp_path / "films"


def test_a_local_folder_is_loaded_as_a_hub_s_data_set(folder):
    with pytest.warns(UserWarning, match="^films: left out 1 repeated texts$") as caught:
        corpus = hub_corpus(folder)
    assert __file__ in [w.filename for w in caught if "repeated texts" in str(w.message)]
    assert corpus.name == "films" and corpus.classes == ("neg", "pos")
    assert corpus.train.texts == tuple(text for text, _ in GOOD) and corpus.train.labels == (1, 0, 1, 0)
    assert corpus.test.texts == ("a fine film",) and corpus.test.labels == (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = hub_corpus(folder, most=4, label=None)
    assert 3 <= len(drawn.train) <= 4 and drawn.classes == ()


def test_a_missing_split_is_named_with_those_there_are(folder):
    with pytest.raises(ValueError, match=r"films has no split 'valid'; it has 'train', 'test', so"):
        hub_corpus(str(folder), test="valid")
    with pytest.raises(ValueError, match="most must be at least 1"):
        hub_corpus(folder, most=0)


def test_a_data_set_s_own_code_is_not_run(folder):
    (folder / "films.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(RuntimeError, match=r"scripts are no longer supported.*films\.py"):
        hub_corpus(folder)
    assert not (folder / "ran").exists()


def test_a_missing_or_older_package_is_named(folder, monkeypatch):
    monkeypatch.setattr("datasets.__version__", "3.6.0")
    with pytest.raises(ImportError, match=r"datasets 3\.6\.0 may execute .*pip install -U \"datasets>=4\""):
        hub_corpus(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)  # which makes the import fail
    with pytest.raises(ImportError, match=r"pip install \"datasets>=4\""):
        hub_corpus(folder)
