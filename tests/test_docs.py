"""README and docs: their code runs, their commands parse, their figures are the committed ones.

Blocks of Python of one page run in order in one namespace. For "path/to/model" stands the shipped
model, cut to its first decoder layer; SUBSTITUTIONS says what else is replaced.
"""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import arc_ao.shipped
from arc_ao.cli import _parser
from arc_ao.ops import native

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
RESULTS = ROOT / "benchmarks" / "results"
# What the reader sees -> what the test runs instead.
SUBSTITUTIONS = {
    '"path/to/model"': '"first_layer"',
    '"calibration.txt"': repr(str(arc_ao.shipped.CALIBRATION_TEXT)),
    '.split("\\n\\n")[:64]': '.split("\\n\\n")[4:7]',
}


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks in these languages ("" is none)."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(2)), found[2])
        for found in FENCED.finditer(text)
        if found[1] in languages
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Lines of blocks that call arc-ao, and the calls inside of sentences and tables."""
    lines = [line for _, block in blocks(page, "") for line in block.splitlines()]
    spans = SPAN.findall(FENCED.sub("", page.read_text()))
    calls = [line for line in lines if line.startswith("arc-ao ")]
    return calls + [span for span in spans if re.match(r"arc-ao \S+ \S", span)]


@pytest.fixture(scope="module")
def result_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("result_tables", DOCS / "result_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def first_layer(tmp_path_factory) -> Path:
    """The shipped model with one decoder layer, and its tokenizer."""
    folder = tmp_path_factory.mktemp("docs") / "first_layer"
    model = AutoModelForCausalLM.from_pretrained(arc_ao.shipped.MODEL, dtype="auto")
    model.model.layers = torch.nn.ModuleList([model.model.layers[0]])
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(arc_ao.shipped.MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_python_of_a_page_runs(page, first_layer, tmp_path, monkeypatch):
    if "library_path" in page.read_text() and native.load() is None:
        pytest.skip(f"no native library: {native.reason_absent()}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first_layer").symlink_to(first_layer)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        for shown, run in SUBSTITUTIONS.items():
            block = block.replace(shown, run)
        exec(compile("\n" * line + block, page, "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_the_commands_of_a_page_parse(page, capsys):
    """Every option and command that a page shows exists, with the arguments it needs."""
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        try:
            _parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_targets_of_make_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(shown) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_those_of_the_result_files(page, result_tables):
    """`python docs/result_tables.py` writes them."""
    assert result_tables.with_tables(page.read_text()) == page.read_text()


def test_an_unknown_table_is_refused(result_tables):
    with pytest.raises(KeyError, match="nothing"):
        result_tables.with_tables("<!-- results: nothing -->\n\n<!-- end of results -->")


def test_the_readme_names_every_gate_that_was_not_passed():
    """Read from the files themselves, whichever they are."""
    documents = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    documents = [document for document in documents if isinstance(document, dict)]
    gates = [
        g["name"] for d in documents for g in d.get("acceptance", ()) if g["verdict"] != "PASS"
    ]
    claims = [claim for d in documents for claim in d.get("claims", ()) if claim["acceptance"]]
    gates += [claim["claim"] for claim in claims if claim["verdict"] != "PASS"]
    text = README.read_text()
    assert [gate for gate in gates if gate not in text] == []


def test_the_readme_has_the_shares_that_the_record_printed():
    """accuracy.md was written by another program from the same rows."""
    section = (RESULTS / "accuracy.md").read_text().split("\n## smollm2\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()]
    head = next(cells for cells in lines if "closed wiki" in cells)
    columns = [head.index("closed wiki"), head.index("closed books")]
    shares = [
        " / ".join(cells[column] for column in columns)
        for cells in lines
        if len(cells) == len(head) and cells[1].startswith(("arc_ao", "ARC (paper) 10"))
    ]
    assert len(shares) >= 5
    assert [share for share in shares if f"| {share} |" not in README.read_text()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_result_is_printed_bold(page, result_tables):
    """What is fastest is said by a column, whoever it is."""
    assert not [
        found for found in result_tables.MARKED.finditer(page.read_text()) if "**" in found[0]
    ]


def source_texts() -> str:
    """All strings of arc_ao, joined as Python joins them, with "..." for each value inside."""
    texts = []
    for path in (ROOT / "arc_ao").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                texts.append("".join(p if isinstance(p, str) else "..." for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist():
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [row for row in rows if " " in row or row.endswith(":")]
    known = source_texts()
    assert len(messages) > 30
    assert [message for message in messages if message not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    files = [
        "/" + str(path.relative_to(ROOT))
        for folder in ("arc_ao", "csrc", "benchmarks", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
    ]
    named = [s for s in SPAN.findall(page.read_text()) if re.fullmatch(r"[\w/]+\.(py|cpp|md)", s)]
    assert [name for name in named if not any(file.endswith("/" + name) for file in files)] == []


def test_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/]+\.md", json.dumps(navigation))
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
