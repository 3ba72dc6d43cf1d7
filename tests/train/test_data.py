"""Data: every format read, a bad row named, and the split the same for the same seed."""

import json
import random

import datasets
import pytest

from train import cli, data
from train.config import DataSection

ROWS = [("a fine film", 1), ('he said "dull', 0), ("null", 1), ("a, b and c", 0)]


def section(path, **settings):
    return DataSection(**{"train": str(path), "holdout": 1, **settings})


def write(folder, name, text):
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return folder / name


def file_of(folder, kind):
    records = [{"text": text, "label": label} for text, label in ROWS]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    text = {
        "csv": 'text,label\na fine film,1\n"he said ""dull",0\nnull,1\n"a, b and c",0\n',
        "tsv": 'text\tlabel\na fine film\t1\nhe said "dull\t0\nnull\t1\na, b and c\t0\n',
        "jsonl": lines,
        "json": json.dumps(records),
    }[kind]
    return write(folder, f"rows.{kind}", text)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    table = data.read_table(str(file_of(tmp_path, kind)), section(file_of(tmp_path, kind)))
    assert list(zip(table.texts, table.labels, strict=True)) == ROWS
    assert table.pairs is None


@pytest.mark.parametrize(
    ("header", "settings", "columns"),
    [
        pytest.param("text,label", {}, (0, None, 1), id="text"),
        pytest.param("id,sentence,labels", {}, (1, None, 2), id="sentence-and-labels"),
        pytest.param("premise,hypothesis,label", {}, (0, 1, 2), id="premise-hypothesis"),
        pytest.param("label,sentence2,sentence1", {}, (2, 1, 0), id="sentence-pair"),
        pytest.param("text,text_pair,label", {}, (0, 1, 2), id="a-pair-before-its-half"),
        pytest.param(
            "review,stars", {"text": "review", "label": "stars"}, (0, None, 1), id="named"
        ),
    ],
)
def test_columns_are_recognised_by_their_names(tmp_path, header, settings, columns):
    width = header.count(",") + 1
    rows = [[f"v{column}{row}" for column in range(width)] for row in range(3)]
    path = write(tmp_path, "rows.csv", "\n".join([header, *map(",".join, rows)]) + "\n")
    table = data.read_table(str(path), section(path, **settings))
    text, pair, label = columns
    assert table.texts == [row[text] for row in rows]
    assert table.pairs == (pair if pair is None else [row[pair] for row in rows])
    assert table.labels == [row[label] for row in rows]


def test_a_file_without_a_header_has_its_columns_named(tmp_path):
    path = write(tmp_path, "rows.tsv", "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThey drank.\n")
    table = data.read_table(str(path), section(path, columns=("source", "label", "mark", "text")))
    assert table.texts == ["The sailors rode.", "They drank."]
    assert table.labels == [1, 0]


@pytest.mark.parametrize(
    ("labels", "settings", "num_labels", "numbers", "names"),
    [
        pytest.param("10", {}, None, [1, 0], ("0", "1"), id="numbers"),
        pytest.param("20", {}, None, [2, 0], ("0", "1", "2"), id="numbers-with-a-gap"),
        pytest.param("10", {}, 3, [1, 0], ("0", "1", "2"), id="a-wider-model"),
        pytest.param("yn", {}, None, [1, 0], ("n", "y"), id="words-in-order"),
        pytest.param("yn", {"labels": ("y", "n")}, None, [0, 1], ("y", "n"), id="words-as-given"),
        pytest.param("10", {"labels": ("no", "yes")}, 2, [1, 0], ("no", "yes"), id="named-numbers"),
        pytest.param("21", {"labels": ("1", "2")}, None, [1, 0], ("1", "2"), id="from-one-on"),
    ],
)
def test_labels_become_numbers(tmp_path, labels, settings, num_labels, numbers, names):
    path = write(tmp_path, "r.csv", "text,label\n" + "".join(f"x,{each}\n" for each in labels))
    given = section(path, **settings)
    table = data.read_table(str(path), given)
    assert data.class_names([table], given, num_labels) == names
    assert data.number_labels(table, names).labels == numbers


def test_the_holdout_is_the_start_of_a_seeded_shuffle(tmp_path):
    texts = [f"text {row}" for row in range(50)]
    rows = "".join(f"{text},{row % 2}\n" for row, text in enumerate(texts))
    path = write(tmp_path, "rows.csv", "text,label\n" + rows)
    found = data.load_data(section(path, holdout=10, limit=5, seed=3))
    random.Random(3).shuffle(texts)
    assert found.evaluation.texts == texts[:10]
    assert found.train.texts == texts[10:15]


def test_a_validation_file_is_kept_whole_and_shares_the_class_names(tmp_path):
    train = write(tmp_path, "train.csv", "text,label\na,x\nb,y\nc,x\n")
    other = write(tmp_path, "other.csv", "text,label\nd,z\n")
    found = data.load_data(DataSection(train=str(train), validation=str(other)))
    assert sorted(found.train.texts) == ["a", "b", "c"]
    assert found.evaluation == data.Examples(["d"], None, [2])
    assert found.names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("name", "text", "settings", "message"),
    [
        pytest.param("r.csv", "", {}, "r.csv is empty", id="empty-file"),
        pytest.param("r.csv", "text,label\n", {}, "r.csv holds no rows", id="no-rows"),
        pytest.param("r.jsonl", "\n\n", {}, "r.jsonl holds no rows", id="blank-lines"),
        pytest.param("r.xml", "a", {}, r"cannot read '\.xml' files", id="unknown-kind"),
        pytest.param(
            "r.csv", "text,label\na,1,2\n", {}, "line 2 has 3 cells, more than", id="ragged"
        ),
        pytest.param(
            "r.csv",
            "text,label\nb,0\na,1,2\n",
            {},
            "cannot be read: line 3 has 3 cells",
            id="ragged-later",
        ),
        pytest.param(
            "r.jsonl",
            '{"text":\n',
            {},
            r"r.jsonl cannot be read: line 1 is not JSON",
            id="not-json",
        ),
        pytest.param("r.json", "[3]", {}, "row 1 is int '3', not an object", id="json-of-numbers"),
        pytest.param("r.csv.gz", "a", {}, "cannot be read: Not a gzipped file", id="not-packed"),
        pytest.param(
            "r.csv",
            b"text,label\na,1\n\xff,0\n",
            {},
            "not UTF-8: line 3 holds the byte 0xff",
            id="latin-1",
        ),
        pytest.param("r.csv", "text,text\na,b\n", {}, "same name", id="two-columns-of-one-name"),
        pytest.param(
            "r.csv",
            "premis,hypothesis,lable\na,b,1\n",
            {},
            "columns .*'premis'.* nearest format is premise, hypothesis, label",
            id="misspelt-columns",
        ),
        pytest.param(
            "r.csv",
            "text,label\na,1\n",
            {"text": "txt"},
            "no column 'txt'; did you mean 'text'",
            id="misspelt-setting",
        ),
        pytest.param(
            "r.jsonl",
            '{"text": "a", "label": 1}\n{"sentence1": "b", "sentence2": "c", "label": 0}\n',
            {"text": "text"},
            r"(?s)1 bad cell.*row 2: 'text' is empty; its keys are \['label', 'sentence1', "
            r"'sentence2'\]. The nearest format is sentence1, sentence2, label",
            id="a-row-of-another-format",
        ),
        pytest.param(
            "r.csv", "text,label\na,1\nb,\n", {}, "(?s)row 2: 'label' is empty", id="no-label"
        ),
        pytest.param(
            "r.jsonl",
            '{"text": "a", "label": 0.5}\n',
            {},
            r"(?s)row 1: 'label' is float 0\.5",
            id="a-fraction",
        ),
        pytest.param(
            "r.csv",
            "text,label\n" + ",1\n" * 9,
            {},
            "(?s)9 bad cells.*row 5.*and 4 more",
            id="many-bad-rows",
        ),
        pytest.param(
            "r.csv", "text,label\na,1\nb,-1\n", {}, "row 2: label -1 is out of range", id="negative"
        ),
        pytest.param(
            "r.csv",
            "text,label\na,good\nb,goood\n",
            {"labels": ("bad", "good")},
            "row 2: label 'goood' is out of range.*Did you mean 'good'",
            id="misspelt-label",
        ),
        pytest.param("r.csv", "text,label\na,1\nb,1\n", {}, "only the label 1", id="one-class"),
        pytest.param(
            "r.csv", "text,label\na,1\nb,0\n", {"holdout": 2}, "leaves none", id="all-held-out"
        ),
        pytest.param("no_such.jsonl", None, {}, "There is no file 'no_such.jsonl'", id="no-file"),
        pytest.param("no/such:name@x@y", None, {}, "neither a file nor a hub", id="no-hub-name"),
    ],
)
def test_bad_data_is_named(tmp_path, name, text, settings, message):
    path = name if text is None else write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        data.load_data(section(path, **settings))


@pytest.mark.parametrize(
    ("num_labels", "message"),
    [
        pytest.param(2, "row 3: label 2 is out of range. There are 2 classes", id="numbers"),
        pytest.param(None, None, id="as-many-as-found"),
    ],
)
def test_labels_beyond_the_model_are_refused(tmp_path, num_labels, message):
    path = write(tmp_path, "r.csv", "text,label\na,0\nb,1\nc,2\n")
    if message is None:
        assert data.load_data(section(path), num_labels).names == ("0", "1", "2")
        return
    with pytest.raises(ValueError, match=message):
        data.load_data(section(path), num_labels)


def test_nothing_is_left_in_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data.load_data(section(file_of(tmp_path, "parquet")))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("file", "settings", "count", "names"),
    [
        pytest.param(
            "CoLA/dev.tsv",
            {"columns": ("source", "label", "mark", "text")},
            1043,
            ("0", "1"),
            id="cola",
        ),
        pytest.param("SST-2/dev.tsv", {}, 872, ("0", "1"), id="sst2"),
        pytest.param("RTE/dev.tsv", {}, 277, ("entailment", "not_entailment"), id="rte"),
        pytest.param(
            "MNLI/dev_matched.jsonl",
            {},
            9815,
            ("contradiction", "entailment", "neutral"),
            id="mnli",
        ),
    ],
)
def test_the_glue_files_are_read_as_they_are(data_dir, file, settings, count, names):
    given = section(data_dir / "glue" / file, **settings)
    found = data.load_data(given)
    assert len(found.train.texts) + len(found.evaluation.texts) == count
    assert found.names == names


def test_a_text_of_ten_megabytes_is_cut_as_any_other(folder, capsys):
    text = f"{'fine' * 50} " * 50_000
    assert len(text) > 10_000_000
    with (folder / "rows.csv").open("a") as rows:
        rows.write(f"{text},1\n")
    assert cli.main([str(folder / "run.yaml"), "--dry-run"]) == 0
    assert "1 of 301 texts were cut to 8 tokens" in capsys.readouterr().out
