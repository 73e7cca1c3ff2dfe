"""Conversations: what a session feeds its model, how it stops, and what a terminal shows."""

import copy
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache
from typer.testing import CliRunner

from arkcache import (
    ArkCache,
    CacheConfig,
    ConfigError,
    InputError,
    KVCacheManager,
    PrefixCache,
    Session,
    SessionError,
    cli,
)
from arkcache.chat.documents import help_text, load_document
from arkcache.chat.session import CHUNK_TOKENS, Turn, interrupts_wait
from arkcache.chat.streaming import TextStream
from arkcache.chat.template import PLAIN, encode, template_of
from arkcache.chat.terminal import Chat, Sampling
from arkcache.demo import run as demo
from arkcache.demo.models import SHIPPED, load_model
from tests.terminal import Terminal
from tests.twins import small_config

TEXT = "The value of amber is 4821. The value of birch is 1200. " * 12
ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(None, torch.device("cpu"), "auto")


def session_of(shipped: tuple[Any, Any], **settings: Any) -> Session:
    return Session(*shipped, **({"budget_tokens": 128} | settings))


def said(session: Session, question: str, **how: Any) -> str:
    return "".join(session.ask(question, **({"max_new_tokens": 12} | how)))


def dense(shipped: tuple[Any, Any], ids: list[int], count: int) -> list[int]:
    """The most likely tokens after these, by the model's own cache."""
    model, _ = shipped
    cache, answer, given = DynamicCache(config=model.config), [], ids
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([given]), past_key_values=cache).logits[0, -1]
            given = [int(logits.argmax())]
            answer += given
    return answer


# -- a session ------------------------------------------------------------------------------------


def test_answers_are_the_full_caches(shipped: tuple[Any, Any]) -> None:
    """Two turns with budget for everything: the tokens of one long prompt, and its answers."""
    session = session_of(shipped, budget_tokens=None)
    tokenizer = shipped[1]
    assert session.read(TEXT) == len(session.ids) == session.cache.get_seq_length()
    expected = encode(tokenizer, TEXT + "\n\n")
    for number, question in enumerate(("What is the value of amber?", "And of birch?")):
        between = PLAIN.between if number else ""
        expected += encode(tokenizer, between + question + PLAIN.closing)
        answer = dense(shipped, expected, 12)
        stop = answer.index(0) if 0 in answer else len(answer)  # the end of a text
        text = said(session, question)
        assert text == tokenizer.decode(answer[:stop])
        expected += answer[:stop]
        assert session.ids == expected
        assert session.turns[-2:] == [Turn("user", question), Turn("assistant", text)]
    session.cache.check_integrity()


def test_exact_answers_attend_everything(shipped: tuple[Any, Any]) -> None:
    exact, full = session_of(shipped), session_of(shipped, budget_tokens=None)
    for session in (exact, full):
        session.read(TEXT)
    assert said(exact, "What?", exact=True) == said(full, "What?")
    assert exact.cache.stats().attended_tokens == exact.cache.stats().total_tokens
    said(exact, "What?")
    assert exact.cache.stats().attended_tokens < exact.cache.stats().total_tokens / 2


def test_texts_are_read_in_chunks(shipped: tuple[Any, Any]) -> None:
    session, steps = session_of(shipped), []
    count = session.read(TEXT * 12, lambda done, total: steps.append((done, total)))
    assert count > 2 * CHUNK_TOKENS
    assert steps[0] == (0, count)
    assert steps[1] == (CHUNK_TOKENS, count)
    assert steps[-1] == (count, count)


def test_undo_and_ask_again(shipped: tuple[Any, Any]) -> None:
    session = session_of(shipped)
    session.read(TEXT)
    held, first = list(session.ids), said(session, "What is the value of amber?")
    assert session.undo() == "What is the value of amber?"
    assert session.ids == held
    assert session.cache.get_seq_length() == len(held)
    assert session.turns == [Turn("user", TEXT)]
    assert said(session, "What is the value of amber?") == first
    with pytest.raises(InputError, match="no question"):
        session.undo(), session.undo()
    session.reset()
    assert (session.ids, session.turns, session.cache.get_seq_length()) == ([], [], 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("during", ["a text", "a question", "an answer"])
def test_what_fails_has_not_happened(
    shipped: tuple[Any, Any],
    error: type[BaseException],
    during: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in a layer in the middle of a step."""
    model, question = shipped[0], "What is the value of birch?"
    broken, whole = session_of(shipped), session_of(shipped)
    for session in (broken, whole):
        session.read(TEXT)
    mlp, calls = model.model.layers[2].mlp, iter(range(100))
    forward, failing = mlp.forward, 5 if during == "an answer" else 0

    def fail(*arguments: Any) -> Any:
        if next(calls) == failing:
            raise error
        return forward(*arguments)

    def happen() -> None:
        if during == "a text":
            broken.read(TEXT)
        else:
            said(broken, question)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", fail)
        with pytest.raises(error):
            happen()
    assert broken.cache.get_seq_length() == len(broken.ids)
    broken.cache.check_integrity()
    if during == "an answer":  # what it said before is there to stay
        answer = whole.ask(question, max_new_tokens=12)
        while len(whole.ids) < len(broken.ids):
            next(answer)
        answer.close()
    assert broken.ids == whole.ids
    assert len(broken.turns) == len(whole.turns)
    assert said(broken, "And of amber?") == said(whole, "And of amber?")


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """As in a terminal: what runs in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_waits_until_a_step_is_over() -> None:
    steps = []

    def step() -> None:
        with interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            steps.append("whole")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert steps == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen: list[str] = []

    def elsewhere() -> None:
        with interrupts_wait():
            seen.append("ran")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["ran"]


def test_an_answer_nobody_waits_for_ends(shipped: tuple[Any, Any]) -> None:
    session = session_of(shipped)
    session.read(TEXT)
    answer = session.ask("What is the value of amber?")
    first = next(answer)
    answer.close()
    assert session.turns[-1] == Turn("assistant", first)
    said(session, "And of birch?")
    assert session.cache.get_seq_length() == len(session.ids)
    session.cache.check_integrity()


def test_a_saved_conversation_goes_on(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    """The answer that would have come, from pages that were sealed before the save; and undo."""
    session = session_of(shipped)
    session.read(TEXT)
    first = said(session, "What is the value of amber?")
    session.save(tmp_path / "saved")
    loaded = Session.load(*shipped, tmp_path / "saved")
    assert (loaded.turns, loaded.ids) == (session.turns, session.ids)
    assert said(loaded, "And of birch?") == said(session, "And of birch?")
    assert loaded.cache.stats().pages_recalled > 0
    assert loaded.undo() == "And of birch?"
    assert loaded.undo() == "What is the value of amber?"
    assert said(loaded, "What is the value of amber?") == first
    session.reset()
    session.save(tmp_path / "saved")
    assert Session.load(*shipped, tmp_path / "saved").turns == []


def test_conversations_share_what_they_read(shipped: tuple[Any, Any]) -> None:
    """The second reads a chunk less; what fails leaves an empty conversation."""
    model, _ = shipped
    prefixes = PrefixCache(model, budget_tokens=128)
    first = Session(*shipped, prefixes=prefixes)
    first.read(TEXT)
    told: list[tuple[int, int]] = []
    second = Session(*shipped, prefixes=prefixes)
    length = second.read(TEXT, lambda *done: told.append(done))
    assert length - told[0][0] <= prefixes.config.page_size
    assert second.ids == first.ids
    alone = session_of(shipped, budget_tokens=128)
    alone.read(TEXT)
    question = "What is the value of amber?"
    assert said(second, question) == said(first, question) == said(alone, question)
    third = Session(*shipped, prefixes=prefixes)

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        third.read(TEXT, fail)
    assert (third.ids, third.turns, third.cache.get_seq_length()) == ([], [], 0)
    assert said(third, question) == said(session_of(shipped, budget_tokens=128), question)
    with pytest.raises(InputError, match="prefixes beside other settings"):
        Session(*shipped, prefixes=prefixes, budget_tokens=128)


def test_text_that_is_no_text(shipped: tuple[Any, Any]) -> None:
    """Bytes that are no characters come as lone surrogates from a terminal or the command line."""
    session = session_of(shipped)
    for do in (session.read, session.ask):
        with pytest.raises(InputError, match="not UTF-8"):
            do("hi \udcff")
    assert session.ids == []
    assert "not UTF-8" in talk(session, "hi \udcff", "/quit")
    done = runner.invoke(cli.app, ["generate", "--model", str(SHIPPED), "-"], input=b"\xff\xfe")
    assert (done.exit_code, "standard input is not UTF-8" in done.stderr) == (1, True)


def test_who_the_assistant_is_was_said_when_it_was_saved(
    shipped: tuple[Any, Any], tmp_path: Path
) -> None:
    session_of(shipped).save(tmp_path / "saved")
    load = ["chat", "--model", str(SHIPPED), "--load", str(tmp_path / "saved")]
    done = runner.invoke(cli.app, [*load, "--system", "a pirate"])
    assert (done.exit_code, "--system beside --load" in done.stderr) == (1, True)


def test_counters_are_read_before_they_begin_anew(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    session = session_of(shipped)
    session.read(TEXT)
    session.save(tmp_path / "saved")
    talk = Chat(session, Sampling(), Console(file=io.StringIO()))
    seen: list[int] = []
    talk.before_change = lambda: seen.append(talk.stats().total_tokens)
    held = talk.stats().total_tokens
    talk.load(tmp_path / "saved", budget_tokens=96)
    assert talk.session.cache.config.budget_tokens == 96
    talk._obey("reset")
    assert seen == [held, held]


def test_conversations_that_cannot_be_loaded(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = shipped
    session = session_of(shipped)
    session.cache.save(tmp_path / "cache")
    with pytest.raises(SessionError, match="without a conversation"):
        Session.load(model, tokenizer, tmp_path / "cache")
    session.save(tmp_path / "saved")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["anotherword"])
    with pytest.raises(SessionError, match="another tokenizer"):
        Session.load(model, other, tmp_path / "saved")
    shown = talk(session, "/save", "/load", f"/load {tmp_path}", f"/save {tmp_path}")
    for message in ("/save FOLDER: no", "/load FOLDER: no", "holds no saved", "holds other files"):
        assert message in shown


def test_save_and_load_in_a_chat(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    session, folder = session_of(shipped), tmp_path / "saved"
    session.read(TEXT)
    shown = talk(session, "What is the value of amber?", f"/save {folder}")
    assert f"{len(session.ids):,} tokens saved" in shown
    again = talk(session, "/reset", f"/load {folder}", "/stats", "/undo")
    assert "tokens loaded; the last question was: What is the value of amber?" in again
    assert "forgotten: What is the value of amber?" in again


def test_drawn_answers(shipped: tuple[Any, Any]) -> None:
    """By torch's generator; a penalty forbids nothing but makes words new."""
    texts = set()
    for seed in (0, 0, 1):
        session = session_of(shipped)
        torch.manual_seed(seed)
        texts.add(said(session, "Tell", temperature=2.0, top_p=0.95))
    assert len(texts) == 2
    session = session_of(shipped)
    said(session, "Tell", repetition_penalty=1e6, max_new_tokens=20)
    answer = session.ids[-20:]
    assert len(set(answer)) == len(answer)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_settings_are_checked_before_anything_happens(
    shipped: tuple[Any, Any], how: dict[str, Any], message: str
) -> None:
    session = session_of(shipped)
    with pytest.raises(InputError, match=message):
        session.ask("What?", **how)  # not only when the first part is asked for
    assert session.ids == []


def test_what_cannot_be_read(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(shipped)
    for given, message in (("", "nothing to read"), (" \n", "nothing to read")):
        with pytest.raises(InputError, match=message):
            session.read(given)
    with pytest.raises(InputError, match="the question is empty"):
        session.ask(" ")
    monkeypatch.setattr(Session, "limit", 100)
    with pytest.raises(InputError, match=r"tokens beside the 0 tokens held: .* made for 100"):
        session.read(TEXT)
    with pytest.raises(InputError, match=r"200,000,000 characters beside"):
        session.read("a" * 200_000_000)  # at once
    patient = session_of(shipped, past_limit=True)
    assert patient.read(TEXT) > 100
    assert session.ids == []


def test_template(shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1]
    assert template_of(tokenizer) == PLAIN
    assert template_of(tokenizer, "You are terse.").opening == "You are terse.\n\n"


def test_characters_of_several_tokens_come_whole() -> None:
    """A tokenizer of bytes: nothing is printed until a character is whole."""

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    stream = TextStream(Bytes())  # type: ignore[arg-type]
    text = "né ☕ 日本"
    parts = [stream.push(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert "�" not in "".join(parts)
    assert stream.push(0xE6) == ""
    assert stream.rest() == "�"


# -- a budget that changes ------------------------------------------------------------------------


@pytest.mark.backends("torch", "numba")
def test_a_budget_may_change_while_tokens_are_held() -> None:
    """Steps are then those of a cache that had the budget from the beginning."""
    states = torch.randn(2, 2, 2, 200, 16)
    query = torch.randn(2, 4, 1, 16)
    budgets = (32, 128, 16, 400, 32)
    manager = KVCacheManager(1, 2, 16, small_config(budget_tokens=64))
    manager.append(0, *states)
    for budget in budgets:
        manager.set_budget(budget)
        other = KVCacheManager(1, 2, 16, small_config(budget_tokens=budget))
        other.append(0, *states)
        torch.testing.assert_close(manager.attend(0, query), other.attend(0, query))
        assert manager.stats().attended_tokens == other.stats().attended_tokens
        manager.check_integrity()
    for budget, message in ((None, "begin to attend everything"), (1, "budget_tokens=1")):
        with pytest.raises(ConfigError, match=message):
            manager.set_budget(budget)
    assert manager.config.budget_tokens == 32


@pytest.mark.backends("torch", "numba")
def test_a_budget_may_grow_beyond_what_lists_had_room_for() -> None:
    states, query = torch.randn(2, 1, 1, 2000, 16), torch.randn(1, 1, 1, 16)
    manager = KVCacheManager(1, 1, 16, small_config(budget_tokens=64))
    other = KVCacheManager(1, 1, 16, small_config(budget_tokens=1900))
    for one in (manager, other):
        one.append(0, *states)
        one.attend(0, query)
    manager.set_budget(1900)
    torch.testing.assert_close(manager.attend(0, query), other.attend(0, query))
    manager.check_integrity()


def test_a_caches_budget_may_change(shipped: tuple[Any, Any]) -> None:
    session = session_of(shipped)
    session.read(TEXT)
    session.cache.set_budget(256)
    said(session, "What?")
    stats = session.cache.stats()
    assert 200 < stats.attended_tokens / 4 <= 256
    with pytest.raises(ConfigError):
        session.cache.set_budget(-5)
    assert session.cache.config.budget_tokens == 256
    empty = ArkCache(shipped[0], CacheConfig(budget_tokens=64))
    empty.set_budget(96)
    assert empty.config.budget_tokens == 96


# -- a terminal -----------------------------------------------------------------------------------


class Typist:
    """Types lines; `None` is Ctrl-C."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = iter(lines)

    def __call__(self, _prompt: str) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise EOFError from None
        if line is None:
            raise KeyboardInterrupt
        return line


def talk(session: Session, *lines: str | None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    Chat(session, Sampling(max_new_tokens=8), console, Typist(*lines)).run()
    return out.getvalue()


def test_talk(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT)
    session = session_of(shipped)
    shown = talk(
        session,
        f"/file {text}",
        "What is the value of amber?",
        "/stats",
        "/budget 96",
        None,
        "",
        "Why?",
    )
    assert "mine.txt: " in shown
    assert "attended" in shown
    assert "tokens held" in shown
    assert "a step attends 96 tokens" in shown
    assert "Ctrl-D or /quit leaves" in shown
    roles = [turn.role for turn in session.turns]
    assert roles == ["user", "user", "assistant", "user", "assistant"]
    again = talk(session, "/ask-full", "/undo", "/quit", "never asked")
    assert "forgotten: Why?" in again
    assert len(session.turns) == 3
    assert "everything is forgotten" in talk(session, "/reset")
    assert session.ids == []


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (30, True), (80, False)])
def test_figures_are_live_on_a_terminal_alone(
    shipped: tuple[Any, Any], width: int, terminal: bool
) -> None:
    lines = iter(["What is the value of amber?", None])

    def ask_line(prompt: str) -> str:
        line = next(lines)
        if line is None:
            raise EOFError
        return line

    session, out = session_of(shipped, budget_tokens=128), io.StringIO()
    session.read(TEXT)
    console = Console(file=out, width=width, height=24, force_terminal=terminal, _environ={})
    Chat(session, Sampling(40, temperature=5.0), console, ask_line, live=True).run()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue())
    rows = [line.rstrip() for line in shown.replace("\r", "\n").splitlines()]
    assert max(map(len, rows)) <= (width if terminal else 10_000)
    assert any(row.startswith("╭") for row in rows) == terminal
    assert ("steps" in shown) == terminal
    answer = session.turns[-1].text.split()
    after = shown[shown.rindex("╯") :] if terminal else shown
    assert answer[-1][-width // 2 :] in after.replace("\n", "")  # its last row stays
    assert len(answer) > 10
    found = iter("".join(rows))  # all of it is there, in order
    assert all(character in found for character in "".join(answer))


def test_several_lines(shipped: tuple[Any, Any]) -> None:
    session = session_of(shipped)
    talk(session, "one \\", "two", '"""three', "four", 'five"""')
    assert [turn.text for turn in session.turns[::2]] == ["one \ntwo", "three\nfour\nfive"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "/nonsense: no such command"),
        ("/file", "no path given"),
        ("/file /no/such/file", "cannot read /no/such/file"),
        ("/budget many", "expected a number of tokens"),
        ("/budget 3", "budget_tokens=3"),
        ("/undo", "no question was asked"),
        ("/ask-full", "no question was asked"),
    ],
)
def test_what_is_mistyped_is_said(shipped: tuple[Any, Any], line: str, message: str) -> None:
    session = session_of(shipped)
    session.read(TEXT)
    assert message in talk(session, line).replace("\n", " ")
    assert len(session.turns) == 1


def test_help_lists_every_command(shipped: tuple[Any, Any]) -> None:
    shown = talk(session_of(shipped), "/help")
    for name in ("file", "ask-full", "undo", "budget", "stats", "reset", "help", "quit"):
        assert f"/{name}" in shown


def test_documents(tmp_path: Path) -> None:
    assert "breakpoint" in help_text()
    path = tmp_path / "text"
    for content, message in ((b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"a\0", "zero bytes")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_document(path)
    with pytest.raises(InputError, match="cannot read"):
        load_document(tmp_path)


# -- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def generate(*arguments: str, **how: Any) -> Any:
    model = ["--model", str(SHIPPED), "--max-tokens", "6", "--budget", "128"]
    return runner.invoke(cli.app, ["generate", *model, *arguments], **how)


def test_generate(text: Path) -> None:
    question = "What is the value of amber?"
    plain = generate("--file", str(text), question)
    assert plain.exit_code == 0, plain.output
    piped = generate("--file", str(text), input=question)
    assert piped.stdout == plain.stdout
    printed = json.loads(generate("--file", str(text), "--json", question).stdout)
    assert printed["answer"] == plain.stdout.strip()
    assert printed["tokens"] > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "/no/such", "What?"], "cannot read /no/such"),
        (["--model", "/no/such", "What?"], "model /no/such: no such folder"),
        (["--budget", "3", "What?"], "budget_tokens=3"),
        ([" "], "the question is empty"),
    ],
)
def test_generate_says_what_is_wrong(arguments: list[str], message: str) -> None:
    done = generate(*arguments)
    assert done.exit_code == 1
    assert f"arkcache generate: {message}" in done.stderr
    assert "Traceback" not in done.output


PROMPT = r"\n> $"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the shipped model with no token that ends an answer: it says the same thing
    again and again until it is stopped."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(SHIPPED, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        ends = [key for key in ("eos_token_id", "eos_token") if settings.pop(key, None) is not None]
        assert ends
        (folder / name).write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize("more", [[], ["--live"]])
def test_a_chat_in_a_real_terminal(text: Path, endless: str, more: list[str]) -> None:
    """A question, Ctrl-C in an answer, a question after it, Ctrl-C at the prompt, Ctrl-D."""
    ends_never = ["--max-tokens", "100000", "--repetition-penalty", "1"]
    chat = ["--model", endless, "--file", str(text), "--budget", "128", *ends_never, *more]
    with Terminal("chat", *chat) as terminal:
        terminal.wait(PROMPT)
        assert "text.txt: " in terminal.shown
        terminal.write("What is the value of amber?\n")
        terminal.wait(r"(?s)amber\?\r\n.{20}")
        if more:
            terminal.wait(r"[\d,]+ tokens, device .* host [\d.]+ [KM]iB ")
        stopped = terminal.type("\x03", PROMPT)
        assert ("\x1b[2K" in stopped) == bool(more)  # the panel is wiped away
        assert "stopped; everything before is kept" in stopped
        assert "Traceback" not in terminal.shown
        assert "tokens held" in terminal.type("/stats\n", PROMPT)
        terminal.write("And of birch?\n")
        terminal.wait(r"(?s)birch\?\r\n.{20}")
        terminal.type("\x03", PROMPT)
        time.sleep(0.5)  # the prompt is shown before a line is waited for
        assert "Ctrl-D or /quit leaves" in terminal.type("\x03", PROMPT)
        assert terminal.leave() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_conversation_over_two_terminals(text: Path, endless: str, tmp_path: Path) -> None:
    """A question, Ctrl-C in the answer, save, quit; another process loads it and is asked again."""
    chat, folder = ["--model", endless, "--budget", "128"], tmp_path / "saved"
    with Terminal("chat", *chat, "--file", str(text), "--max-tokens", "100000") as terminal:
        terminal.wait(PROMPT)
        terminal.write("What is the value of amber?\n")
        terminal.wait(r"amber\?\r\n\s*\w")
        terminal.type("\x03", PROMPT)
        assert "tokens saved" in terminal.type(f"/save {folder}\n", PROMPT)
        assert terminal.leave() == 0
    expected = Session.load(*load_model(endless, torch.device("cpu"), "auto"), folder)
    answer = said(expected, "And of birch?", repetition_penalty=1.1).split()
    assert expected.cache.stats().pages_recalled > 0
    with Terminal("chat", *chat, "--load", str(folder), "--max-tokens", "12") as terminal:
        terminal.wait(PROMPT)
        assert "the last question was: What is the value of amber?" in terminal.shown
        shown = terminal.type("And of birch?\n", PROMPT)
        assert " ".join(answer) in " ".join(shown.split())
        assert terminal.leave() == 0
