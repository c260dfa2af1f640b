"""Pictures with words: read, made into inputs, calibrated on, answered; bad input by name."""

from __future__ import annotations

import json
import math
import re

import datasets
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    ViTImageProcessorPil,
)

import lrquant
from lrquant.cli import main, quantize_main
from lrquant.data.beginnings import Beginning, beginning_by_itself
from lrquant.data.conversations import read_conversations
from lrquant.data.prompts import picture_samples
from lrquant.errors import LRQuantError
from lrquant.measures.scoring.answers import answer_kind, exact_match, normalized, vqa_accuracy
from lrquant.model.loading import load_model
from lrquant.preflight import kinds
from lrquant.preflight.checks import preflight
from lrquant.preflight.probe import BlockCosts
from lrquant.runs.folder import RunFolder

SETTINGS = {"nsamples": 4, "seqlen": 24, "epochs": 1, "report": False, "precision": "float32"}


@pytest.fixture
def model(llava_folder):
    return load_model(str(llava_folder))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Some words to calibrate on, of no importance at all. " * 20)
    return path


def asked(processor, item, words):
    """What transformers alone makes of a question about the picture of an item."""
    content = [
        {"type": "image", "path": str(item.pictures[0])},
        {"type": "text", "text": words},
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def test_inputs_are_those_of_the_processor(model, processor, questions):
    """Compared with transformers' own way from a picture and its question to tensors."""
    samples = picture_samples(questions, model)
    item = read_conversations(questions).items[1]
    expected = asked(processor, item, "what?")
    found = samples.feed.inputs[1]
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert int((found["input_ids"] == 260).sum()) == 16
    assert not samples.feed.scored[1][found["input_ids"][0] == 260].any()


def test_a_broken_picture_of_a_folder_is_left_out_and_counted(model, pictures, caplog):
    samples = picture_samples(pictures, model)
    assert len(samples.feed) == 6
    assert "6 with pictures, 1 could not be opened" in samples.description
    assert "broken.jpg: cannot be opened" in caplog.text


def test_samples_are_drawn_by_their_seed(model, pictures):
    first, again, other = (picture_samples(pictures, model, 3, seed) for seed in (1, 1, 2))
    assert len(first.feed) == 3 and "3 of 6 with pictures" in first.description
    assert first.sha256 == again.sha256 != other.sha256


BAD_LINES = {
    "not JSON": ("{", "expected"),
    "no question": ('{"image": "pictures/0.png"}', "KeyError: 'question'"),
    "no picture there": (
        '{"image": "pictures/none.png", "question": "?"}',
        "its picture .*none.png does not exist",
    ),
    "no messages": ('{"messages": []}', "got no message"),
    "a picture without a path": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        'an image needs a "path"',
    ),
    "a film": (
        '{"messages": [{"role": "user", "content": [{"type": "video"}]}]}',
        "use image or text",
    ),
    "answers of another form": (
        '{"image": "pictures/0.png", "question": "?", "answers": [["red"]]}',
        "neither words nor numbers",
    ),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_named_with_its_number(what, tmp_path, pictures):
    line, message = BAD_LINES[what]
    path = tmp_path / "bad.jsonl"
    path.write_text('{"image": "pictures/0.png", "question": "?"}\n' + line + "\n")
    with pytest.raises(LRQuantError, match=f"bad.jsonl, line 2.*{message}"):
        read_conversations(path)


def test_a_broken_picture_of_a_conversation_is_an_error(tmp_path, model, pictures):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"image": "pictures/broken.jpg", "question": "?"}\n')
    with pytest.raises(LRQuantError, match=r"broken.jpg: cannot be opened .*replace it"):
        picture_samples(path, model)


def test_an_empty_folder_is_said(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LRQuantError, match="empty: no pictures"):
        picture_samples(tmp_path / "empty", model)


def test_a_missing_processor_is_said(llava_folder, pictures, caplog):
    for file in ("preprocessor_config.json", "processor_config.json"):
        (llava_folder / file).unlink(missing_ok=True)
    with caplog.at_level("WARNING", logger="lrquant"):
        model = load_model(str(llava_folder))
    assert "no processor for pictures can be read" in caplog.text
    with pytest.raises(LRQuantError, match=r"no processor .*copy preprocessor_config.json"):
        picture_samples(pictures, model)


def test_a_text_model_takes_no_pictures(model_folder, pictures):
    with pytest.raises(LRQuantError, match="a 'llama' takes no pictures"):
        picture_samples(pictures, load_model(str(model_folder("llama"))))


def test_a_template_without_a_place_for_pictures_is_said(llava_folder, questions):
    (llava_folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(LRQuantError, match=r"line 1: the processor .*picture"):
        picture_samples(questions, load_model(str(llava_folder)))


def learned(llava_folder, tmp_path, **settings):
    given = {**SETTINGS, "output_dir": str(tmp_path / "run"), **settings}
    return lrquant.quantize(str(llava_folder), "W4A4", **given)


def test_pictures_and_text_are_mixed_as_stated(llava_folder, tmp_path, questions, text):
    run = learned(
        llava_folder,
        tmp_path,
        calib_images=str(questions),
        calib_dataset=str(text),
        calib_image_share=0.75,
        vision_scheme="W8A8",
    )
    words = run.folder.identity["calibration"]
    assert "3 of 6 with pictures" in words and "1 x 24 = 24 tokens" in words
    assert run.folder.tower.finished_blocks() == 2


def test_the_weight_of_picture_tokens_counts(llava_folder, tmp_path, questions):
    losses = []
    for weight in (1.0, 1e-3):
        run = learned(
            llava_folder,
            tmp_path / str(weight),
            calib_images=str(questions),
            calib_image_share=1.0,
            image_token_weight=weight,
        )
        losses.append([record.initial_loss for record in run.records])
    assert losses[0] != losses[1]


def test_a_tower_without_pictures_to_learn_on_is_refused(llava_folder, tmp_path, text):
    with pytest.raises(LRQuantError, match="no calibration sample has a picture"):
        learned(llava_folder, tmp_path, calib_dataset=str(text), vision_scheme="W8A8")


def test_a_run_with_a_tower_resumes_to_the_same_bytes(llava_folder, tmp_path, questions):
    settings = {"calib_images": str(questions), "calib_image_share": 1.0, "vision_scheme": "W4A8"}
    whole = learned(llava_folder, tmp_path / "whole", **settings)
    half = learned(llava_folder, tmp_path / "half", **settings)
    for path in (half.folder.block_path(1), half.folder.tower.block_path(1)):
        path.unlink()
    half.folder.block_path(0).unlink()
    again = learned(llava_folder, tmp_path / "half", resume=str(half.folder.path), **settings)
    for one, other in ((whole.folder, again.folder), (whole.folder.tower, again.folder.tower)):
        for index in range(2):
            assert one.block_path(index).read_bytes() == other.block_path(index).read_bytes()


def test_questions_are_answered_as_the_model_does(llava_folder, tmp_path, questions, monkeypatch):
    """Full precision through this package, against `generate` of transformers alone."""
    run = learned(
        llava_folder,
        tmp_path,
        calib_images=str(questions),
        calib_image_share=1.0,
        vqa=(str(questions),),
        compare=True,
        agreement=(str(questions),),
    )
    module = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(llava_folder)
    item = read_conversations(questions).items[0]
    inputs = asked(processor, item, "which one?")
    output = module.generate(**inputs, max_new_tokens=16, do_sample=False)
    words = processor.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    path = tmp_path / "own.jsonl"
    line = json.loads(questions.read_text().splitlines()[0])
    right = [[words], ["no"]]
    path.write_text("".join(json.dumps({**line, "answers": a}) + "\n" for a in right))
    found = lrquant.evaluate(str(llava_folder), vqa=(str(path),), precision="float32")
    if normalized(words):
        own = found["vqa"][str(path)]["full_precision"]
        kinds = [own[f"exact_match{kind}"] for kind in ("", "_other", "_yes_no")]
        assert kinds == [0.5, 1, 0]
    scores = run.results["vqa"][str(questions)]
    assert {"quantized", "full_precision", "round_to_nearest"} < scores.keys()
    assert scores["items"]["measured"] == scores["items"]["of"] and len(scores["sha256"]) == 64
    agreement = run.results["agreement"][str(questions)]
    assert agreement["quantized"]["kl_mean"] > 0 and "positions" not in agreement["quantized"]
    assert math.isfinite(run.results["perplexity"][str(questions)]["quantized"])


def test_a_saved_checkpoint_carries_the_processor_and_answers(
    llava_folder, tmp_path, questions, capsys
):
    place = tmp_path / "saved"
    learned(
        llava_folder,
        tmp_path,
        calib_images=str(questions),
        calib_image_share=1.0,
        vision_scheme="W8A8",
        save_dir=str(place),
        format="lrquant",
    )
    assert AutoProcessor.from_pretrained(place).chat_template
    kept = llava_folder / "processor_config.json"
    assert (place / kept.name).read_bytes() == kept.read_bytes()
    old = json.loads((place / "preprocessor_config.json").read_text())  # where version 4 looks
    assert old["image_processor_type"] == "CLIPImageProcessor" and old["crop_size"]["height"] == 16
    found = lrquant.evaluate(str(place), vqa=(str(questions),), ppl=(str(questions),))
    assert set(found["vqa"][str(questions)]["quantized"]) >= {"exact_match", "vqa_accuracy"}
    assert main(["inspect", str(place)]) == 0
    assert "verified: hashes" in capsys.readouterr().out


def test_the_model_card_is_of_a_multimodal_model(llava_folder, tmp_path, text):
    place = tmp_path / "saved"
    learned(llava_folder, tmp_path, calib_dataset=str(text), save_dir=str(place), format="lrquant")
    card = (place / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card


def test_classifiers_are_measured_by_their_classes(tmp_path, make_vision, pictures):
    folder = tmp_path / "model"
    make_vision("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    classes = tmp_path / "classes"
    for index, file in enumerate(sorted(pictures.glob("*.png"))):
        place = classes / str(index % 3)
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / file.name)
    run = lrquant.quantize(
        str(folder),
        "W8A8",
        calib_images=str(classes),
        classify=str(classes),
        output_dir=str(tmp_path / "run"),
        **SETTINGS,
    )
    found = run.results["classification"]
    assert found["full_precision"]["same_top"] == 1
    assert 0 <= found["quantized"]["accuracy"] <= 1 and found["quantized"]["same_top"] >= 0.5
    (classes / "9").mkdir()
    next(classes.rglob("*.png")).rename(classes / "9" / "x.png")
    with pytest.raises(LRQuantError, match=r"in no folder named as one of the model's 3 classes"):
        lrquant.evaluate(str(folder), classify=str(classes))


@pytest.mark.parametrize(
    "answer, right, exact, rule",
    [
        ("A circle.", ["circle"], 1, 1),
        ("square", ["circle"], 0, 0),
        ("yes", ["yes"] * 2 + ["no"] * 8, 1, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("no", ["yes"] * 2 + ["no"] * 8, 1, 1),
        ("maybe", ["yes"] * 2 + ["no"] * 8, 0, 0),
        ("It's the blue one", ["its blue one"], 1, 1),
        ("", ["A"], 0, 0),
        ("a.", ["A"], 1, 1),
        ("-5", ["5"], 0, 0),
    ],
)
def test_answers_are_scored_as_the_field_does(answer, right, exact, rule):
    assert exact_match(answer, right) == exact
    assert vqa_accuracy(answer, right) == pytest.approx(rule)


@pytest.mark.parametrize(
    ("right", "kind"),
    [
        (["Yes."], "yes_no"),
        (["no", "no", "2"], "yes_no"),
        (["3"], "number"),
        (["red", "dark red", "no"], "other"),
    ],
)
def test_answers_have_the_kinds_of_vqa(right, kind):
    assert answer_kind(right) == kind


@pytest.fixture
def chartqa(tmp_path, pictures):
    """The harness's chartqa with two items of our own, saved where --data_dir finds it."""
    files = sorted(pictures.glob("*.png"))[:2]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "query": datasets.Value("string"),
            "label": datasets.List(datasets.Value("string")),
        }
    )
    rows = [{"image": str(file), "query": "how many?", "label": ["3"]} for file in files]
    saved = tmp_path / "sets" / "HuggingFaceM4" / "ChartQA" / "none" / "test"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(saved))
    return tmp_path / "sets"


def test_tasks_of_the_harness_that_show_pictures(
    llava_folder, tmp_path, chartqa, questions, monkeypatch
):
    for file in ("config.json", "tokenizer_config.json"):  # the prompt has a thousand bytes
        path = llava_folder / file
        path.write_text(
            re.sub(
                r'("(max_position_embeddings|model_max_length)": )\d+',
                r"\g<1>4096",
                path.read_text(),
            )
        )
    seen = []
    generate = LlavaForConditionalGeneration.generate

    def short(self, *args, **settings):
        seen.append(settings["pixel_values"].shape)
        return generate(self, *args, **{**settings, "max_new_tokens": 3, "max_length": None})

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", short)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
    run = learned(
        llava_folder,
        tmp_path,
        calib_images=str(questions),
        calib_image_share=1.0,
        tasks="chartqa",
        data_dir=str(chartqa),
        compare=True,
    )
    scores = run.results["tasks"]["chartqa"]
    assert {"quantized", "full_precision", "round_to_nearest"} <= set(scores)
    assert len(seen) == 6 and {tuple(shape) for shape in seen} == {(1, 3, 16, 16)}


def test_sets_of_pictures_that_cannot_be_had_are_said(llava_folder, questions, tmp_path):
    with pytest.raises(LRQuantError, match="HuggingFaceM4/ChartQA"):
        learned(
            llava_folder,
            tmp_path,
            calib_images=str(questions),
            tasks="chartqa",
        )


def test_the_published_command_line_works_on_a_multimodal_model(llava_folder, tmp_path, text):
    """As it is published: on text alone, the language part alone."""
    given = ["--model", str(llava_folder), "--epochs", "1", "--output_dir", str(tmp_path / "log")]
    given += ["--wbits", "4", "--abits", "4", "--lwc", "--let", "--lr_plus"]
    given += ["--calib_dataset", str(text), "--nsamples", "2", "--seqlen", "24"]
    assert quantize_main(given) == 0
    folder = RunFolder.open(tmp_path / "log")
    assert folder.finished_blocks() == 2 and folder.tower.finished_blocks() == 0


@pytest.mark.parametrize("name", ["pope", "scienceqa", "textvqa"])
def test_sets_that_are_no_tasks_of_the_harness_are_said_with_the_way(name, llava_folder):
    with pytest.raises(LRQuantError, match=rf"no task {name}; .*--vqa"):
        lrquant.evaluate(str(llava_folder), tasks=name)


def test_answers_in_the_form_of_vqa(tmp_path, pictures):
    path = tmp_path / "answers.jsonl"
    lines = [{"answers": "red"}, {"answers": [{"answer": "yes"}, {"answer": "no"}]}, {"answer": 3}]
    made = [{"image": "pictures/0.png", "question": "is it\u2028?", **line} for line in lines]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in made))
    found = [item.answers for item in read_conversations(path).items]
    assert found == [("red",), ("yes", "no"), ("3",)]


def test_a_jsonl_of_text_is_text(model_folder, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text(json.dumps({"text": "Some words of no importance. " * 20}) + "\n")
    found = lrquant.evaluate(str(model_folder("llama")), ppl=(str(path),), seqlen=24)
    assert found["perplexity"][str(path)]["full_precision"] > 1


def test_pictures_that_are_fewer_than_their_share_are_made_up_with_text(
    llava_folder, tmp_path, questions, text
):
    settings = {"calib_images": str(questions), "calib_dataset": str(text), "nsamples": 14}
    run = learned(llava_folder, tmp_path, **settings)
    words = run.folder.identity["calibration"]
    assert "6 with pictures" in words and "8 x 24" in words


def test_a_run_is_not_gone_on_with_under_other_settings(llava_folder, tmp_path, questions):
    settings = {"calib_images": str(questions), "calib_image_share": 1.0}
    run = learned(llava_folder, tmp_path, vision_scheme="W8A8", **settings)
    again = {"resume": str(run.folder.path), **settings}
    with pytest.raises(LRQuantError, match="its tower"):
        learned(llava_folder, tmp_path, **again)
    with pytest.raises(LRQuantError, match="differs"):
        learned(llava_folder, tmp_path, vision_scheme="W8A8", image_token_weight=0.5, **again)


def test_a_tower_alone_is_learned(llava_folder, tmp_path, questions):
    given = {**SETTINGS, "calib_images": str(questions), "calib_image_share": 1.0}
    run = lrquant.quantize(
        str(llava_folder), "W16A16", vision_scheme="W4A8", output_dir=str(tmp_path / "run"), **given
    )
    assert {name.split(".")[0] for name in run.folder.tower.load_block(0)} == {"let", "lwc"}
    assert run.folder.load_block(0) == {}


def test_what_the_target_cannot_load_of_the_tower_is_refused(llava_folder, tmp_path, questions):
    for target in ("transformers", "vllm"):
        with pytest.raises(LRQuantError, match="vision-scheme"):
            lrquant.quantize(
                str(llava_folder),
                "W4A16-sym",
                vision_scheme="W8A8",
                target=target,
                calib_images=str(questions),
                output_dir=str(tmp_path / "run"),
                **SETTINGS,
            )


def test_generation_is_as_the_model_says(llava_folder, tmp_path, questions):
    path = llava_folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 77], "repetition_penalty": 1.5}))
    run = learned(llava_folder, tmp_path, calib_images=str(questions), calib_image_share=1.0)
    found = run.load_model().generation_config
    assert found.eos_token_id == [2, 77] and found.repetition_penalty == 1.5


def test_a_way_of_generating_that_needs_code_of_the_hub_is_refused(
    llava_folder, tmp_path, questions
):
    path = llava_folder / "generation_config.json"
    path.write_text(json.dumps({"penalty_alpha": 0.6, "top_k": 4}))
    settings = {"calib_images": str(questions), "calib_image_share": 1.0, "epochs": 0}
    with pytest.raises(LRQuantError, match=r"--vqa: the model's generation_config.json asks for"):
        learned(llava_folder, tmp_path, **settings, vqa=(str(questions),))


def test_conversations_are_not_adapted_to(llava_folder, tmp_path, questions):
    settings = {"calib_images": str(questions), "ppl": (str(questions),), "tta": True}
    with pytest.raises(LRQuantError, match="adapts to text alone"):
        learned(llava_folder, tmp_path, **settings)


def test_the_check_estimates_a_classifier(tmp_path, make_vision, pictures):
    folder = tmp_path / "model"
    make_vision("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    given = {"model": str(folder), "scheme": "W4A8", "output_dir": str(tmp_path / "run")}
    given |= SETTINGS | {"nsamples": 2}
    done = preflight({**given, "calib_images": str(pictures)})
    assert not done.failed and done.seconds.learning > 0 == done.seconds.measuring
    model = load_model(str(folder))
    tokens = (16 // model.config.patch_size) ** 2 + 1
    assert done.stream_bytes == 2 * 2 * tokens * model.hidden_size * 4


def test_the_check_sees_the_tower(llava_folder, questions, tmp_path, text, monkeypatch):
    names = ("read", "observed", "full", "start", "weights", "held", "step", "freeze")
    costs = BlockCosts(**dict.fromkeys(names, 1.0), peak_memory=1, streams=1, rows=10)
    monkeypatch.setattr(kinds, "probe_block", lambda load, index: costs)
    given = {"model": str(llava_folder), "scheme": "W4A4", "calib_dataset": str(text)}
    given |= {**SETTINGS, "output_dir": str(tmp_path / "run")}
    without = preflight({**given, "vision_scheme": "W8A8"})
    assert any("no calibration sample has a picture" in f.text for f in without.failed)
    odd = {"vision_scheme": "W4A8g7", "calib_images": str(questions), "calib_image_share": 1.0}
    assert any("group size 7 does not divide" in f.text for f in preflight(given | odd).failed)
    fine = {**odd, "vision_scheme": "W4A8"}
    done, alone = preflight(given | fine), preflight(given | fine | {"vision_scheme": None})
    assert not done.failed and not alone.failed
    assert done.memory.tower > 0 == alone.memory.tower
    assert done.run_bytes > alone.run_bytes and done.checkpoint == alone.checkpoint is None
    assert done.seconds.learning > alone.seconds.learning
    model = load_model(str(llava_folder))
    drawn = picture_samples(questions, model, done.config.nsamples, done.config.seed).feed.inputs
    tokens = sum(sample["input_ids"].shape[1] for sample in drawn)
    assert alone.stream_bytes == 2 * tokens * model.hidden_size * 4, "real lengths, not --seqlen"


@pytest.mark.parametrize("template", [True, False])
def test_conversations_with_pictures_begin_with_one_bos(llava_folder, questions, template):
    """A template that writes BOS and a tokenizer that adds it do not make two of it."""
    model = load_model(str(llava_folder))
    tokenizer = beginning_by_itself(model.processor.tokenizer, Beginning((1,)))
    model.processor.tokenizer = tokenizer
    model.processor.chat_template = (
        "{{ bos_token }}" + model.processor.chat_template if template else None
    )
    for sample in picture_samples(questions, model).feed.inputs:
        ids = sample["input_ids"][0]
        assert ids[0] == 1 and int((ids == 1).sum()) == 1
