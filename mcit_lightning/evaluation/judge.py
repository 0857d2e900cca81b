"""Scores that need a judge: a language model or an evaluation server. We write the file that it takes; nothing is sent.

* CoIN's reasoning score (Chen et al., NeurIPS 2024, its "reasoning knowledge"): prompts for a language model, which gives 0
  to 10 points. Its replies are scored by the metric `judge_score`.
* MathVista (MLLM-CL's Math): the table from which eval_math.py lets GPT-4 extract the answers.
* MMT-Bench (MLLM-CL's APP): the table for its EvalAI server, whose answers are not public.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcit_lightning.data.coco import read_json
from mcit_lightning.data.readers import check_file, file_format, read_file
from mcit_lightning.data.records import Place
from mcit_lightning.evaluation.answers import Answer, read_answers
from mcit_lightning.evaluation.files import write_atomic


def write_for_judge(
    kind: str, predictions: Path, questions: Path | None, template: Path | None, out: Path | None
) -> str:
    """Write the file that a judge takes.

    Args:
        kind: `reasoning`, `math` or `gui`.
        predictions: LLaVA's answers.
        questions: the test file; for `reasoning`.
        template: CoIN's rule.json for `reasoning`, the benchmark's table as TSV for the others.
        out: where to write.

    Returns:
        What was written and what to do with it.

    Raises:
        ValueError: a file is missing or malformed, or an id does not belong to the benchmark.
        OSError: `out` cannot be written.
    """
    if template is None or out is None:
        raise ValueError(f"--write {kind} needs --template and --out")
    answers = read_answers(predictions)
    if kind == "reasoning":
        if questions is None:
            raise ValueError("--write reasoning needs --questions, the test file")
        prompts = reasoning_prompts(answers, _questions(questions), read_json(template, "template"), str(template))
        write_atomic(out, json.dumps(prompts, indent=4))
        return (
            f"wrote {len(prompts)} prompts to {out}. Let a language model answer them, one line of "
            '{"question_id", "text"} each, and score its replies with --metric judge_score.'
        )
    if kind == "math":
        filled, count = fill_table(template, answers, "testmini_", {"prediction": str}, {})
        write_atomic(out, filled)
        return f"wrote {count} predictions to {out}. eval_math.py of MLLM-CL takes it as --result-file and asks GPT-4."
    if kind == "gui":
        filled, count = fill_table(
            template, answers, "ALL_", {"opt": lambda text: text.strip().upper()}, {"prediction": "0", "opt": "Z"}
        )
        write_atomic(out, filled)
        return f"wrote {count} predictions to {out}. Send it to MMT-Bench's EvalAI server, which alone has the answers."
    raise ValueError(f"there is no judge {kind!r}: it is reasoning, math or gui")


def reasoning_prompts(
    answers: list[Answer], questions: dict[str, dict[str, Any]], rules: Any, source: str
) -> list[list[dict[str, str]]]:
    """One conversation per prediction: what the judge is, then question, right answer, prediction and rule.

    The question is shown without its last line, the answer format, except for grounding, as in CoIN's create_prompt.py.

    Args:
        answers: the predictions.
        questions: id to row of the test file.
        rules: CoIN's rule.json: `CoIN` and, for rows with `answer_bbox`, `CoIN_Grounding`, each with `role` and `prompt`.
        source: the file of rules, for messages.

    Raises:
        ValueError: a prediction's question is not there, or a rule is missing.
    """
    prompts = []
    for answer in answers:
        row = questions.get(str(answer.id))
        if row is None:
            raise ValueError(f"the prediction of {answer.id!r} has no question in the file of questions")
        grounding = row.get("answer") is None and "answer_bbox" in row
        name = "CoIN_Grounding" if grounding else "CoIN"
        rule = rules.get(name) if isinstance(rules, dict) else None
        if not isinstance(rule, dict) or not {"role", "prompt"} <= rule.keys():
            raise ValueError(f"{source}: has no rule {name!r} with `role` and `prompt`. Give CoIN's rule.json.")
        text = str(row.get("text", ""))
        shown = text if grounding else "\n".join(text.split("\n")[:-1])
        right = row["answer_bbox"] if grounding else row.get("answer")
        content = (
            f"[Context]\n[Question]\n{shown}\n\n"
            f"[Ground truth answer]\n{right}\n\n[End of ground truth answer]\n\n"
            f"[{rule['role']}]\n{answer.text}\n\n[End of {rule['role']}]\n\n"
            f"[System]\n{rule['prompt']}\n\n"
        )
        system = "You are a helpful and precise assistant for checking the quality of the answer."
        prompts.append([{"role": "system", "content": system}, {"role": "user", "content": content}])
    return prompts


def fill_table(
    template: Path,
    answers: list[Answer],
    prefix: str,
    columns: dict[str, Callable[[str], str]],
    otherwise: dict[str, str],
) -> tuple[str, int]:
    """A benchmark's table of tab-separated values with the predictions in it.

    Args:
        template: the table; row n (from 0, the header not counted) belongs to the question with the id `prefix` + n.
        answers: the predictions.
        prefix: of the ids.
        columns: column to fill, and what becomes of a prediction in it.
        otherwise: column and content for rows without a prediction.

    Returns:
        The table, and how many predictions are in it.

    Raises:
        ValueError: the template is no such table, or an id does not belong to it.
    """
    check_file(template, "template")
    if template.suffix.lower() in (".xlsx", ".xls"):
        raise ValueError(
            f"template: {template} is a spreadsheet. Save it as tab-separated values (.tsv) and name that."
        )
    try:
        with template.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            names, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"template: {template} is no table of tab-separated values in UTF-8: {error}. Save it as one."
        ) from error
    for name in {**columns, **otherwise}:
        if name not in names:
            if name not in columns:
                raise ValueError(f"template: {template} has no column {name!r}. It has: {', '.join(names)}.")
            names.append(name)
    texts: dict[int, str] = {}
    for answer in answers:
        position = str(answer.id).removeprefix(prefix)
        if not position.isdecimal() or int(position) >= len(rows):
            raise ValueError(
                f"the prediction of {answer.id!r} belongs to no row of {template}, whose {len(rows)} rows have ids from "
                f"{prefix}0 on. Give the table and the predictions of one benchmark."
            )
        texts[int(position)] = answer.text
    out = io.StringIO()
    writer = csv.DictWriter(out, names, delimiter="\t", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for number, row in enumerate(rows):
        filled = {name: form(texts[number]) for name, form in columns.items()} if number in texts else otherwise
        writer.writerow({**row, **filled})
    return out.getvalue(), len(texts)


def _questions(path: Path) -> dict[str, dict[str, Any]]:
    check_file(path, "questions")
    rows: dict[str, dict[str, Any]] = {}

    def visit(index: int, row: Any) -> None:
        if not isinstance(row, dict) or row.get("question_id") is None:
            place = Place(str(path), "questions", index)
            raise place.error("`question_id`", "is missing", "Give the benchmark's test file.")
        rows[str(row["question_id"])] = row

    kind = file_format(path.name, "auto", "questions")
    if kind == "hf":
        raise ValueError(f"questions: {path} is no JSON. Give the questions as JSON or JSON lines.")
    read_file(path, kind, "questions", visit)
    return rows
