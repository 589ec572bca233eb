"""What a person at a prompt or in a notebook meets: names, short texts, small pages, typed keywords."""

from __future__ import annotations

import ast
import html
import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest
import torch

import okdc
from okdc import report
from okdc.comparing import Comparison
from okdc.comparing.gains import Spread
from okdc.comparing.table import Line
from okdc.training.progress import Display
from tests import stub
from tests.helpers.networks import Tiny
from tests.report.test_report import sample

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_stub_says_what_the_settings_are() -> None:
    assert stub.STUB.read_text(encoding="utf-8") == stub.text(), "python -m tests.stub"
    functions = {node.name: node for node in ast.parse(stub.text()).body if isinstance(node, ast.FunctionDef)}
    typed = {arg.arg: ast.unparse(arg.annotation) for arg in functions["compress"].args.kwonlyargs if arg.annotation}
    assert typed["epochs"] == "int" and typed["share"] == "Literal['trunk', 'none'] | None" and "loader" not in typed
    assert (stub.STUB.parent / "py.typed").is_file()


def test_a_name_and_a_module_are_inspected() -> None:
    named = okdc.inspect("resnet20_cifar")
    assert named.input_size == (3, 32, 32) and named == okdc.inspect("resnet20_cifar", (3, 32, 32))
    assert okdc.inspect(Tiny(), (3, 32, 32)).name == "Tiny"
    with pytest.raises(okdc.OkdcError, match="Did you mean"):
        okdc.inspect("resnet20_cifr")
    assert len(repr(named)) < 200 and "3 stages" in repr(named)
    page = named._repr_html_()
    assert "<td>stages.1</td>" in page and "default" in page and len(page) < 5000


def test_the_page_of_a_run_is_framed_with_its_curves(tmp_path: Path) -> None:
    assert report.of_run(tmp_path) is None
    facts = sample()
    facts["network"]["name"] = "<b>resnet18"
    report.write(tmp_path, facts)
    page = report.of_run(tmp_path)
    assert page and page.startswith("<iframe") and "<b>" not in page
    inside = html.unescape(page.partition("srcdoc")[2])
    assert "97.2" in inside and "<svg" in inside and "<b>resnet18" not in inside


def test_a_comparison_is_short_and_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        Line(name, 2, 0.1, 1.0, {0: mean, 1: mean}, Spread(mean, 0.0, 2), curve=[mean - 1, mean])
        for name, mean in (("one", 81.0), ("baseline", 80.0))
    ]
    recipe = okdc.Recipe().to_dict()
    found = Comparison(tmp_path / "cmp", "top1", lines, "one helps.", 100, recipe)
    assert repr(found) == f"<Comparison: one 81.00 %, baseline 80.00 %; one helps. In {tmp_path / 'cmp'}>"
    assert "81.00" in found._repr_html_() and "svg" in found._repr_html_()
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    found.show()
    assert opened == [f"file://{tmp_path}/cmp/compare.html"]


def test_the_bar_lives_in_a_notebook_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    for widgets in (True, False):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=widgets: there or None)
        assert (Display(1, 1, 1).live is not None) == widgets


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    space: dict[str, Any] = {}
    shown = []
    for code in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        *body, last = ast.parse(code).body
        expression = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if expression else [*body, last], []), "cell", "exec"), space)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), space))
    anatomy, result = shown[:2]
    assert isinstance(anatomy, okdc.Anatomy) and isinstance(result, okdc.Result)
    assert len(repr(result)) < 300 and "top-1" in repr(result) and "in runs" in repr(result)
    assert "iframe" in (result._repr_html_() or "") and result.student(torch.randn(2, 3, 8, 8)).shape == (2, 10)
