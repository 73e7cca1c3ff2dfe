"""The page of a trace: what it says, what it must not hold, and how a browser shows it."""

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from arkcache import KVCacheManager, Session, cli
from arkcache.demo.models import SHIPPED
from arkcache.sizes import bytes_text
from arkcache.tracing.figures import figures_of
from arkcache.tracing.file import load, save
from arkcache.tracing.maps import maps_of
from arkcache.tracing.recorder import Recorder
from arkcache.tracing.report import render
from arkcache.tracing.trace import LAYER_FIELDS, Trace
from tests.test_tracing import Run, traced

TEXT = "The value of amber is 4821. The value of birch is 1200. " * 12
runner = CliRunner(env={"COLUMNS": "200"})


class Page(HTMLParser):
    """What a page holds: its terms, its data, all addresses and the tags that were not closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.terms: dict[str, str] = {}
        self.data: dict[str, Any] = {}
        self._term = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in {"src", "href", "action", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["dt"]:
            self._term = data
        elif self.open[-1:] == ["dd"]:
            self.terms[self._term] = data
        elif self.open[-1:] == ["script"] and data.startswith("{"):
            self.data = json.loads(data)


def recorded(count: int = 20) -> tuple[Trace, KVCacheManager]:
    run = Run("numba", heads=3)
    return traced(run, Recorder(time_every=4, mass_every=4), count=count), run.manager


@pytest.fixture(scope="module")
def trace() -> Trace:
    return recorded()[0]


def test_the_page_says_what_the_trace_does() -> None:
    trace, manager = recorded()
    trace.about["budget_tokens"] = 32
    page, stats = Page(render(trace)), manager.stats()
    assert page.open == []
    assert page.terms["decode steps"] == "20"
    assert page.terms["budget, tokens"] == "32"
    assert page.terms["hit rate"] == f"{stats.hit_rate:.1%}"
    assert page.terms["read anew per step"] == bytes_text(stats.bytes_recalled / 20)
    # Sinks of one page, five selected ones: of 14 pages first, of 19 in the end.
    pages = trace.layer("attended_pages").sum() / trace.layer("sealed_pages").sum()
    assert page.terms["pages attended"] == f"{pages:.1%}"
    assert set(trace.layer("attended_pages").ravel()) == {6 * 6}
    latency = np.sort(trace.step("latency_ns")[:-1]) / 1e6
    assert page.terms["latency, median"] == f"{np.median(latency):,.1f} ms"
    assert page.terms["latency, p95"] == f"{np.percentile(latency, 95):,.1f} ms"
    series = page.data["series"]
    assert sum(series["recalled"]) == stats.pages_recalled
    assert sum(series["evicted"]) == stats.pages_evicted
    score = trace.layer("score_ns").sum(axis=1)
    assert series["phases"]["score"][4] == pytest.approx(score[4] / 1e6, abs=1e-4)
    assert series["phases"]["score"][5] is None


def test_the_map_says_which_pages_were_attended(trace: Trace) -> None:
    maps = maps_of(trace)
    assert (maps.steps_per_column, maps.pages_per_row) == (1, 1)
    cells, starts = maps.cells, trace.starts
    for step in range(len(trace.steps)):
        for layer in range(3):
            attended = np.zeros(cells.shape[2])
            for row, count in enumerate(trace.counts[step, layer].tolist()):
                attended[trace.pages[starts[step, layer, row] :][:count]] += 1 / 6
            attended[0] = 1  # the sink
            assert np.array_equal(cells[1 + layer, step] >> 4, np.rint(attended * 15))


def test_the_page_loads_nothing(trace: Trace) -> None:
    html = render(trace)
    page = Page(html)
    assert page.addresses == []
    assert not {"img", "link", "iframe", "object", "embed"} & set(page.tags)
    found = set(re.findall(r"\b\w+://[^\s\"'<]+", html))
    assert found == {"http://www.w3.org/2000/svg"}  # a name, which nobody asks for
    assert "@import" not in html
    assert "url(" not in html


def test_text_is_escaped(trace: Trace) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{data}} & \u2028"
    names = ("model", "question", "answer", "backend", "machine", "page_size", "date")
    about = trace.about | dict.fromkeys(names, evil) | {"files": [evil], "layers": [evil, 1, 2]}
    page = Page(render(replace(trace, about=about)))
    assert page.open == []
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert page.terms["question"] == evil
    assert page.data["layers"][1] == evil


def large_trace(num_steps: int, num_layers: int) -> Trace:
    """Three KV heads of 128 pages among thousands."""
    rng, shape = np.random.default_rng(0), (num_steps, num_layers, 3)
    numbers = rng.integers(0, 1 << 20, (num_steps, num_layers, len(LAYER_FIELDS)))
    numbers[:, :, LAYER_FIELDS.index("sealed_pages")] = 3 * 5000
    steps = np.stack([np.arange(num_steps), *rng.integers(0, 1 << 30, (3, num_steps))], axis=1)
    pages = np.sort(rng.integers(0, 5000, (*shape, 128)), axis=-1).reshape(-1)
    about = {"layers": [*range(num_layers)], "num_kv_heads": [3] * num_layers, "num_forgotten": 0}
    about |= {"num_sink_pages": 1, "time_every": 8, "mass_every": 64, "forgotten": {}}
    mass_of = np.array([(0, layer) for layer in range(num_layers)], np.int32)
    return Trace(
        about,
        steps,
        numbers,
        np.full(shape, 128, np.int32),
        pages.astype(np.int32),
        rng.random(len(pages)) < 0.2,
        mass_of,
        rng.random(num_layers * 3 * 130).astype(np.float32),
    )


@pytest.mark.parametrize("size", [(512, 30), (1024, 80)])
def test_the_page_stays_small(size: tuple[int, int]) -> None:
    assert 500_000 < len(render(large_trace(*size)).encode()) < 2_000_000


def test_a_trace_of_nothing_has_a_page(trace: Trace) -> None:
    empty = traced(Run("numba"), Recorder(), count=0)
    assert Page(render(empty)).terms["latency, median"] == "unknown"
    untimed = traced(Run("torch"), Recorder(time_every=None, mass_every=None), count=3)
    page = Page(render(untimed))
    assert page.data["mass"] == [None] * 4
    assert set(page.data["series"]["phases"]["score"]) == {None}


# -- the commands ---------------------------------------------------------------------------------


def record(tmp_path: Path, *arguments: str) -> Any:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = ["--model", str(SHIPPED), "--max-tokens", "8", "--budget", "128", "--file", str(text)]
    question = ["--question", "What is the value of amber?"]
    return runner.invoke(cli.app, ["trace", *model, *question, *arguments])


def test_record_and_report(tmp_path: Path) -> None:
    path = tmp_path / "one.trace"
    done = record(tmp_path, "--output", str(path))
    assert done.exit_code == 0, done.output
    trace = load(path)
    figures = figures_of(trace)
    assert f"{figures.num_steps} steps, {figures.page_share:.1%} of the pages" in done.stdout
    assert "Recording" in done.stderr
    assert 0 < len(trace.steps) <= 8
    assert trace.about["files"] == ["text.txt"]
    told = runner.invoke(cli.app, ["report", str(path)])
    assert told.exit_code == 0, told.output
    page = Page((tmp_path / "one.trace.html").read_text())
    assert page.terms["question"] == "What is the value of amber?"
    assert page.terms["hit rate"] == f"{figures.hit_rate:.1%}"


def test_both_say_what_they_wrote_as_json(tmp_path: Path) -> None:
    path, page = tmp_path / "one.trace", tmp_path / "one.html"
    done = record(tmp_path, "--output", str(path), "--json")
    told = runner.invoke(cli.app, ["report", str(path), "--output", str(page), "--json"])
    assert (done.exit_code, told.exit_code) == (0, 0), done.output + told.output
    figures = asdict(figures_of(load(path)))
    for said, written in ((done, path), (told, page)):
        values = json.loads(said.stdout)
        assert values["output"] == str(written)
        assert values["bytes"] == len(written.read_bytes())
        assert values["figures"] == figures
        assert values["about"] == load(path).about
    assert "Recording" in done.stderr
    assert record(tmp_path, "--output", str(path), "--json", "--quiet").stderr == ""


def test_ctrl_c_keeps_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Session.ask

    def interrupted(session: Session, *arguments: Any, **how: Any) -> Any:
        for number, part in enumerate(ask(session, *arguments, **how)):
            yield part
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Session, "ask", interrupted)
    path = tmp_path / "one.trace"
    done = record(tmp_path, "--output", str(path), "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout)["output"] == str(path)
    assert "interrupted; what was recorded is kept" in done.stderr
    assert 0 < len(load(path).steps) < 8


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path) -> None:
    done = record(tmp_path, "--output", str(tmp_path / "none" / "one.trace"))
    assert done.exit_code == 1
    assert "one.trace: No such file or directory" in done.stderr
    done = record(tmp_path, "--output", str(tmp_path / "one.trace"), "--time-every", "0")
    assert "time_every=0: expected at least 1" in done.stderr
    done = record(tmp_path, "--output", str(tmp_path / "two.trace"))
    assert done.exit_code == 0
    same = ["report", str(tmp_path / "two.trace"), "--output", str(tmp_path / "two.trace")]
    done = runner.invoke(cli.app, same)
    assert (done.exit_code, "is the trace itself" in done.stderr) == (1, True)
    page = tmp_path / "page.html"
    page.write_text("<p>")
    done = runner.invoke(cli.app, ["report", str(page)])
    assert done.exit_code == 1
    assert "is no trace" in done.stderr
    assert "Traceback" not in done.output


# -- in a browser ---------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """A headless Chromium: what it shows of a page, says on its console, and asks the network."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder

    def show(self, html: str, *arguments: str) -> tuple[str, list[str], list[str]]:
        """The document once its scripts have run, the console's lines, addresses asked for."""
        page, log = self._folder / "page.html", self._folder / "net.json"
        page.write_text(html)
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command = [self._program, "--headless", "--disable-gpu", "--no-first-run", *quiet]
        command += [f"--user-data-dir={self._folder / 'profile'}", "--enable-logging=stderr"]
        command += [f"--log-net-log={log}", "--virtual-time-budget=2000", *arguments]
        if os.name == "posix" and os.geteuid() == 0:
            command.append("--no-sandbox")
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        said = re.findall(r"CONSOLE.*", done.stderr)
        # Requests of the browser itself, such as for the time, have no origin.
        request = r'"initiator":"(?!not an origin)[^"]*".*"url":"((?:https?|wss?|ftp):[^"]*)"'
        asked = re.findall(request, log.read_text(errors="replace"))
        return done.stdout, said, asked


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium here")
    return Browser(program, tmp_path)


@pytest.mark.slow
def test_a_browser_draws_the_page(browser: Browser, trace: Trace) -> None:
    document, said, asked = browser.show(render(trace))
    assert said == []
    assert asked == []
    assert document.count("<canvas") == 1
    drawn = {
        name: document.count(f"var(--{name})&quot;") + document.count(f'"var(--{name})"')
        for name in ("recalled", "evicted", "score", "select", "rest", "attended")
    }
    assert drawn["recalled"] >= 20
    assert drawn["evicted"] >= 20
    assert drawn["score"] == drawn["select"] == 5
    assert drawn["attended"] == maps_of(trace).cells.shape[2]
    assert len(re.findall(r"<option[ >]", document)) == 4


@pytest.mark.slow
def test_the_browser_would_have_told(browser: Browser) -> None:
    _, said, asked = browser.show("<img src='http://127.0.0.1:9/x'><script>nothing.here</script>")
    assert "nothing is not defined" in said[0]
    assert "http://127.0.0.1:9/x" in asked


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [(), ("--blink-settings=preferredColorScheme=0",)])
def test_a_phone_shows_all_of_it(browser: Browser, trace: Trace, scheme: tuple[str, ...]) -> None:
    """Nothing sticks out at 375 pixels."""
    measure = "document.title = document.querySelector('iframe').contentDocument"
    measure += ".documentElement.scrollWidth"
    frame = f"<iframe style='border:0' width=375 height=3000 srcdoc=\"{escape(render(trace))}\">"
    html = f"{frame}</iframe><script>onload = () => {{ {measure} }}</script>"
    document, said, _ = browser.show(html, *scheme)
    assert said == []
    assert re.findall(r"<title>(\d+)</title>", document) == ["375"]


def test_cells_are_what_the_page_holds(trace: Trace) -> None:
    data = Page(render(trace)).data["maps"]
    cells = np.frombuffer(base64.b64decode(data["cells"]), np.uint8)
    assert np.array_equal(cells.reshape(4, data["columns"], data["rows"]), maps_of(trace).cells)


def test_a_file_between_changes_nothing(trace: Trace, tmp_path: Path) -> None:
    save(trace, tmp_path / "one.trace")
    assert render(load(tmp_path / "one.trace")) == render(trace)
