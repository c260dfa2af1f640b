"""Calibration and evaluation samples: the field's windows, local files, the hub calls, errors."""

import dataclasses
import json
import random
import warnings

import datasets
import pyarrow
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lrquant.data import texts, windows
from lrquant.data.samples import calibration_samples, perplexity_windows
from lrquant.data.texts import load_text
from lrquant.errors import LRQuantError

VOCABULARY = 3000
BREAK = VOCABULARY + 2  # the id of a blank line; BOS and UNK come before it
BOS = VOCABULARY


def make_tokenizer(bos=False):
    """Words w0, w1, ... have their number as id and a blank line is a token of its own."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    words |= {"<s>": BOS, "<unk>": VOCABULARY + 1, "\n\n": BREAK}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n\n"), "isolated"),
            pre_tokenizers.Split(Regex("(?<!\n) (?!\n)"), "removed"),
        ]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", model_max_length=16
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture
def hub(monkeypatch):
    """A hub of Datasets by (repository, split) that records the calls made to it."""

    class Hub:
        def __init__(self):
            self.sets, self.calls = {}, []

        def load_dataset(self, repository, configuration=None, **options):
            self.calls.append((repository, configuration, options))
            return datasets.Dataset.from_dict(self.sets[repository, options["split"]])

    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


def words(count, start=0):
    return " ".join(f"w{i % VOCABULARY}" for i in range(start, start + count))


def put(folder, name, **splits):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        (folder / name / f"{split}.txt").write_bytes(text.encode())
    return folder


def stream_oracle(ids, count, seqlen, seed):
    """The field's loop over one stream, with the module's global generator as it uses it."""
    generator = random.Random(seed)
    starts = [generator.randint(0, len(ids) - seqlen - 1) for _ in range(count)]
    return torch.tensor([ids[start : start + seqlen] for start in starts])


def document_oracle(documents, count, seqlen, seed):
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        while True:
            ids = documents[generator.randint(0, len(documents) - 1)]
            if len(ids) >= seqlen:
                break
        start = generator.randint(0, len(ids) - seqlen - 1)
        rows.append(ids[start : start + seqlen])
    return torch.tensor(rows)


def error_of(call, *args, **kwargs):
    with pytest.raises(LRQuantError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Calibration from streams


def test_stream_windows_are_the_fields(tmp_path, tokenizer, no_hub):
    put(tmp_path, "wikitext2", train=words(1000))
    samples = calibration_samples("wikitext2", tokenizer, 16, 32, 2, tmp_path)
    assert torch.equal(samples.ids, stream_oracle(list(range(1000)), 16, 32, 2))
    assert samples.ids.dtype == torch.int64
    assert (samples.name, samples.split) == ("wikitext2", "train")
    assert samples.texts == {(str(tmp_path / "wikitext2" / "train.txt"), "file")}
    assert samples.description == "wikitext2/train, 16 x 32 = 512 tokens, seed 2"


def test_the_seed_decides_and_repeats(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", train=words(1000))
    draw = [calibration_samples("wikitext2", tokenizer, 4, 32, s, tmp_path) for s in (2, 2, 3)]
    assert torch.equal(draw[0].ids, draw[1].ids)
    assert draw[0].sha256 == draw[1].sha256
    assert not torch.equal(draw[0].ids, draw[2].ids)
    assert draw[0].sha256 != draw[2].sha256


def test_global_generators_are_left_alone(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", train=words(100))
    state = random.getstate()
    calibration_samples("wikitext2", tokenizer, 4, 32, 2, tmp_path)
    assert random.getstate() == state


def test_sha256_covers_ids_and_shape(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", test=words(64))
    narrow = perplexity_windows("wikitext2", tokenizer, 16, data_dir=tmp_path)
    wide = perplexity_windows("wikitext2", tokenizer, 32, data_dir=tmp_path)
    assert torch.equal(narrow.ids.flatten(), wide.ids.flatten())
    assert narrow.sha256 != wide.sha256
    put(tmp_path, "wikitext2", test=words(63) + " w9")
    assert perplexity_windows("wikitext2", tokenizer, 32, data_dir=tmp_path).sha256 != wide.sha256


def test_special_tokens_as_the_tokenizer_adds_them(tmp_path):
    put(tmp_path, "wikitext2", test=words(10))
    ids = perplexity_windows("wikitext2", make_tokenizer(bos=True), 5, data_dir=tmp_path).ids
    assert ids.tolist() == [[BOS, 0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_long_text_gives_no_warning(tmp_path, monkeypatch):
    put(tmp_path, "wikitext2", train=words(1000))
    said = []
    target = "transformers.tokenization_utils_base.logger.warning"
    monkeypatch.setattr(target, lambda *args, **kwargs: said.append(args))
    fresh = make_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration_samples("wikitext2", fresh, 2, 32, 0, tmp_path)
    assert said == []
    fresh(words(100))  # control: the plain call does warn
    assert said


def test_validation_is_the_plain_fallback_and_test_is_never_used(tmp_path, tokenizer, no_hub):
    put(tmp_path, "wikitext2", validation=words(100), test=words(100, 500))
    samples = calibration_samples("wikitext2", tokenizer, 2, 8, 0, tmp_path)
    assert samples.split == "validation"
    assert samples.description == (
        f"wikitext2/validation (no train split in {tmp_path}), 2 x 8 = 16 tokens, seed 0"
    )
    (tmp_path / "wikitext2" / "validation.txt").unlink()
    message = error_of(calibration_samples, "wikitext2", tokenizer, 2, 8, 0, tmp_path)
    assert "has test.txt" in message and "train.txt or validation.txt" in message


def test_train_is_preferred(tmp_path, tokenizer):
    put(tmp_path, "c4", train=words(100), validation=words(100, 500))
    samples = calibration_samples("c4", tokenizer, 3, 8, 0, tmp_path)
    assert samples.split == "train" and "no train" not in samples.description
    assert int(samples.ids.max()) < 100


def test_a_local_c4_stream_is_drawn_like_a_stream(tmp_path, tokenizer):
    put(tmp_path, "c4", validation=words(300))
    samples = calibration_samples("c4", tokenizer, 5, 32, 7, tmp_path)
    assert torch.equal(samples.ids, stream_oracle(list(range(300)), 5, 32, 7))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_text_of_exactly_one_window(tmp_path, tokenizer, name):
    put(tmp_path, name, train=words(32), validation=words(32), test=words(32))
    for samples in (
        calibration_samples(name, tokenizer, 2, 32, 0, tmp_path),
        perplexity_windows(name, tokenizer, 32, limit=2, data_dir=tmp_path),
    ):
        assert samples.ids.tolist() == [list(range(32))] * len(samples.ids)


# Calibration from documents


def test_documents_are_drawn_until_one_is_long_enough(tmp_path, tokenizer):
    lengths = [5, 40, 8, 33, 3, 100]
    path = tmp_path / "set.jsonl"
    rows = [{"url": "u", "text": words(n, 200 * i)} for i, n in enumerate(lengths)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    documents = [list(range(200 * i, 200 * i + n)) for i, n in enumerate(lengths)]
    samples = calibration_samples(str(path), tokenizer, 12, 32, 3)
    assert torch.equal(samples.ids, document_oracle(documents, 12, 32, 3))
    assert (samples.split, samples.texts) == ("file", {(str(path), "file")})
    assert samples.description == f"{path}, 12 x 32 = 384 tokens, seed 3"
    other = calibration_samples(str(path), tokenizer, 12, 32, 4)
    assert other.sha256 != samples.sha256


def test_a_document_of_exactly_one_window(tmp_path, tokenizer):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": words(n)}) + "\n" for n in (3, 32, 4)))
    samples = calibration_samples(str(path), tokenizer, 3, 32, 0)
    assert samples.ids.tolist() == [list(range(32))] * 3


def test_short_documents_are_joined_and_that_is_said(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": words(6, 10 * i)}) + "\n" for i in range(20)))
    joined = [token for i in range(20) for token in (*range(10 * i, 10 * i + 6), BREAK)][:-1]
    calls = []
    tokenise = windows.tokenise
    monkeypatch.setattr(
        windows, "tokenise", lambda t, text: calls.append(text) or tokenise(t, text)
    )
    samples = calibration_samples(str(path), tokenizer, 4, 32, 1)
    assert torch.equal(samples.ids, stream_oracle(joined, 4, 32, 1))
    assert "no document has 32 tokens: all are joined" in samples.description
    assert len(calls) == 21 and len(set(calls)) == 21  # each document once, then all joined
    message = error_of(calibration_samples, str(path), tokenizer, 4, 1000, 1)
    assert "139 tokens" in message and "1000" in message


# Mixtures


def test_mix_is_a_third_each_in_the_published_order(tmp_path, tokenizer, no_hub):
    put(tmp_path, "wikitext2", train=words(200))
    put(tmp_path, "ptb", train=words(200, 1000))
    put(tmp_path, "c4", validation=words(200, 2000))
    samples = calibration_samples("mix", tokenizer, 11, 16, 5, tmp_path)
    streams = [list(range(start, start + 200)) for start in (0, 1000, 2000)]
    counts = (4, 4, 3)
    expected = [stream_oracle(ids, n, 16, 5) for ids, n in zip(streams, counts, strict=True)]
    assert torch.equal(samples.ids, torch.cat(expected))
    assert samples.split == "train,validation"
    assert len(samples.texts) == 3
    assert samples.description == (
        "mix: 4 of wikitext2/train, 4 of ptb/train, "
        f"3 of c4/validation (no train split in {tmp_path}), 11 x 16 = 176 tokens, seed 5"
    )
    listed = calibration_samples("wikitext2, ptb,c4", tokenizer, 11, 16, 5, tmp_path)
    assert listed.sha256 == samples.sha256


def test_fewer_samples_than_sets_says_which_gave_none(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", train=words(200))
    samples = calibration_samples("wikitext2,c4", tokenizer, 1, 16, 5, tmp_path)
    assert samples.ids.shape == (1, 16)
    assert samples.description.startswith("wikitext2,c4: 1 of wikitext2/train, 0 of c4, 1 x 16")


def test_lists_take_files_and_refuse_repeats(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", train=words(200))
    path = tmp_path / "own,text.txt"
    path.write_text(words(100, 1000))
    assert calibration_samples(str(path), tokenizer, 2, 8, 0).ids.min() >= 1000
    plain = path.rename(tmp_path / "own.txt")
    both = calibration_samples(f"wikitext2,{plain}", tokenizer, 2, 8, 0, tmp_path)
    assert both.ids[0].max() < 200 and both.ids[1].min() >= 1000
    message = error_of(calibration_samples, "mix,c4", tokenizer, 4, 8, 0, tmp_path)
    assert "twice" in message
    message = error_of(calibration_samples, "wikitext2,", tokenizer, 4, 8, 0, tmp_path)
    assert "unknown data set ''" in message


# Perplexity


def test_windows_follow_each_other_and_the_tail_is_dropped(tmp_path, tokenizer, no_hub):
    put(tmp_path, "wikitext2", test=words(100), train=words(100, 500), validation=words(100, 900))
    samples = perplexity_windows("wikitext2", tokenizer, 32, data_dir=tmp_path)
    assert samples.ids.tolist() == torch.arange(96).view(3, 32).tolist()
    assert samples.description == "wikitext2/test, 3 x 32 = 96 tokens"
    first = perplexity_windows("wikitext2", tokenizer, 32, limit=2, data_dir=tmp_path)
    assert torch.equal(first.ids, samples.ids[:2])
    assert "(the first 2 of 3 windows), 2 x 32 = 64 tokens" in first.description
    for limit in (0, 3, 9):
        again = perplexity_windows("wikitext2", tokenizer, 32, limit=limit, data_dir=tmp_path)
        assert again.sha256 == samples.sha256 and again.description == samples.description


@pytest.mark.parametrize(
    ("name", "split", "joint"),
    [("ptb", "validation", [BREAK]), ("ptb-new", "test", [])],
)
def test_ptb_conventions_from_one_folder(tmp_path, tokenizer, name, split, joint):
    text = "\n\n".join(words(4, 10 * i) for i in range(5))
    put(tmp_path, "ptb", **{split: text})
    ids = perplexity_windows(name, tokenizer, 6, data_dir=tmp_path).ids.flatten().tolist()
    expected = [token for i in range(5) for token in (*range(10 * i, 10 * i + 4), *joint)]
    assert ids == expected[: len(ids)] and len(ids) >= 18


def test_c4_is_256_crops_with_seed_0(tmp_path, tokenizer):
    put(tmp_path, "c4", validation=words(500))
    samples = perplexity_windows("c4", tokenizer, 16, data_dir=tmp_path)
    assert torch.equal(samples.ids, stream_oracle(list(range(500)), 256, 16, 0))
    assert samples.description == (
        "c4/validation (256 random crops, seed 0), 256 x 16 = 4096 tokens"
    )
    few = perplexity_windows("c4", tokenizer, 16, limit=3, data_dir=tmp_path)
    assert torch.equal(few.ids, samples.ids[:3])
    assert "the first 3 of 256" in few.description


def test_c4_new_is_cut_to_256_windows(tmp_path, tokenizer):
    put(tmp_path, "c4", validation=words(2000))
    samples = perplexity_windows("c4-new", tokenizer, 4, data_dir=tmp_path)
    assert samples.ids.flatten().tolist() == list(range(1024))
    assert samples.name == "c4-new" and samples.split == "validation"


@pytest.mark.parametrize(
    ("name", "there", "wanted"),
    [
        ("wikitext2", "validation", "test"),
        ("ptb", "test", "validation"),
        ("ptb-new", "validation", "test"),
        ("c4", "train", "validation"),
        ("c4-new", "train", "validation"),
        ("pile", "test", "validation"),
    ],
)
def test_a_missing_perplexity_split_names_what_is_there(
    tmp_path, tokenizer, no_hub, name, there, wanted
):
    put(tmp_path, name.removesuffix("-new"), **{there: words(100)})
    message = error_of(perplexity_windows, name, tokenizer, 8, data_dir=tmp_path)
    assert f"has {there}.txt" in message and f"{wanted}.txt is needed" in message


def test_own_sets_use_test_else_validation(tmp_path, tokenizer, no_hub):
    put(tmp_path, "mine", validation=words(64))
    samples = perplexity_windows("mine", tokenizer, 32, data_dir=tmp_path)
    assert samples.split == "validation"
    assert f"mine/validation (no test split in {tmp_path})" in samples.description
    assert "no train split" in calibration_samples("mine", tokenizer, 1, 8, 0, tmp_path).description
    put(tmp_path, "mine", test=words(64, 100))
    samples = perplexity_windows("mine", tokenizer, 32, data_dir=tmp_path)
    assert samples.split == "test" and int(samples.ids.min()) == 100
    put(tmp_path, "other", train=words(64))
    message = error_of(perplexity_windows, "other", tokenizer, 32, data_dir=tmp_path)
    assert "has train.txt" in message and "test.txt or validation.txt" in message


@pytest.mark.parametrize("name", ["mix", "wikitext2,c4"])
def test_perplexity_is_of_one_set(tmp_path, tokenizer, name):
    assert "one set at a time" in error_of(perplexity_windows, name, tokenizer, 8)


# Files


def test_text_file_keeps_its_line_ends(tmp_path, tokenizer):
    path = tmp_path / "own.txt"
    path.write_bytes("a\r\nb\r\n\r\nä\n".encode())
    text = load_text(str(path), ("train",), None, None)
    assert text.documents == ["a\r\nb\r\n\r\nä\n"]
    assert (text.split, text.origin) == ("file", str(path))
    path.write_text(words(70))
    samples = perplexity_windows(str(path), tokenizer, 32)
    assert samples.split == "file" and samples.description == f"{path}, 2 x 32 = 64 tokens"


def test_own_documents_are_joined_by_blank_lines_for_perplexity(tmp_path, tokenizer):
    path = tmp_path / "own.json"
    path.write_text('{"text": "w1 w2"}\n\n{"text": "w3"}\n')
    assert perplexity_windows(str(path), tokenizer, 4).ids.tolist() == [[1, 2, BREAK, 3]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"a": "first", "text": "named"}, "named"),
        ({"n": 1, "body": "only"}, "only"),
        ({"text": 5, "body": "a string"}, "a string"),
        ({"text": "line\u2028separator"}, "line\u2028separator"),
    ],
)
def test_text_column(tmp_path, row, expected):
    lines = tmp_path / "set.jsonl"
    lines.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    table = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    for path in (lines, table):
        assert load_text(str(path), ("train",), None, None).documents == [expected]


def test_no_text_column_names_the_columns(tmp_path):
    lines = tmp_path / "set.jsonl"
    lines.write_text('{"n": 1, "m": [2]}')
    table = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.table({"n": [1], "m": [2.0]}), table)
    for path in (lines, table):
        assert "columns: n, m" in error_of(load_text, str(path), ("train",), None, None)


def test_parquet_documents_are_drawn(tmp_path, tokenizer):
    path = tmp_path / "set.PARQUET"
    strings = pyarrow.array([words(40), words(40, 100)], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": strings}), path)
    samples = calibration_samples(str(path), tokenizer, 6, 32, 0)
    documents = [list(range(40)), list(range(100, 140))]
    assert torch.equal(samples.ids, document_oracle(documents, 6, 32, 0))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.jsonl", b"{\xff}", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.json", b'["a", "b"]', "row 1: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2: not of the layout 'column text'"),
        ("a.parquet", b"no parquet\nat all", "cannot be read as parquet"),
        ("a.txt", None, "no such file"),
        ("a.jsonl", None, "no such file"),
        ("a.parquet", None, "no such file"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = error_of(calibration_samples, str(path), tokenizer, 1, 8, 0)
    assert expected in message and str(path) in message
    assert expected in error_of(perplexity_windows, str(path), tokenizer, 8)


def test_missing_string_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "row 2: not of the layout" in error_of(load_text, str(path), ("train",), None, None)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_empty_files(tmp_path, tokenizer, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n")
    else:
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "no rows in it" in error_of(calibration_samples, str(path), tokenizer, 1, 8, 0)


# Arguments


def test_bad_numbers(tmp_path, tokenizer):
    put(tmp_path, "wikitext2", train=words(20), test=words(20))
    assert "nsamples is 0" in error_of(
        calibration_samples, "wikitext2", tokenizer, 0, 8, 0, tmp_path
    )
    assert "seqlen is 1" in error_of(calibration_samples, "wikitext2", tokenizer, 1, 1, 0, tmp_path)
    assert "seqlen is 1" in error_of(perplexity_windows, "wikitext2", tokenizer, 1, -1, tmp_path)
    for message in (
        error_of(calibration_samples, "wikitext2", tokenizer, 1, 21, 0, tmp_path),
        error_of(perplexity_windows, "wikitext2", tokenizer, 21, -1, tmp_path),
    ):
        assert "20 tokens" in message and "seqlen 21" in message and "longer text" in message


@pytest.mark.parametrize("name", ["wikitext", "", ".", "..", "a/b"])
def test_unknown_names_list_the_known(tmp_path, tokenizer, no_hub, name):
    put(tmp_path, "mine", train=words(20))
    put(tmp_path, "empty")
    put(tmp_path, "a/b", train=words(20))
    message = error_of(calibration_samples, name, tokenizer, 1, 8, 0, tmp_path)
    for known in ("wikitext2", "c4-new", "ptb-new", "pile", "mix", "has: mine)", ".parquet"):
        assert known in message
    assert "unknown data set" in error_of(perplexity_windows, name, tokenizer, 8)


def test_data_dir_must_be_there(tmp_path, tokenizer, no_hub):
    message = error_of(calibration_samples, "c4", tokenizer, 1, 8, 0, tmp_path / "nowhere")
    assert "nowhere: no such folder" in message


def test_results_are_frozen(tmp_path, tokenizer):
    put(tmp_path, "c4", train=words(20))
    samples = calibration_samples("c4", tokenizer, 1, 8, 0, tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        samples.seed = 1


# The hub


@pytest.mark.parametrize(
    ("name", "split", "call", "column"),
    [
        (
            "wikitext2",
            "train",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", None, None),
            "text",
        ),
        (
            "c4",
            "train",
            ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, None),
            "text",
        ),
        (
            "c4-new",
            "validation",
            ("allenai/c4", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}, None),
            "text",
        ),
        (
            "ptb",
            "validation",
            (
                "ptb-text-only/ptb_text_only",
                None,
                {"validation": "penn_treebank/validation/*.parquet"},
                "refs/convert/parquet",
            ),
            "sentence",
        ),
        (
            "ptb-new",
            "test",
            (
                "ptb-text-only/ptb_text_only",
                None,
                {"test": "penn_treebank/test/*.parquet"},
                "refs/convert/parquet",
            ),
            "sentence",
        ),
        (
            "pile",
            "validation",
            ("mit-han-lab/pile-val-backup", None, {"validation": "val.jsonl.zst"}, None),
            "text",
        ),
    ],
)
def test_hub_calls(tmp_path, hub, name, split, call, column):
    repository, configuration, files, revision = call
    hub.sets[repository, split] = {column: ["one", "two"], "other": [1, 2]}
    text = load_text(name, (split,), None, tmp_path)
    options = dict(data_files=files, revision=revision, split=split, cache_dir=str(tmp_path))
    assert hub.calls == [(repository, configuration, options)]
    assert list(text.documents) == ["one", "two"]
    assert (text.name, text.split, text.origin) == (name, split, repository)
    load_text(name, (split,), None, None)
    assert hub.calls[1][2]["cache_dir"] is None


def test_hub_is_asked_only_for_what_data_dir_lacks(tmp_path, tokenizer, hub):
    put(tmp_path, "c4", train=words(50))
    hub.sets["Salesforce/wikitext", "train"] = {"text": [words(30), "", words(30, 100)]}
    samples = calibration_samples("wikitext2,c4", tokenizer, 4, 16, 1, tmp_path)
    assert [call[0] for call in hub.calls] == ["Salesforce/wikitext"]
    local = (str(tmp_path / "c4" / "train.txt"), "file")
    assert samples.texts == {("Salesforce/wikitext", "train"), local}


def test_hub_streams_are_joined_by_blank_lines(tokenizer, hub):
    hub.sets["Salesforce/wikitext", "train"] = {"text": [words(30), words(30, 100)]}
    samples = calibration_samples("wikitext2", tokenizer, 6, 16, 1)
    ids = [*range(30), BREAK, *range(100, 130)]
    assert torch.equal(samples.ids, stream_oracle(ids, 6, 16, 1))
    hub.sets["ptb-text-only/ptb_text_only", "train"] = {"sentence": [words(30), words(30, 100)]}
    samples = calibration_samples("ptb-new", tokenizer, 6, 16, 1)
    ids = [*range(30), *range(100, 130)]
    assert torch.equal(samples.ids, stream_oracle(ids, 6, 16, 1))


def test_hub_c4_draws_documents(tokenizer, hub):
    lengths = [3, 50, 9, 60]
    rows = {"text": [words(n, 100 * i) for i, n in enumerate(lengths)]}
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    hub.sets["allenai/c4", "train"] = hub.sets["allenai/c4", "validation"] = rows
    calibration = calibration_samples("c4", tokenizer, 8, 32, 2)
    assert torch.equal(calibration.ids, document_oracle(documents, 8, 32, 2))
    crops = perplexity_windows("c4", tokenizer, 32)
    assert torch.equal(crops.ids, document_oracle(documents, 256, 32, 0))
    assert calibration_samples("c4-new", tokenizer, 8, 32, 2).sha256 == calibration.sha256
    joined = perplexity_windows("c4-new", tokenizer, 32)
    assert joined.ids.flatten().tolist() == [i for ids in documents for i in ids][:96]


def test_c4_new_takes_1100_documents(tokenizer, hub):
    rows = {"text": ["w1 w2"] * 1100 + ["w3"] * 50}
    hub.sets["allenai/c4", "validation"] = rows
    samples = perplexity_windows("c4-new", tokenizer, 20)
    assert samples.ids.shape == (110, 20) and not (samples.ids == 3).any()


def test_pile_is_1000_validation_documents(tokenizer, hub):
    hub.sets["mit-han-lab/pile-val-backup", "validation"] = {"text": ["w1"] * 1000 + ["w2"] * 9}
    samples = calibration_samples("pile", tokenizer, 2, 8, 0)
    assert "pile/validation (no train split on the hub)" in samples.description
    windows = perplexity_windows("pile", tokenizer, 1999)
    assert windows.ids.tolist() == [[1, BREAK] * 999 + [1]]
    assert list(load_text("pile", ("validation",), None, None).documents) == ["w1"] * 1000


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach\nthe hub"),
        FileNotFoundError("not cached"),
        DatasetNotFoundError("gone"),
        EntryNotFoundError("no such entry"),
        HTTPError("proxy"),
        ValueError("Couldn't find cache for x\nAvailable configs in the cache: []"),
        ImportError("Please pip install zstandard"),
    ],
)
def test_hub_failures_are_one_line_with_a_remedy(tmp_path, tokenizer, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = error_of(calibration_samples, "wikitext2", tokenizer, 1, 8, 0)
    assert message.startswith("wikitext2: no data_dir is given, and the hub's Salesforce/wikitext")
    assert "--data_dir DIR with DIR/wikitext2/train.txt, or a network" in message
    message = error_of(perplexity_windows, "ptb-new", tokenizer, 8, data_dir=tmp_path)
    assert f"not in {tmp_path}" in message and "DIR/ptb/test.txt" in message


def test_other_failures_are_not_hidden(tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ZeroDivisionError):
        calibration_samples("wikitext2", tokenizer, 1, 8, 0)


def test_a_missing_package_is_named(tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("Compression type zstd not supported")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    message = error_of(calibration_samples, "pile", tokenizer, 1, 8, 0)
    assert "pip install zstandard" in message


def test_a_hub_set_without_its_column_is_an_error(tokenizer, hub):
    hub.sets["Salesforce/wikitext", "train"] = {"body": ["a"]}
    message = error_of(calibration_samples, "wikitext2", tokenizer, 1, 8, 0)
    assert "Column 'text'" in message


def test_offline_mode_does_not_wait_for_the_network(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_of(perplexity_windows, "c4", tokenizer, 8, cache_dir=tmp_path)
    assert "allenai/c4 cannot be read (offline (HF_HUB_OFFLINE is set)" in message
