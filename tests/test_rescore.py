"""Old predictions of any of the published tools, scored again."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from mcit_lightning.evaluation.answers import read_answers
from mcit_lightning.evaluation.metrics import METRICS
from mcit_lightning.evaluation.predictions import merge_parts, write_part
from mcit_lightning.evaluation.rescore import Rescored, add_arguments, command, rescore
from mcit_lightning.evaluation.task_lookup import find_task_config
from mcit_lightning.loading import experiments_dir

FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"
COIN, UCIT, MLLM, DMOLE = (FIXTURES / name for name in ("coin", "ucit/instructions", "mllm_cl", "dmole/data"))
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap (pip install '.[captions]')"
)


def write(path: Path, rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return path


def llava(identity: Any, text: str, **more: Any) -> dict[str, Any]:
    return {
        "question_id": identity,
        "prompt": "?",
        "text": text,
        "answer_id": "x",
        "model_id": "m",
        "metadata": {},
        **more,
    }


def values(found: Rescored) -> list[float]:
    return [row.score for row in found.rows]


def test_our_predictions_hold_their_answers(tmp_path: Path) -> None:
    rows = [llava("a", "Cat.", answer="cat", index=1, score=1.0), llava("b", "dog", answer=["a dog", "x"], index=0)]
    path = write(tmp_path / "p.jsonl", rows)
    found = rescore(path, "exact_match")
    assert (found.score, values(found), found.missing) == (50.0, [1.0, 0.0], 0)
    assert next((row.id, row.text, row.reference) for row in found.rows) == ("a", "Cat.", "cat")
    assert rescore(path, "contains").score == 50.0
    with pytest.raises(ValueError, match=r"p\.jsonl, prediction of b: cannot be scored by exact_match: .* one text"):
        rescore(path, "exact_match", mode="published")
    choices = write(tmp_path / "q.jsonl", [llava("a", "two", answer=1, extra={"choices": ["one", "two"]})])
    assert rescore(choices, "option_letter").score == 100.0


def test_what_a_run_writes_is_what_published_scripts_read_and_is_scored_again(tmp_path: Path) -> None:
    path = tmp_path / "predictions/stage_01/t.jsonl"
    rows = [llava(7, "é猫\n", answer="é猫", index=1), llava("b", "dog", answer={"x": 1}, index=0)]
    for rank, row in enumerate(rows):
        write_part(path, rank, [row])
    merge_parts(path, 2, expected=2)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["question_id"] for line in lines] == ["b", 7]
    assert all({"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= line.keys() for line in lines)
    answers = read_answers(path)
    assert [(answer.id, answer.text, answer.reference, answer.row) for answer in answers] == [
        ("b", "dog", {"x": 1}, 0),
        ("7", "é猫\n", "é猫", 1),
    ]


def test_llava_answers_are_joined_with_the_question_file(tmp_path: Path) -> None:
    rows = [llava("o2", "so x^2"), llava("o1", "THE\ncentre")]
    found = rescore(write(tmp_path / "p.jsonl", rows), "ocrbench", references=MLLM / "OCR_test/test.json")
    assert (found.score, values(found)) == (100.0, [1.0, 1.0])
    assert found.groups == {
        "Handwritten Mathematical Expression Recognition": (100.0, 1),
        "Text Recognition": (100.0, 1),
    }
    grounding = write(tmp_path / "g.jsonl", [llava("2", "[0.1,0.2,0.5,0.9]")])
    test = COIN / "Instructions_Original/Grounding/test.json"
    assert rescore(grounding, "coin_grounding", references=test).score == 100.0
    assert rescore(grounding, "coin_grounding", references=test, mode="published").score == 0.0


@pytest.mark.parametrize("mode", ["fixed", "published"])
def test_answers_in_a_file_of_their_own(tmp_path: Path, mode: Any) -> None:
    text = write(tmp_path / "t.jsonl", [llava(34603, "2"), llava("34602", "dakota")])
    found = rescore(text, "vqa_soft", references=COIN / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json", mode=mode)
    assert found.score == 100.0
    gqa = write(tmp_path / "testdev_balanced_predictions.json", [{"questionId": "201307251", "prediction": "no"}])
    assert rescore(gqa, "gqa", references=COIN / "cl_dataset/GQA/testdev_balanced_questions.json").score == 100.0
    vizwiz = write(tmp_path / "vizwiz_val_1.json", [{"question": "What?", "question_id": 3, "answer": "black pepper"}])
    assert (
        rescore(vizwiz, "vqa_soft", references=DMOLE / "vizwiz/vizwiz_val_annotations.json", mode=mode).score == 100.0
    )


def test_internvl_results(tmp_path: Path) -> None:
    ocrvqa = [{"question": "?", "questionId": 12, "answer": "Dune.", "annotation": ["dune", "x"]}]
    assert rescore(write(tmp_path / "ocrvqa_val.json", ocrvqa), "exact_any").score == 100.0
    assert rescore(write(tmp_path / "ocrvqa_val.json", ocrvqa), "exact_any", mode="published").score == 0.0
    grounding = [
        {"answer": "<box>[[100, 200, 500, 900]]</box>", "gt_bbox": [64, 96, 320, 432], "hw": [480, 640]},
        {"answer": "none", "gt_bbox": [64, 96, 320, 432], "hw": [480, 640]},
    ]
    for mode in ("fixed", "published"):
        found = rescore(write(tmp_path / "skvg_test.json", grounding), "iou", mode=mode)  # type: ignore[arg-type]
        assert (found.score, [row.id for row in found.rows]) == (50.0, ["line 1", "line 2"])
    choice = [{"question": "?", "answer": "B", "gt_answers": "B", "image_path": "a"}]
    assert rescore(write(tmp_path / "iconqa_test.jsonl", choice), "option_letter").score == 100.0
    submission = write(tmp_path / "vizwiz_test.json", [{"image": "a.jpg", "answer": "x"}])
    assert read_answers(submission)[0].id == "a.jpg"


def test_the_published_multiple_choice_depends_on_the_batches(tmp_path: Path) -> None:
    questions = [
        {"question_id": 1, "image": "a", "question": "?", "choices": ["three", "nine"], "answer": 1},
        {"question_id": 2, "image": "b", "question": "?", "choices": ["cat", "dog"], "answer": 0},
    ]
    references = write(tmp_path / "multi_text_choice_test.jsonl", questions)
    path = write(tmp_path / "p.jsonl", [llava(1, "it is nine"), llava(2, "a cat")])
    for size, expected in ((1, [1.0, 1.0]), (8, [1.0, 0.0])):
        found = rescore(path, "option_letter", references=references, mode="published", batch_size=size)
        assert values(found) == expected


def test_missing_and_repeated_predictions(tmp_path: Path) -> None:
    problems = COIN / "cl_dataset/ScienceQA/problems.json"
    one = write(tmp_path / "p.jsonl", [llava("4", "A")])
    for mode in ("fixed", "published"):
        found = rescore(one, "scienceqa", references=problems, mode=mode)  # type: ignore[arg-type]
        assert (found.score, found.missing, found.missing_counted) == (pytest.approx(100 / 3), 2, True)
    questions = write(tmp_path / "q.json", [{"question_id": n, "text": "?", "answer": "a"} for n in (1, 2)])
    half = write(tmp_path / "h.jsonl", [llava(1, "a")])
    assert rescore(half, "exact_match", references=questions).score == 50.0
    found = rescore(half, "exact_match", references=questions, mode="published")
    assert (found.score, found.missing, found.missing_counted) == (100.0, 1, False)
    twice = write(tmp_path / "t.jsonl", [llava(1, "a"), llava(1, "b")])
    with pytest.raises(ValueError, match=r"t\.jsonl: '1' is predicted twice"):
        rescore(twice, "exact_match", references=questions)
    assert rescore(twice, "exact_match", references=questions, mode="published").score == 50.0
    with pytest.raises(ValueError, match=r"h\.jsonl, prediction of 9: .*q\.json has no answer to '9'"):
        rescore(write(tmp_path / "h.jsonl", [llava(9, "a")]), "exact_match", references=questions)
    with pytest.raises(ValueError, match=r"h\.jsonl, prediction of 9: has no answer\. Give the file of references"):
        rescore(tmp_path / "h.jsonl", "exact_match")


def test_class_names_go_by_line_as_published(tmp_path: Path) -> None:
    questions = write(
        tmp_path / "q.json", [{"question_id": n, "text": "?", "answer": a} for n, a in enumerate(("cat", "dog"))]
    )
    path = write(tmp_path / "p.jsonl", [llava(1, "dog"), llava(0, "cat")])
    assert rescore(path, "class_name", references=questions).score == 100.0
    assert rescore(path, "class_name", references=questions, mode="published").score == 0.0
    many = write(tmp_path / "m.jsonl", [llava(n, "cat") for n in range(3)])
    with pytest.raises(ValueError, match=r"3 predictions for the 2 answers"):
        rescore(many, "class_name", references=questions, mode="published")


@needs_package
def test_captions_by_row_by_line_and_by_image(tmp_path: Path) -> None:
    references = UCIT / "Flickr30k/val_coco_type_3000.json"
    questions = UCIT / "Flickr30k/test_3000.json"
    words = {"tokenizer": "words"}
    swapped = write(
        tmp_path / "p.jsonl", [llava("q11", "two dogs play in the snow"), llava("q10", "a man rides a horse")]
    )
    found = rescore(swapped, "rouge_l", references=references, questions=questions, metric_args=words)
    assert values(found) == [1.0, 1.0] and found.details == {"ROUGE_L": 100.0}
    assert (
        rescore(swapped, "rouge_l", references=references, metric_args=words).score < 30
    )  # by line, without the questions
    coco = write(tmp_path / "c.json", [{"image_id": 2, "caption": "two dogs play in the snow"}])
    found = rescore(coco, "rouge_l", references=references, metric_args=words)
    assert (found.score, found.missing, len(found.rows)) == (50.0, 1, 2)
    with pytest.raises(ValueError, match="1 predictions for the 2 answers"):
        rescore(write(tmp_path / "one.jsonl", [llava("q11", "x")]), "rouge_l", references=references, metric_args=words)
    with pytest.raises(ValueError, match="the file of questions has no such id"):
        rescore(
            tmp_path / "one.jsonl", "rouge_l", references=references, questions=swapped_ids(tmp_path), metric_args=words
        )


def swapped_ids(folder: Path) -> Path:
    return write(folder / "other.json", [{"question_id": "z", "text": "?", "answer": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", "", "holds no predictions"),
        ("p.jsonl", '{"text": "x"}', r"row 1 \(predictions\): the row is .* sets of keys: .*question_id, text"),
        ("p.json", '[{"question_id": [], "text": "x"}]', r"row 1 .*`question_id` is \[\]"),
        ("p.json", '[{"question_id": 1, "text": null}]', "`text` is None, not a text"),
        ("p.json", '[{"answer": "x", "gt_bbox": [1, 2, 3, 4], "hw": 3}]', "`hw` is 3"),
        ("p.json", "[3]", "the row is 3"),
        ("p.jsonl", '{"a": ', "line 1, column"),
        ("other", None, "does not exist"),
    ],
)
def test_files_that_hold_no_predictions(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        rescore(tmp_path / name, "exact_match")


# The command


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command(parser.parse_args([str(argument) for argument in arguments]))


def test_command_scores_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", [llava("o1", "centre"), llava("o2", "y")])
    rows = tmp_path / "rows.jsonl"
    task = "mllm_cl_ability/ocr"
    assert run(path, "--task", task, "--references", MLLM / "OCR_test/test.json", "--rows", rows) == 0
    said = capsys.readouterr().out
    assert "ocrbench (fixed): 50.00 over 2 rows" in said and "Text Recognition: 100.00 over 1 rows" in said
    assert [json.loads(line)["score"] for line in rows.read_text().splitlines()] == [1.0, 0.0]
    assert run(path, "--task", task, "--references", MLLM / "OCR_test/test.json", "--mode", "published") == 0
    assert "ocrbench (published): 0.10 over 2 rows" in capsys.readouterr().out
    assert (
        run(
            write(tmp_path / "one.jsonl", [llava("o1", "centre")]),
            "--task",
            task,
            "--references",
            MLLM / "OCR_test/test.json",
        )
        == 0
    )
    assert "1 questions have no prediction and count as wrong" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--arg: is 'words', must be key=value"):
        run(path, "--metric", "cider", "--arg", "words")
    with pytest.raises(ValueError, match=r"'ocrbench' does not take {'side': 3}"):
        run(path, "--metric", "ocrbench", "--arg", "side=3")


def test_tasks_are_found_in_any_spelling(tmp_path: Path) -> None:
    assert find_task_config("coin/Grounding").metric == "coin_grounding"
    assert find_task_config("ucit/CLEVR-Math").metric == "exact_match"
    (tmp_path / "base.yaml").write_text("tasks: {flags: {metric: contains}}")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntasks: {flags: {metric_mode: published, train: '${data.x}'}}")
    task = find_task_config(f"{tmp_path}/mine.yaml/flags")
    assert (task.metric, task.metric_mode) == ("contains", "published")
    for name, said in (
        ("flags", "write BENCHMARK/TASK"),
        ("coinn/gqa", "Did you mean 'coin'"),
        ("coin/gqaa", "Did you mean 'gqa'"),
        (f"{tmp_path}/bad.yaml/x", "tasks.x"),
    ):
        (tmp_path / "bad.yaml").write_text("tasks: {x: {metric_mode: sometimes}}")
        with pytest.raises(ValueError, match=said):
            find_task_config(name)


def test_every_benchmark_names_metrics_that_exist() -> None:
    checked = set()
    for path in sorted((experiments_dir() / "_base").glob("*.yaml")):
        for name, task in (yaml.safe_load(path.read_text(encoding="utf-8")).get("tasks") or {}).items():
            if "metric" in task:
                checked.add(find_task_config(f"{path.stem}/{name}").metric)
    assert {"exact_match", "caption_mean", "vqa_soft"} <= checked <= set(METRICS)


def test_help_needs_no_torch() -> None:
    code = "import sys, argparse; from mcit_lightning.evaluation import rescore; rescore.add_arguments(argparse.ArgumentParser())"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Judges


RULES = {
    "CoIN": {"role": "Assistant", "prompt": "Rate it."},
    "CoIN_Grounding": {"role": "Assistant", "prompt": "Rate the box."},
}


def test_reasoning_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules, out = write(tmp_path / "rule.json", RULES), tmp_path / "prompt_to_eval.json"
    questions = write(
        tmp_path / "q.json",
        [
            {"question_id": 1, "text": "What?\nAnswer with one word.", "answer": "cat"},
            {"question_id": 2, "text": "Where?", "answer_bbox": "[0,0,1,1]"},
        ],
    )
    path = write(tmp_path / "p.jsonl", [llava(1, "a cat"), llava(2, "[0,0,1,1]")])
    assert run(path, "--write", "reasoning", "--questions", questions, "--template", rules, "--out", out) == 0
    assert "wrote 2 prompts" in capsys.readouterr().out
    first, second = json.loads(out.read_text())
    assert [message["role"] for message in first] == ["system", "user"]
    assert "[Question]\nWhat?\n\n[Ground truth answer]\ncat\n" in first[1]["content"]
    assert "[Assistant]\na cat\n" in first[1]["content"] and "Rate it." in first[1]["content"]
    assert "Where?" in second[1]["content"] and "Rate the box." in second[1]["content"]
    replies = write(tmp_path / "r.jsonl", [{"question_id": 0, "text": "8"}, {"question_id": 1, "text": "Score: 10"}])
    assert rescore(replies, "judge_score").score == 90.0
    assert rescore(replies, "judge_score", mode="published").score == 45.0
    with pytest.raises(ValueError, match="needs --questions"):
        run(path, "--write", "reasoning", "--template", rules, "--out", out)
    with pytest.raises(ValueError, match="needs --template and --out"):
        run(path, "--write", "math")
    with pytest.raises(ValueError, match=r"rule\.json: has no rule 'CoIN_Grounding'"):
        write(rules, {"CoIN": RULES["CoIN"]})
        run(path, "--write", "reasoning", "--questions", questions, "--template", rules, "--out", out)


def test_tables_for_mathvista_and_mmt_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "math.tsv"
    table.write_text('index\tquestion\tanswer\n0\t"What\nis it?"\t3\n1\tHow many?\t4\n')
    path = write(tmp_path / "p.jsonl", [llava("testmini_1", 'four\n"4"')])
    assert run(path, "--write", "math", "--template", table, "--out", tmp_path / "out.tsv") == 0
    assert "asks GPT-4" in capsys.readouterr().out
    filled = pandas.read_csv(tmp_path / "out.tsv", sep="\t", keep_default_na=False)
    assert filled["prediction"].tolist() == ["", 'four\n"4"']
    assert filled["question"].tolist() == ["What\nis it?", "How many?"]
    gui = tmp_path / "gui.tsv"
    gui.write_text("index\tprediction\topt\n0\tp\tA\n1\tq\tB\n")
    path = write(tmp_path / "g.jsonl", [llava("ALL_0", " c\n")])
    assert run(path, "--write", "gui", "--template", gui, "--out", tmp_path / "out.tsv") == 0
    filled = pandas.read_csv(tmp_path / "out.tsv", sep="\t", dtype=str)
    assert filled.values.tolist() == [["0", "p", "C"], ["1", "0", "Z"]]
    for template, name, said in (
        (gui, "ALL_2", "belongs to no row of .*ids from ALL_0 on"),
        (table, "ALL_0", "has no column 'prediction'"),
        (tmp_path / "t.xlsx", "ALL_0", "is a spreadsheet. Save it as"),
    ):
        (tmp_path / "t.xlsx").touch()
        with pytest.raises(ValueError, match=said):
            run(
                write(path, [llava(name, "a")]), "--write", "gui", "--template", template, "--out", tmp_path / "out.tsv"
            )
