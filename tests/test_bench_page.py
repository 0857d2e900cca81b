"""What the benchmarks make of their samples, without measuring anything."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench

    return bench


def test_ratios_are_taken_within_a_round(bench: ModuleType) -> None:
    samples = {"new": [2.0, 30.0, 4.0], "old": [1.0, 10.0, 4.0]}
    row = bench.ratio_row("new", "old", samples, target="<= 1.5")
    assert (row.ratio, row.low, row.high, row.value, row.met) == (2.0, 1.0, 3.0, 4.0, False)
    faster = bench.ratio_row("old", "new", samples, invert=True, target=">= 2")
    assert (faster.ratio, faster.met) == (2.0, True)
    assert bench.ratio_row("new", "old", samples).met is None


def test_every_variant_runs_once_a_round(bench: ModuleType) -> None:
    from ratios import in_turn

    order: list[str] = []
    found = in_turn({name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}, 2)  # type: ignore[misc,func-returns-value]
    assert order == ["a", "b", "b", "a"] and found == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


def test_a_boundary_is_without_steps_and_evaluation(bench: ModuleType) -> None:
    from boundaries import between_stages

    stage = ["setup fit", "first batch", "batch", "batch", "train end", "teardown fit", "setup test", "teardown test"]
    at = [0.0, 1.0, 5.0, 9.0, 9.5, 9.75, 10.0, 30.0]
    events = [(name, begin + second) for begin in (0.0, 40.0, 80.0) for name, second in zip(stage, at, strict=True)]
    # from the second batch at 9 to the next stage's first at 41, but for 20 of evaluation
    assert between_stages(events) == [12.0, 12.0] and between_stages(events[:8]) == []


def test_the_table_goes_between_the_markers(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    rows = [bench.Row("a step", "a loop", 1.02, 1.0, 1.1, target="<= 1.05"), bench.Row("b", "c", 2.0, 2.0, 2.0)]
    rows.append(bench.Row("slow", "c", 1.2, 1.1, 1.3, target="<= 1.15"))
    (tmp_path / "growth.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    found = {"growth": bench.rows_of(tmp_path / "growth.json")}
    took = {"growth": {"wall": 240.0, "cpu": 90.0}, "dmole": {"wall": 60.0, "cpu": 30.0}}
    for _ in range(2):  # again gives the same page
        bench.write_page(page, found, took, argparse.Namespace(wall_clock=False, out=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == {**took, "together": {"wall": 300.0, "cpu": 120.0}}
    assert [row["what"] for row in summary["rows"]["growth"]] == ["a step", "b", "slow"]
    text = page.read_text()
    assert "Measured in 5 minutes, 2 of CPU time." in text
    assert text.startswith("before\n<!-- bench: begin -->\n") and text.endswith("<!-- bench: end -->\nafter\n")
    assert "| a step | a loop | 1.02 (1.00 to 1.10) | <= 1.05: met |" in text and "CPU time" in text
    assert "| slow | c | 1.20 (1.10 to 1.30) | <= 1.15: **missed** |" in text and "old" not in text


def test_the_shipped_page_has_the_markers(bench: ModuleType) -> None:
    text = bench.PAGE.read_text()
    assert text.count(bench.BEGIN) == text.count(bench.END) == 1
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in bench.BENCHMARKS)


def test_the_operations_of_a_step_are_those_that_are_computed(bench: ModuleType) -> None:
    """Within what the attention of so short rows, norms and the loss make of it."""
    import torch
    from llava7b import operations
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).requires_grad_(False)
    ids = torch.randint(4, 64, (2, 24))
    ids[:, :4] = 3
    pixels = torch.randn(2, 3, 28, 28)
    span = {"tokens": ids.numel(), "answers": ids.numel(), "steps": 1, "trained": 0}
    for tower in (False, True):
        first = model.model.vision_tower.embeddings if tower else model.model.language_model.embed_tokens
        first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())  # as an adapter there would
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, pixel_values=pixels).logits.sum().backward()
        counted = counter.get_total_flops()
        assert operations(config, span, 2, tower=tower) == pytest.approx(counted, rel=0.1)


def test_answers_of_the_random_model_are_as_long_as_asked_for_and_have_a_text(
    bench: ModuleType, tmp_path: Path
) -> None:
    import evaluation
    import workload
    from sizes import QUICKSTART
    from transformers import AutoTokenizer

    workload.build(tmp_path, layers=4, train=8, test=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == QUICKSTART.text["vocab_size"]
    sentence = "Answer the question using a single word or phrase."
    assert tokenizer.decode(tokenizer(sentence).input_ids) == sentence
    assert len({tokenizer.decode([number]) for number in range(1000, 2000)}) == 1000
    sequence = evaluation.Sequence(tmp_path, "{name: sequential, rank: 4, alpha: 8}", lambda: 0.0)
    sequence.framework()
    assert sequence.answers
    for (_, task, _), text in sequence.answers.items():
        assert len(text.split()) == evaluation.LENGTHS[task]
