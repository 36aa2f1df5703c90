"""lm-eval on local files: every format with a known answer, offline, the model left as it was."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import VOCAB_SIZE, bigram_model, byte_tokenizer, tiny_llama, uniform_model

from arc_ao.integrations import lm_eval as integration
from arc_ao.integrations.lm_eval import evaluate, format_results, local_tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scores(model, path: Path, **options) -> dict[str, float]:
    return evaluate(model, byte_tokenizer(), [path], progress=False, **options)["tasks"][path.stem]


def converted(path: Path) -> list[dict]:
    """The rows as lm-eval sees them."""
    (task,) = local_tasks([path])
    return list(task["custom_dataset"]()["test"])


def choice_row(gold: int, **other) -> dict:
    return {"query": "Which letter?", "choices": ["xx", "bb"], "gold": gold, **other}


def test_multiple_choice_has_the_known_answer(tmp_path):
    """A model that prefers "b" is right where the gold choice is "bb": in 2 of 3 rows."""
    path = write(tmp_path / "letters.jsonl", choice_row(1), choice_row(0), choice_row(1))
    result = scores(bigram_model("_b bb"), path)
    assert result == {"acc": pytest.approx(2 / 3), "acc_norm": pytest.approx(2 / 3)}


def test_normalized_accuracy_divides_by_the_length(tmp_path):
    """ "bbbb" is less likely than "x" as a whole and more likely per character."""
    row = {"query": "?", "choices": ["x", "bbbb"], "gold": 1}
    assert scores(bigram_model("_b bb", logit=3.0), write(tmp_path / "a.jsonl", row)) == {
        "acc": 0.0,
        "acc_norm": 1.0,
    }


def test_questions_with_an_answer_index(tmp_path):
    rows = [{"question": "Which?", "choices": ["x", "b"], "answer": index} for index in (1, 0)]
    path = write(tmp_path / "a.jsonl", *rows)
    assert converted(path)[0]["prompt"] == "Question: Which?\nAnswer:"
    assert scores(bigram_model("_b"), path)["acc"] == 0.5


@pytest.mark.parametrize(
    "query, prompt",
    [
        ("Predators eat", "Predators eat"),
        ("Question: what?\n", "Question: what?\nAnswer:"),
        ("Passage: p.\nQuestion: what?", "Passage: p.\nQuestion: what?\nAnswer:"),
    ],
)
def test_queries_that_are_questions_ask_for_an_answer(tmp_path, query, prompt):
    assert converted(write(tmp_path / "a.jsonl", choice_row(0, query=query)))[0]["prompt"] == prompt


def test_schema_asks_which_context_makes_the_continuation_likelier(tmp_path):
    """The continuation starts with a space, which the model expects after "y" and not after "x"."""
    rows = [
        {"context_options": ["it is x", "it is y"], "continuation": "now.", "gold": gold}
        for gold in (1, 1, 1, 0)
    ]
    assert scores(bigram_model("y_"), write(tmp_path / "a.jsonl", *rows)) == {"acc": 0.75}


def test_continuation_is_matched_greedily_after_one_space(tmp_path):
    """ "a" -> " b" is the model's most likely text; its probability is known."""
    rows = [{"context": "say a ", "continuation": letter} for letter in ("b", "c")]
    result = scores(bigram_model("a_ _b"), write(tmp_path / "a.jsonl", *rows))
    total = math.exp(5.0) + VOCAB_SIZE - 1
    nll = [2 * math.log(total) - 10.0, 2 * math.log(total) - 5.0]
    assert result["acc"] == 0.5
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-4)


def test_text_perplexity_of_a_uniform_model(tmp_path):
    """Every byte costs log2(vocabulary) bits, also across lm-eval's windows of 64 tokens."""
    path = write(tmp_path / "a.jsonl", {"text": "four words in all. " * 10})  # 190 bytes
    result = scores(uniform_model(), path, num_fewshot=1)  # few-shot does not apply
    bits = math.log2(VOCAB_SIZE)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(VOCAB_SIZE, rel=1e-4)
    # lm-eval counts the empty string after the last space as a word.
    assert result["word_perplexity"] == pytest.approx(2 ** (bits * 190 / 41), rel=1e-3)


def test_same_model_as_reference_has_identical_scores(tmp_path):
    paths = [
        write(tmp_path / "choice.jsonl", *[choice_row(i % 2, query=f"Row {i}") for i in range(6)]),
        write(tmp_path / "text.jsonl", {"text": "some text"}, {"text": "more of it"}),
    ]
    model = tiny_llama()
    result = evaluate(
        model, byte_tokenizer(), paths, reference=model, limit=5, num_fewshot=1, progress=False
    )
    assert result["reference"] == result["tasks"]
    assert result["n"] == {"choice": 5, "text": 2}


FEW_SHOT_FORMATS = {
    "choice": ([choice_row(1, query="1st?"), choice_row(0, query="2nd?")], "2nd? xx\n\n1st?"),
    "continuation": (
        [{"context": "say", "continuation": letter} for letter in "ab"],
        "say b\n\nsay",
    ),
    "schema": (
        [{"context_options": [f"{i}x", f"{i}y"], "continuation": "z", "gold": 1} for i in (1, 2)],
        ["2y z\n\n1x", "2y z\n\n1y"],
    ),
}


@pytest.mark.parametrize("rows, prompt", FEW_SHOT_FORMATS.values(), ids=FEW_SHOT_FORMATS)
def test_few_shot_examples_are_other_rows(tmp_path, rows, prompt):
    """The prompt of the first row shows the second one solved, whatever the seed."""
    from lm_eval.tasks import TaskManager

    configs = local_tasks([write(tmp_path / "a.jsonl", *rows)])
    task = TaskManager(include_defaults=False).load(configs)["tasks"]["a"]
    for seed in range(8):
        task.set_fewshot_seed(seed)
        assert task.fewshot_context(task.test_docs()[0], num_fewshot=1) == prompt


def test_model_and_tokenizer_are_left_as_they_were(tmp_path):
    """lm-eval ties weights, sets eval mode and adds a padding token: none of it may stay."""
    model, tokenizer = tiny_llama(tie_word_embeddings=True).train(), byte_tokenizer()
    head = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight = head  # as a quantized output layer replaces the tied one
    path = write(tmp_path / "a.jsonl", {"text": "some text"})
    evaluate(model, tokenizer, [path], progress=False)
    assert model.lm_head.weight is head
    assert model.training
    assert tokenizer.pad_token_id is None
    model.tie_weights()  # the model's own method again
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_yaml_tasks_are_found_by_name(tmp_path, monkeypatch):
    """A YAML task over a local file gives what the file gives, in the order asked for."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "text.jsonl", {"text": "some text"})
    (tmp_path / "named.yaml").write_text(
        "task: named\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "output_type: loglikelihood_rolling\n"
        "test_split: test\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    model, tokenizer = tiny_llama(), byte_tokenizer()
    result = evaluate(model, tokenizer, ["named", path], include_path=tmp_path, progress=False)
    assert list(result["tasks"]) == ["named", "text"]
    bits = result["tasks"]["text"]["bits_per_byte"]
    assert result["tasks"]["named"] == {"bits_per_byte": pytest.approx(bits)}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "label": 1}, r"unknown task format: keys \['label', 'prompt'\], expected"),
        ({"prompt": "x"}, r"\{query, choices, gold\} or .* or \{text\}"),
        (choice_row(2), r"a\.jsonl:2: gold: expected an index of choices, got 2"),
        (choice_row(True), r"a\.jsonl:2: gold: expected an index of choices, got True"),
        (choice_row(0, choices=["one"]), r"a\.jsonl:2: choices: expected a list of 2 or more"),
        (choice_row(0, choices=["", "x"]), r"a\.jsonl:2: choices: expected strings with text"),
        (choice_row(0, query=" "), r"a\.jsonl:2: query: expected a string with text, got ' '"),
        ({"text": None}, r"a\.jsonl:2: text: expected a string with text, got None"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        local_tasks([path])


def test_bad_arguments_are_named(tmp_path):
    model, tokenizer = uniform_model(), byte_tokenizer()
    path = write(tmp_path / "a.jsonl", {"text": "x"})
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="tasks: 'missing' is neither a file nor a task"):
        evaluate(model, tokenizer, ["missing"])
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match="another task is named 'a' already"):
        local_tasks([path, write(tmp_path / "other" / "a.jsonl", {"text": "x"})])
    with pytest.raises(
        ValueError, match=r"num_fewshot: expected less than the 1 rows of .*b\.jsonl"
    ):
        evaluate(model, tokenizer, [write(tmp_path / "b.jsonl", choice_row(0))], num_fewshot=1)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected a BOS or EOS token"):
        evaluate(model, tokenizer, [path])


def test_table_shows_the_difference():
    result = {
        "tasks": {"a": {"acc": 0.5, "perplexity": 2e6}},
        "reference": {"a": {"acc": 0.75, "perplexity": 1e6}},
        "n": {"a": 4},
    }
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(format_results(result))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in lines]
    assert ["a", "acc", "0.7500", "0.5000", "-0.2500"] in cells
    assert ["a", "perplexity", "1e+06", "2e+06", "+1e+06"] in cells
    alone = format_results({**result, "reference": None})
    assert [list(column.cells) for column in alone.columns][2:] == [
        ["-", "-"],
        ["0.5000", "2e+06"],
        ["-", "-"],
    ]


def test_lm_eval_is_imported_when_first_used():
    """Importing the module loads neither lm_eval nor datasets and sets no variable."""
    code = (
        "import os, sys; names = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE')"
        "\nbefore = [os.environ.get(name) for name in names]"
        "\nimport arc_ao.integrations.lm_eval"
        "\nassert not {'lm_eval', 'datasets'} & set(sys.modules)"
        "\nassert before == [os.environ.get(name) for name in names]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_missing_lm_eval_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install arc-ao\[eval\]"):
        local_tasks([])


def test_offline_variables_that_are_set_are_kept(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    integration._import_lm_eval()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
