"""report.html, .md and .json: whole, true to the run's files, and safe to open."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lrquant import evaluate, pipeline, quantize
from lrquant.cli import main
from lrquant.config.config import Config, with_preset
from lrquant.errors import LRQuantError
from lrquant.measures.numbers import number, percent
from lrquant.reports.contents import QUANTILES, quantiles, run_contents
from lrquant.reports.repeat import repeating_command
from lrquant.reports.result_sections import result_tables
from lrquant.reports.writing import run_names, write_comparison, write_report
from lrquant.runs.folder import RunFolder

EVIL = '<img src=x onerror="alert(1)">&amp; |$a_b$*'
FILES = ("report.html", "report.md", "report.json")


def read(run, name):
    return (run.folder.path / name).read_text()


@pytest.fixture(scope="module")
def contents(full_run):
    return json.loads(read(full_run, "report.json"))


# What it says


def test_who_when_and_with_what(full_run, contents):
    run, identity = contents["run"], full_run.folder.identity
    assert run["data"] == identity["data"] and len(run["data"]["sha256"]) == 64
    assert run["weights"] == identity["model"]["weights"] and run["seed"] == 2
    assert run["versions"]["torch"] == torch.__version__
    assert run["seconds"] == sum(record.seconds for record in full_run.records)
    assert run["peak_memory_bytes"] == max(r.peak_memory_bytes for r in full_run.records)
    page, text = read(full_run, "report.html"), read(full_run, "report.md")
    for said in (run["data"]["sha256"], run["weights"], "W4A4", "LRQuant+", torch.__version__):
        assert said in page and said in text


def test_results_are_those_measured(full_run, contents):
    for name in ("perplexity", "agreement", "test_time_adaptation"):
        assert contents["results"][name] == full_run.results[name]
    scores = full_run.results["perplexity"]["wikitext2"]
    numbers = [scores[key] for key in ("full_precision", "round_to_nearest", "quantized")]
    numbers.append(scores["test_time_adapted"])
    row = next(line for line in read(full_run, "report.md").splitlines() if "| wikitext2" in line)
    assert [float(cell) for cell in row.strip("|").split("|")[1:]] == pytest.approx(
        numbers, rel=1e-3
    )
    for name in ("report.md", "report.html"):
        assert "adapted to this text (TTA)" in read(full_run, name)
        assert "the text that it is scored on" in read(full_run, name)


def test_blocks_are_records_and_figures(full_run, contents):
    assert len(contents["blocks"]) == 3
    for block, record in zip(contents["blocks"], full_run.records, strict=True):
        assert {name: block[name] for name in vars(record)} == vars(record)
        assert block["figures"] == full_run.folder.load_diagnostics(record.block)[0]


def test_the_worst_are_named(full_run, contents):
    found = sorted(
        (ratios["own_snr"]["learned"], block["block"], linear)
        for block in contents["blocks"]
        for linear, ratios in block["figures"]["linears"].items()
    )
    worst = [(w["own_snr"], w["block"], w["linear"]) for w in contents["worst_linears"]]
    assert worst == found[:10]
    first = contents["worst_linears"][0]
    assert f"{first['block']} {first['linear']}" in read(full_run, "report.html")
    made = [block["figures"]["error_made"]["learned"] for block in contents["blocks"]]
    assert contents["worst_blocks"][0] == {
        "block": made.index(max(made)),
        "error_made": max(made),
    }
    assert f"block {made.index(max(made))} (" in read(full_run, "report.html")


def test_distributions_are_of_all_parameters(full_run, contents):
    learned = full_run.folder.load_block(1)
    found = contents["blocks"][1]["parameters"]
    linear = "mlp.up_proj"
    both = [torch.sigmoid(learned[f"lwc.{linear}.{side}"]) for side in ("upper", "lower")]
    values = torch.cat([part.flatten() for part in both]).double()
    expected = torch.quantile(values, torch.tensor(QUANTILES).double(), interpolation="nearest")
    assert found["clipping"][linear] == pytest.approx(expected.tolist())
    scale = learned["let.input_layernorm.scale"]
    assert found["scale"]["input_layernorm"][2] == pytest.approx(float(scale.median()), rel=0.05)
    assert set(found) == {"scale", "clipping", "factors"}


def test_quantiles_of_one_and_of_many():
    assert quantiles(torch.tensor([3.0])) == [3.0] * 5
    assert quantiles(torch.arange(101.0).flip(0)) == [1.0, 25.0, 50.0, 75.0, 99.0]


def test_what_is_missing_is_said(full_run, contents, older_run):
    assert [line.split(":")[0] for line in contents["missing"]] == ["zero-shot tasks"]
    missing = run_contents(older_run.folder)["missing"]
    assert any("of blocks 0-2: learned without" in line for line in missing)
    for word in ("perplexity", "agreement", "zero-shot tasks"):
        assert any(line.startswith(word) for line in missing), word


def test_a_run_that_is_not_finished(copied):
    (copied / "blocks" / "0002.safetensors").unlink()
    found = run_contents(RunFolder.open(copied))
    assert len(found["blocks"]) == 2
    assert "blocks 2 to 2: the run is not finished" in found["missing"][0]
    write_report(RunFolder.open(copied))


def test_figures_of_some_blocks_only(copied):
    (copied / "diagnostics" / "0001.safetensors").unlink()
    write_report(RunFolder.open(copied))
    found = json.loads((copied / "report.json").read_text())
    assert found["blocks"][1]["figures"] is None
    assert "histograms of block 1: learned without" in found["missing"][0]


def test_tasks_with_their_standard_errors(copied):
    folder = RunFolder.open(copied)
    score = {"alias": "piqa", "acc,none": 0.625, "acc_stderr,none": 0.0125}
    folder.add_results({"tasks": {"piqa": {"quantized": score}}})
    write_report(folder)
    for name in ("report.md", "report.html"):
        text = (copied / name).read_text()
        assert "0.6250 ± 0.0125" in text and "stderr" not in text


def scored(method="LRQuant"):
    """A run with tasks as results.json has them."""
    score = {"acc,none": 0.5, "acc_stderr,none": 0.25, "sample_len": 4}
    full = {"acc,none": 0.625, "acc_stderr,none": 0.25}
    change = {"full_precision": {"acc,none": {"difference": -0.125, "stderr": 0.0625}}}
    piqa = {"data": "x", "quantized": score, "full_precision": full, "differences": change}
    results = {
        "tasks": {"piqa": piqa, "mmlu_x": {"part_of": "mmlu", "quantized": score}},
        "task_means": {"published": {"acc": {"quantized": {"mean": 0.75, "stderr": None}}}},
        "max_drop": {
            **{"allowed": 0.1, "against": "full_precision", "drop": 0.125, "stderr": 0.0625},
            "acceptable": False,
        },
    }
    return {"run": {"method_name": method}, "results": results}


def test_tasks_of_several_models_side_by_side():
    (table,) = result_tables([scored()], [""])
    head = ["task and metric", "full precision", "LRQuant", "from full precision"]
    assert table.head == head
    assert table.rows == [
        ["piqa acc", "0.6250 ± 0.2500", "0.5000 ± 0.2500", "-0.1250 ± 0.0625"],
        ["published, acc", "", "0.7500 ± ?", ""],
    ]
    assert "The tasks of a group are in report.json." in table.note
    assert "0.1250 ± 0.0625, MORE than the 0.1 allowed." in table.note


def test_tasks_of_several_runs_side_by_side():
    other = scored("LRQuant+")
    del other["results"]["task_means"], other["results"]["max_drop"]
    (table,) = result_tables([scored(), other], ["a", "b"])
    labels = ("full precision", "LRQuant", "from full precision")
    assert table.head[1:4] == [f"a: {label}" for label in labels]
    assert table.head[4:] == ["b: full precision", "b: LRQuant+", "b: from full precision"]
    first, mean = table.rows
    assert first[1:4] == first[4:] == ["0.6250 ± 0.2500", "0.5000 ± 0.2500", "-0.1250 ± 0.0625"]
    assert mean == ["published, acc", "", "0.7500 ± ?", "", "", "", ""]


def test_the_verdict_and_agreement_along_the_window(copied):
    folder = RunFolder.open(copied)
    folder.add_results({"max_drop": scored()["results"]["max_drop"], **scored()["results"]})
    write_report(folder)
    found = json.loads((copied / "report.json").read_text())["results"]
    spans = found["agreement"]["wikitext2"]["quantized"]["positions"]
    assert [(span["first"], span["last"]) for span in spans] == [(1, 1), (2, 3), (4, 7), (8, 15)]
    for name in ("report.md", "report.html"):
        text = (copied / name).read_text()
        assert "MORE than the 0.1 allowed" in text and "Agreement along the window" in text
        assert f"{spans[-1]['kl_mean']:.4f}" in text and "8–15" in text


def test_the_mean_accuracy_stands_at_the_top(copied):
    folder = RunFolder.open(copied)
    mean = {
        "quantized": {"mean": 0.3125, "stderr": 0.125},
        "full_precision": {"mean": 0.4375, "stderr": None},
    }
    folder.add_results({"task_means": {"mean of 2 tasks": {"acc_norm": mean}}})
    assert '<div class="tile"><span>mean of' not in (copied / "report.html").read_text()
    write_report(folder)
    tile = "<span>mean of 2 tasks</span><b>0.3125</b><span>full precision 0.4375</span>"
    assert tile in (copied / "report.html").read_text()


def test_what_is_said_of_activations_is_what_the_run_learned(full_run, make_run):
    assert "Between before and after stand the learned scales." in read(full_run, "report.html")
    assert "A quantised token&#39;s grid spans" in read(full_run, "report.html")
    clipped = make_run("clipped", lr_plus=False, scheme="W4A16", epochs=1)
    page = read(clipped, "report.html")
    assert "This run learned no scales." in page and "the learned scales" not in page
    assert "token&#39;s grid" not in page  # activations have no grid there


def test_numbers_have_the_same_digits():
    assert [number(value) for value in (2.0, 1.75, 37.1, 0.00125, 454812.0)] == [
        *("2.000", "1.750", "37.10", "0.001250", "454812")
    ]
    shares = [percent(value).removesuffix("\N{NO-BREAK SPACE}%") for value in (0, 0.0064, 1, 0.5)]
    assert shares == ["0", "0.640", "100", "50.0"]


# That it is safe and whole


class _Tags(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


def test_names_are_escaped(full_run):
    page = _Tags(read(full_run, "report.html"))
    assert "img" not in page.tags and "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(EVIL in words for words in page.words)
    text = read(full_run, "report.md")
    outside = "".join(text.split("```")[::2])
    assert "<img" not in outside.replace("\\<", "") and "\\|" in text.splitlines()[0]


def test_the_page_names_no_other_file(full_run):
    page = _Tags(read(full_run, "report.html"))
    places = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert places and all(value.startswith(("data:", "#")) for value in places)
    assert not re.search(r"url\((?!#)|@import", read(full_run, "report.html"))
    identities = [value for name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities)) > 0
    used = {value[1:] for value in places if value.startswith("#")}
    assert used <= set(identities)


def test_the_same_run_gives_the_same_bytes(copied):
    before = [(copied / name).read_bytes() for name in FILES]
    write_report(RunFolder.open(copied))
    after = [(copied / name).read_bytes() for name in FILES]
    assert after[1] == before[1]  # the folder's name alone differs, which report.md does not say
    write_report(RunFolder.open(copied))
    assert [(copied / name).read_bytes() for name in FILES] == after


def test_a_report_that_cannot_be_written_is_one_line(copied):
    for name in FILES:
        (copied / name).unlink()
    (copied / "report.md").mkdir()
    with pytest.raises(LRQuantError, match=r"report\.md: changed or damaged") as error:
        write_report(RunFolder.open(copied))
    assert "\n" not in str(error.value) and not list(copied.glob("*.tmp"))


def test_damaged_figures_are_one_line(copied):
    path = copied / "diagnostics" / "0001.safetensors"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(LRQuantError, match=r"0001\.safetensors: changed or .* delete it: the"):
        write_report(RunFolder.open(copied))


# When it is written


def test_no_report_where_it_is_not_asked_for(older_run):
    assert not any((older_run.folder.path / name).exists() for name in FILES)


def test_measuring_again_writes_it_again(make_run, model_folder, report_data, tmp_path):
    run = quantize(
        str(model_folder("llama")),
        "W4A16",
        output_dir=str(tmp_path / "run"),
        data_dir=str(report_data),
        **{"nsamples": 2, "seqlen": 16, "epochs": 1, "precision": "float32"},
    )
    assert "perplexity" not in json.loads(read(run, "report.json"))["results"]
    (run.folder.path / "report.html").unlink()
    evaluate(str(run.folder.path), ppl=("wikitext2",), output_dir=str(tmp_path / "elsewhere"))
    evaluate(str(run.folder.path), ppl=("wikitext2",), report=False)
    assert not (run.folder.path / "report.html").exists()
    assert not (tmp_path / "elsewhere" / "report.html").exists()
    evaluate(str(run.folder.path), ppl=("wikitext2",))
    assert "wikitext2" in json.loads(read(run, "report.json"))["results"]["perplexity"]
    assert "perplexity, wikitext2" in read(run, "report.html")


def test_the_commands(copied, older_run, tmp_path, capsys):
    for name in FILES:
        (copied / name).unlink()
    assert main(["report", str(copied)]) == 0
    assert all((copied / name).stat().st_size > 1000 for name in FILES)
    page = tmp_path / "both.html"
    paths = [str(copied), str(older_run.folder.path)]
    assert main(["compare", *paths, "--output", str(page)]) == 0
    assert str(page) in capsys.readouterr().out and "2 runs compared" in page.read_text()
    assert main(["compare", *paths, "--output", str(page)]) == 0
    page.write_text("<p>my own page")
    capsys.readouterr()
    assert main(["compare", *paths, "--output", str(page)]) == 2
    assert "not a page that lrquant wrote" in capsys.readouterr().err
    assert page.read_text() == "<p>my own page"
    for command in (["report", str(tmp_path)], ["compare", str(tmp_path), str(copied)]):
        assert main(command) == 2
        assert "no run here" in capsys.readouterr().err
    assert main(["compare", str(copied), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_runs_side_by_side(full_run, older_run, copied, tmp_path):
    other = shutil.copytree(copied, tmp_path / "x" / "full")
    RunFolder.open(other).write_text("config.yaml", full_run.folder.config.to_yaml())
    paths = [full_run.folder.path, older_run.folder.path, other]
    page = write_comparison(paths, tmp_path / "page.html").read_text()
    words = _Tags(page).words
    assert {"full (1)", "older", "full (2)"} <= set(words) and "not measured" in words
    assert "script" not in _Tags(page).tags and any(EVIL in word for word in words)


def test_names_of_runs():
    runs = [{"run": {"folder": name}} for name in ("a", "b", "a")]
    assert run_names(runs) == ["a (1)", "b", "a (2)"]


# The command that repeats it


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "W4A4"},
        {"scheme": "W3A16g64", "lr_plus": True, "epochs": 20},
        {"scheme": "W4A4-sym-qkv16", "activation_symmetric": True, "lwc": True},
        {"preset": "paper", "wbits": 4, "abits": 4, "keep_best": True, "lr_plus": True},
        {"preset": "paper", "scheme": "W2A16", "let": True, "lwc": False, "let_sites": ("norm",)},
        {"scheme": "W4A4", "rotation": True, "two_branch": False, "lwc_init": 4.0, "epochs": 1},
        {"scheme": "W4A4", "lr_plus": True, "dynamic_weights": False, "rotate_rank": 2},
        {"scheme": "W4A16", "epochs": 0, "ppl": ("c4", "ptb"), "compare": True, "report": False},
        {"scheme": "W4A16", "save_dir": "there/"},
        {
            "scheme_for": ("mlp.down_proj=W8A16", "layers.[01].*=W16A16", "a,b=W2A16"),
            **{"let_sites": ("norm", "up_down"), "ppl": ("c4", "ptb"), "let": True},
        },
        {"ppl": ("texts, mine.txt", r"a\b.txt", "-c4"), "data_dir": "-data", "limit": 3},
        {"model": "a folder/it's", "scheme": "W4A4", "resume": "x", "overwrite": True},
    ],
    ids=str,
)
def test_the_command_resolves_to_the_same_run(settings, monkeypatch):
    require_repeated(Config(**with_preset({"model": "m", **settings})).resolved(), monkeypatch)


def test_what_a_file_of_settings_says_the_command_says_too(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: my models/m\nscheme: W4A16g16\nlwc: true\ndata_dir: my data\n"
        "ppl: ['my texts, old.txt', wikitext2]\n"
        "scheme_for:\n  mlp.down_proj: W8A16\n  '*.v_proj': W8A16g16\n"
    )
    config = Config.from_yaml(path).resolved()
    assert config.scheme_for == ("mlp.down_proj=W8A16", "*.v_proj=W8A16g16")
    words = shlex.split(repeating_command(config))
    assert words.count("--scheme-for") == 2
    require_repeated(config, monkeypatch)


def require_repeated(config, monkeypatch):
    """The printed command, read by the command line, is a run of these settings."""
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda given, **rest: seen.append(given))
    monkeypatch.setattr("lrquant.cli.commands._print_results", lambda results: None)
    command = shlex.split(repeating_command(config))
    assert command[0] == "lrquant"
    with pytest.raises(AttributeError):  # there is no run to speak of
        main(command[1:])
    again = Config(**with_preset(seen[0])).resolved()
    for name, value in vars(config).items():
        if name not in ("resume", "overwrite", "preset", "output_dir", "save_dir", "log_dir"):
            assert getattr(again, name) == value, name
    assert again.save_dir == ("there-again" if config.save_dir else None)
    assert again.output_dir == config.output_dir.rstrip("/") + "-again"


def test_the_command_is_short():
    command = repeating_command(Config(model="m", scheme="W4A4", lr_plus=True).resolved())
    expected = "lrquant quantize --model m --scheme W4A4 --lr-plus --output-dir ../log-again"
    assert command == expected


def test_the_command_is_in_every_form(full_run, contents):
    command = contents["run"]["command"]
    assert command in read(full_run, "report.md")
    assert any(command in words for words in _Tags(read(full_run, "report.html")).words)
    words = shlex.split(command)
    assert Path(words[words.index("--output-dir") + 1]).name == "full-again"
