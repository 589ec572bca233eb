"""The site builds without a warning, its commands exist, its quotes are what the code says, its loop trains."""

from __future__ import annotations

import pickle
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import okdc
from okdc import methods, testing
from okdc.cli import main, timm_flags
from okdc.measure.estimate import measure
from okdc.recipe import flat_settings
from tests.helpers.networks import Tiny

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *ROOT.glob("*/README.md")])
WITHOUT_COMMAND = {"--version", "--help"}


def test_the_site_builds_without_a_warning_or_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="the site is not built: pip install 'okdc[docs]'")
    from sphinx.application import Sphinx

    monkeypatch.setattr(sys, "path", list(sys.path))  # conf.py adds to it
    monkeypatch.delenv("OKDC_DOCS_ONLINE", raising=False)
    source, site, said = ROOT / "docs", tmp_path / "site", StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Python in Sphinx and its extensions are not ours
        builder = Sphinx(source, source, site, tmp_path / "trees", "html", status=None, warning=said)
        builder.build()  # here and not in a process of its own, which would import torch again
    assert builder.statuscode == 0 and said.getvalue() == ""
    settings = (site / "settings.html").read_text(encoding="utf-8")
    assert all(f"--{name.replace('_', '-')}<" in settings for name in flat_settings())
    cards = (site / "cards.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name}<" in cards for name in methods.names())
    assert {"quickstart.html", "commands.html", "changelog.html"} <= {file.name for file in site.iterdir()}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `okdc …` in the page's bash blocks, without comments; lines that end in \\ go on."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|bin/|-m |\d )okdc ((?!;).*)", line)
            if found:
                yield shlex.split(found[1], comments=True)


def options(command: click.Command) -> set[str]:
    parameters = command.get_params(click.Context(command))
    return {
        name for each in parameters if isinstance(each, click.Option) for name in (*each.opts, *each.secondary_opts)
    }


def refused(words: list[str]) -> list[str]:
    """What of an `okdc` command line does not exist: the command, or options."""
    command = main.commands.get(words[0])
    if command is None:
        return [] if words[0] in WITHOUT_COMMAND else words[:1]
    typed = [word.partition("=")[0] for word in words[1:] if re.match(r"-[a-z]|--[a-z]", word)]
    return [word for word in typed if word not in options(command)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    wrong = {" ".join(words): found for words in commands(page) if (found := refused(words))}
    assert not wrong, f"{page}: no such command or option"


def test_commands_are_found_and_parsed() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 60 and {words[0] for words in found} >= {"compress", "export", "compare", "inspect", "profile"}
    assert refused(["compress", "--epoch", "3"]) == ["--epoch"] and refused(["comprss"]) == ["comprss"]


def test_links_between_files_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / ".github" / "CONTRIBUTING.md", *PAGES]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_every_method_has_its_cost_on_the_page_to_choose_from() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| \d", (ROOT / "docs" / "choose.md").read_text(encoding="utf-8"))
    assert sorted(rows) == methods.names()


TABLE = re.findall(
    r"(?m)^\| `(--[\w-]+)` \| (same|default|form|noted|no) \|(.*)\|$", (ROOT / "docs" / "timm.md").read_text()
)


def test_the_table_of_timms_flags_is_true() -> None:
    ours = options(main.commands["compress"])
    assert len(TABLE) > 130
    assert [flag for flag, here, _ in TABLE if (here in ("no", "noted")) == (flag in ours)] == []
    assert {flag for flag, here, _ in TABLE if here == "noted"} == timm_flags.NOTED.keys() - {"--local-rank"}
    explained = {flag for flag, here, note in TABLE if here == "no" and note.strip()}
    assert explained <= timm_flags.REFUSED.keys() <= {flag for flag, here, _ in TABLE if here == "no"}
    named = {
        word
        for *_, note in TABLE
        for word in re.findall(r"`(--?[\w-]+)", note)
        if not re.match("--(kd|naflex|dr)", word)
    }
    assert named <= ours


# What timm's train.py has at these flags, where okdc's default is the same.
TIMM = {
    "hflip": 0.5, "vflip": 0.0, "lr_base": 0.1, "momentum": 0.9, "warmup_lr": 1e-5, "min_lr": 0.0, "decay_epochs": 90.0,
    "decay_rate": 0.1, "batch_size": 128, "seed": 42, "log_interval": 50, "recovery_interval": 0, "mixup": 0.0,
    "cutmix": 0.0, "reprob": 0.0, "opt": "sgd", "model_ema_decay": 0.9998, "grad_accum_steps": 1,
}  # fmt: skip


def test_defaults_called_the_same_are_timms() -> None:
    same = {flag[2:].replace("-", "_") for flag, here, _ in TABLE if here == "same"}
    assert same >= TIMM.keys()
    assert {name: flat_settings()[name][1].default for name in TIMM} == TIMM


def test_errors_that_the_page_on_trouble_quotes_are_the_codes() -> None:
    code = "".join(
        file.read_text(encoding="utf-8") for folder in ("okdc", "export") for file in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [quote for first in re.findall(r"(?m)^\| (.*?) \|", page) for quote in re.findall("`(.+?)`", first)]
    pieces = [piece.strip(" .") for quote in quoted for piece in re.split("…|'", quote) if len(piece.strip(" .")) > 7]
    assert len(pieces) > 30
    assert [piece for piece in pieces if piece not in code and piece != "No such option"] == []


LOOPS = {"**okdc's**": None, "**Plain PyTorch.**": None, "**Lightning:**": "lightning"}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_method_trains_in_the_loops_that_the_page_shows(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if LOOPS[loop]:
        pytest.importorskip(LOOPS[loop], reason=f"the loop of docs/methods.md is not run: pip install {LOOPS[loop]}")
    network = Tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(64, 3, 32, 32)
    student = _run(loop, network, images, tmp_path, monkeypatch)["student"]
    assert student is network and not any(module._forward_hooks for module in network.modules())
    assert all(not torch.equal(before[name], p) for name, p in network.named_parameters() if not name.endswith("bias"))
    assert torch.isfinite(network(images)).all()


def test_a_member_sits_a_step_out_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heading = "## A member that sits a step out"
    turns = _run(heading, Tiny(), torch.randn(64, 3, 32, 32), tmp_path, monkeypatch)["Turns"]
    case = testing.Case(turns, Tiny)
    method = case.build()
    optimizer, peer = case.optimizer(method), method.cohort.members[1]
    states = []
    for _ in range(3):
        case.step(method, optimizer)
        states.append({name: value.clone() for name, value in peer.state_dict().items()})
    first, second, third = states
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(torch.equal(value, third[name]) for name, value in second.items() if "num_batches" not in name)


def test_a_head_of_ones_own_counts_as_a_member_as_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heading = "## A head of your own that counts as a member"
    images = torch.randn(64, 3, 32, 32)
    aside = _run(heading, Tiny(), images, tmp_path, monkeypatch)["Aside"]
    case = testing.Case(aside, Tiny)
    for demand in (testing.learns, testing.resume, testing.student):
        demand(case)
    method = case.build()
    assert [row.name for row in measure(method).networks] == ["target", "early"]
    early = method.byproducts()["early"].eval()
    out = method.eval().cohort(images)
    torch.testing.assert_close(early(images), method.said(out)[1])
    torch.testing.assert_close(method.ensemble(out), (out.logits[0] + early(images)) / 2)
    method.strip()
    assert early(images).shape == (64, 4)


def test_a_mean_teacher_with_weak_and_strong_views_is_as_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heading = "## A running mean that teaches"
    teacher = _run(heading, Tiny(), torch.randn(64, 3, 32, 32), tmp_path, monkeypatch)["MeanTeacher"]
    case = testing.Case(teacher, Tiny)
    for demand in (testing.learns, testing.resume, testing.student, testing.precision):
        demand(case)
    method = case.build()
    case.step(method, case.optimizer(method))
    weak, strong = case.batch(method)[0]
    assert not torch.equal(weak, strong) and 0 <= method.logged()["agreement"] <= 1
    mean, trained = method.mean.head.weight, method.cohort.target.head.weight
    assert method.student is method.mean
    for network in (method.mean, method.byproducts()["trained"], method.strip()):  # each ships as it is
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
        assert b"okdc" not in pickle.dumps(network)
    torch.testing.assert_close(mean, (case.build().mean.head.weight + trained) / 2)  # at first half of each


def test_what_was_said_an_epoch_ago_softens_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heading, images = "## Labels that soften by what was said an epoch ago", torch.randn(8, 3, 32, 32)
    labels = torch.arange(8) % 4
    kind = _run(heading, Tiny(), images, tmp_path, monkeypatch)["PsKd"]
    method = okdc.build(Tiny(), images[:2], kind, train_labels=labels)
    method.begin_epoch(1, 4)
    assert torch.equal(method.before, torch.nn.functional.one_hot(labels, 4).float()), "the trial is undone"
    first = method(images, labels, torch.arange(8))
    torch.testing.assert_close(first["self"] / first["ce"], torch.tensor(0.4 / 0.6))  # of the labels, both
    second = method(images, labels, torch.arange(8))
    said = method.cohort(images).logits[0].softmax(1)
    torch.testing.assert_close(method.before, said)
    torch.testing.assert_close(second["self"], -0.4 * (said * said.log()).sum(1).mean())
    testing.resume(testing.Case(kind, Tiny))


def test_the_tests_that_the_page_on_methods_shows_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run("## Test it", Tiny(), torch.randn(64, 3, 32, 32), tmp_path, monkeypatch)["case"].size == 16


def _run(after: str, network: Tiny, images: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's first block of Python after some words leaves behind, run with a network and data."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    block = page.partition(f"\n{after}")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    labels = torch.arange(len(images)) % 4
    loader = DataLoader(TensorDataset(images, labels), 32)
    space: dict[str, Any] = {"network": network, "images": images, "labels": labels, "loader": loader}
    space |= {"validation": loader, "torch": torch}
    with warnings.catch_warnings():
        if "lightning" in after.lower():
            warnings.simplefilter("ignore")  # what it says of workers and devices is not ours
        exec(block, space)
    return space
