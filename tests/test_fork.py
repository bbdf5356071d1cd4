"""Processes that fork, that end, and code that interrupts itself.

Each case is a function that runs in an interpreter of its own, since what it does
to it is not for others; the test looks at what arrives and at what it said.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import werkzeug.serving

from apps import listed, metered
from openmeter_wsgi import delivery
from openmeter_wsgi.spool.server_directories import Server, assign
from servers import TIMEOUT, Consumer, Sink, environment, make_environ
from spooling import segments, server_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from openmeter_wsgi import OpenMeterMiddleware

FORKS: dict[str, Callable[[], int]] = {
    "python": os.fork,
    # Runs no hook of Python's. It keeps the GIL, as a server that forks in C does:
    # a child of one that does not may find it taken by a thread that it has not.
    "c": ctypes.PyDLL(None).fork,
}
EXITS: dict[str, Callable[[int], Any]] = {"_exit": os._exit, "sys_exit": sys.exit}
LATER = 3_600.0


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


def start(case: Callable[..., None], *arguments: str) -> subprocess.Popen[str]:
    call = f"import sys, test_fork; test_fork.{case.__name__}(*sys.argv[1:])"
    return start_code(call, *arguments)


#: Newer interpreters warn of things that are tested here: forks with threads, processes
#: that end with a connection.
_QUIET = (
    ("-W", "ignore:This process:DeprecationWarning", "-W", "ignore:unclosed")
    if sys.version_info >= (3, 12)
    else ()
)


def start_code(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-X", "dev", *_QUIET, "-c", code, *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, errors: str = "") -> str:
    """Wait for the end of a case, which must be quiet and well; return its output."""
    with process:
        try:
            output, said = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            # Its children too: they hold the pipes open.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, said
    if errors:
        assert errors in said
    else:
        assert said == ""
    return output


def run(case: Callable[..., None], *arguments: str) -> str:
    return finish(start(case, *arguments))


def assert_billed_once(sink: Sink, *subjects: str) -> None:
    assert sink.subjects() == Counter(subjects)
    assert sink.repeated() == []


def serve(middleware: OpenMeterMiddleware, subject: str) -> None:
    consumer = Consumer().serve(middleware, make_environ(HTTP_X_SUBJECT=subject))
    assert consumer.body == [b"all at once"]
    assert consumer.raised is consumer.raised_by_close is None


def wait_until_threads_sleep() -> None:
    """Wait until no other thread runs, or wants to.

    Only then may C fork: the interpreter's own lock is not made anew in the child,
    where its waiters are no more.
    """
    main = threading.get_ident()
    before: object = None
    while True:
        frames = [f for t, f in sys._current_frames().items() if t != main]
        now = [(id(frame), frame.f_lasti) for frame in frames]
        if now == before and all(f.f_code.co_name == "wait" for f in frames):
            return
        before = now
        del frames
        threading.Event().wait(0.01)


def wait_for(*children: int) -> None:
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0


# -- Forks


def fork_after_use(url: str, fork: str, leave: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    serve(middleware, "parent-1")
    children = []
    for n in range(2):
        wait_until_threads_sleep()
        child = FORKS[fork]()
        if child == 0:
            assert middleware.stats().waiting == middleware.stats().settled == 0
            serve(middleware, f"child-{n}")
            assert middleware.stats().waiting == middleware.stats().settled == 1
            if leave == "_exit":
                middleware.close()
            EXITS[leave](0)
        children.append(child)
    serve(middleware, "parent-2")
    wait_for(*children)
    assert middleware.stats().settled == 2


@pytest.mark.parametrize("leave", EXITS)
@pytest.mark.parametrize("fork", FORKS)
def test_parent_and_children_each_deliver_their_own(
    sink: Sink, fork: str, leave: str
) -> None:
    run(fork_after_use, sink.url, fork, leave)

    assert_billed_once(sink, "parent-1", "child-0", "child-1", "parent-2")


def fork_before_use(url: str, fork: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    child = FORKS[fork]()
    serve(middleware, "parent" if child else "child")
    if child:
        wait_for(child)


@pytest.mark.parametrize("fork", FORKS)
def test_what_was_made_before_a_fork_works_in_both(sink: Sink, fork: str) -> None:
    run(fork_before_use, sink.url, fork)

    assert_billed_once(sink, "parent", "child")


def fork_in_a_child(url: str, fork: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    serve(middleware, "parent")
    wait_until_threads_sleep()
    child = FORKS[fork]()
    if child == 0:
        serve(middleware, "child")
        wait_until_threads_sleep()
        grandchild = FORKS[fork]()
        serve(middleware, "child" if grandchild else "grandchild")
        if grandchild:
            wait_for(grandchild)
        sys.exit(0)
    wait_for(child)


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_of_a_child_delivers_its_own(sink: Sink, fork: str) -> None:
    run(fork_in_a_child, sink.url, fork)

    assert_billed_once(sink, "parent", "child", "child", "grandchild")


def fork_while_sending(url: str, fork: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=0.01)
    serve(middleware, "parent-1")
    sys.stdin.readline()  # the sink has the event, and does not answer
    child = FORKS[fork]()
    if child == 0:
        serve(middleware, "child")
        middleware.close()
        os._exit(0)
    print("forked", flush=True)  # noqa: T201
    wait_for(child)
    serve(middleware, "parent-2")
    assert middleware.flush(TIMEOUT)


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_in_the_middle_of_a_post_leaves_it_to_the_parent(
    sink: Sink, fork: str
) -> None:
    sink.answering.clear()
    process = start(fork_while_sending, sink.url, fork)
    assert process.stdin
    assert process.stdout

    assert sink.received.wait(TIMEOUT)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "forked\n"
    sink.answering.set()
    finish(process)

    assert_billed_once(sink, "parent-1", "child", "parent-2")


def fork_in_a_response(url: str, fork: str, end: str) -> None:
    middleware = metered(listed, api_url=url, batch_size=1)
    environ = make_environ(HTTP_X_SUBJECT="parent")
    response: Any = middleware(environ, Consumer().start_response)
    next(iter(response))
    child = FORKS[fork]()
    if end == "close" or child:
        response.close()
    del response, environ
    gc.collect()
    if child:
        wait_for(child)
    else:
        serve(middleware, "child")
        assert middleware.flush(TIMEOUT)
        assert middleware.stats().settled == 1


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.parametrize("fork", FORKS)
def test_a_response_under_way_at_a_fork_is_billed_by_the_parent_alone(
    sink: Sink, fork: str, end: str
) -> None:
    run(fork_in_a_response, sink.url, fork, end)

    assert_billed_once(sink, "parent", "child")


def fork_by_multiprocessing(url: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    serve(middleware, "parent")

    def work() -> None:
        serve(middleware, "child")
        assert middleware.flush(TIMEOUT)  # multiprocessing skips what atexit knows

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_child_of_multiprocessing_delivers_its_own(sink: Sink) -> None:
    run(fork_by_multiprocessing, sink.url)

    assert_billed_once(sink, "parent", "child")


def work_and_end(url: str, spool: str, ready: Any) -> None:
    middleware = metered(
        listed, api_url=url, flush_interval=LATER, spool_dir=spool or None
    )
    for n in range(3):
        serve(middleware, f"child-{n}")
    ready.set()
    if ready.terminated:
        threading.Event().wait()


class Ready:
    """Callable that reports to the parent that a child has served; can be pickled."""

    def __init__(self, context: Any, *, terminated: bool) -> None:
        self._event = context.Event()
        self.terminated = terminated

    def set(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(TIMEOUT)


def end_by_multiprocessing(method: str, url: str, spool: str, end: str) -> None:
    context: Any = multiprocessing.get_context(method)
    if end == "pool":
        ready = Ready(context.Manager(), terminated=False)
        with context.Pool(1) as pool:
            pool.apply(work_and_end, (url, spool, ready))
            pool.close()
            pool.join()
        return
    ready = Ready(context, terminated=end == "terminate")
    process = context.Process(target=work_and_end, args=(url, spool, ready))
    process.start()
    ready.wait()
    if end == "terminate":
        process.terminate()
    process.join()
    assert process.exitcode == (-signal.SIGTERM if end == "terminate" else 0)


METHODS = ["fork", "forkserver", "spawn"]


@pytest.mark.parametrize("end", ["returns", "pool"])
@pytest.mark.parametrize("method", METHODS)
def test_a_child_of_multiprocessing_that_ends_by_itself_delivers_what_it_has(
    sink: Sink, method: str, end: str
) -> None:
    run(end_by_multiprocessing, method, sink.url, "", end)

    assert_billed_once(sink, "child-0", "child-1", "child-2")


@pytest.mark.parametrize("method", METHODS)
def test_a_child_of_multiprocessing_that_is_terminated_loses_nothing_of_a_spool(
    sink: Sink, method: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    case = start(end_by_multiprocessing, method, sink.url, str(spool), "terminate")
    with case:
        _, said = case.communicate(timeout=TIMEOUT)
    assert case.returncode == 0, said
    # The child may be terminated before or after it has logged this.
    assert all("it is not known if OpenMeter" in line for line in said.splitlines())

    other = metered(listed, api_url=sink.url, spool_dir=str(spool))
    try:
        serve(other, "other")
        assert other.flush(TIMEOUT)
    finally:
        other.close()
    assert_billed_once(sink, "child-0", "child-1", "child-2", "other")


def serve_by_a_process_a_request(url: str) -> None:
    server = werkzeug.serving.make_server(
        "127.0.0.1", 0, metered(listed, api_url=url), processes=2
    )
    server.log = lambda *_: None  # type: ignore[method-assign]
    ask = threading.Thread(
        target=urllib.request.urlopen, args=(f"http://127.0.0.1:{server.port}/",)
    )
    ask.start()
    server.handle_request()
    ask.join()
    server.server_close()


def test_a_process_that_runs_no_exit_hook_says_that_it_loses_what_it_has(
    sink: Sink,
) -> None:
    process = start(serve_by_a_process_a_request, sink.url)

    finish(process, errors="this server ends its processes without exit hooks")


def fork_among_threads(url: str) -> None:
    """Fork again and again while other threads are served.

    Between two forks they are served so many requests and no more: a machine that
    serves faster than it delivers would fill the queue.
    """
    middleware = metered(listed, api_url=url, flush_interval=0.001, batch_size=2)
    stop, begun = threading.Event(), threading.Event()
    allowed = threading.Semaphore(0)
    served = Counter[str]()

    def work(name: str) -> None:
        while allowed.acquire() and not stop.is_set():
            serve(middleware, name)
            served[name] += 1
            begun.set()

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for n in range(30):
        begun.clear()
        allowed.release(50)
        assert begun.wait(TIMEOUT)
        child = os.fork()
        if child == 0:
            serve(middleware, f"child-{n}")
            middleware.close(TIMEOUT)
            os._exit(0)
        wait_for(child)
    stop.set()
    allowed.release(len(threads))
    for thread in threads:
        thread.join()
    middleware.close(TIMEOUT)
    print(*(f"{name}={number}" for name, number in served.items()))  # noqa: T201


def test_forks_among_busy_threads_neither_hang_nor_lose(sink: Sink) -> None:
    output = run(fork_among_threads, sink.url)

    expected = {name: int(n) for name, n in (p.split("=") for p in output.split())}
    expected |= {f"child-{n}": 1 for n in range(30)}
    assert sink.subjects() == Counter(expected)
    assert sink.repeated() == []


def fork_after_use_of_a_spool(directory: str, fork: str) -> None:
    middleware = metered(
        listed,
        api_url="http://127.0.0.1:9",
        spool_dir=directory,
        flush_interval=LATER,
        shutdown_timeout=0.0,
    )
    serve(middleware, "parent-before")
    children = []
    for n in range(2):
        wait_until_threads_sleep()
        child = FORKS[fork]()
        if child == 0:
            serve(middleware, f"child-{n}")
            os._exit(0)
        children.append(child)
    serve(middleware, "parent-after")
    wait_for(*children)


@pytest.mark.parametrize("fork", FORKS)
def test_children_of_a_used_middleware_write_ids_and_segments_of_their_own(
    sink: Sink, fork: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    case = start(fork_after_use_of_a_spool, str(spool), fork)
    finish(case, errors="it is not known if OpenMeter")

    subjects: dict[str, list[str]] = defaultdict(list)
    for path in segments(spool):
        for line in path.read_bytes().rstrip(b"\0").split():
            subjects[path.name.split("-")[1]].append(json.loads(line)["subject"])
    assert sorted(subjects.values()) == [
        ["child-0"], ["child-1"], ["parent-before", "parent-after"],
    ]  # fmt: skip
    assign(server_dir(spool), Server(sink.url))
    other = metered(listed, api_url=sink.url, spool_dir=str(spool))
    try:
        serve(other, "other")
        assert other.flush(TIMEOUT)
    finally:
        other.close()
    # By their ids: of two events under one id OpenMeter would drop one.
    assert_billed_once(
        sink, "parent-before", "child-0", "child-1", "parent-after", "other"
    )


# -- Code that interrupts itself


def put_inside_put(url: str) -> None:
    """Drop a response, which settles it, before each line of a put in turn.

    A finaliser may run anywhere; here it runs everywhere, also in the first put,
    which starts the thread, and in all that a put calls.
    """
    rooms = (os.path.dirname(delivery.__file__), threading.__file__)
    interrupted_at = 0
    for fresh in (True, False):
        stop_at = 0
        middleware = None
        while True:
            if fresh or middleware is None:
                middleware = metered(listed, api_url=url, batch_size=1)
            if not fresh:
                serve(middleware, "first")
                assert middleware.flush(TIMEOUT)
            if not _put_interrupted(middleware, rooms, stop_at):
                break
            assert middleware.flush(TIMEOUT)
            if fresh:
                middleware.close()
            stop_at += 1
        interrupted_at += stop_at
        middleware.close()
    print(interrupted_at)  # noqa: T201


def _put_interrupted(
    middleware: OpenMeterMiddleware, rooms: tuple[str, ...], stop_at: int
) -> bool:
    """Serve; before the line *stop_at* let another response be settled."""
    environ = make_environ(HTTP_X_SUBJECT="inner")
    responses = [middleware(environ, Consumer().start_response)]
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(rooms):
            return trace
        if event in ("line", "return"):
            if lines == stop_at:
                responses.clear()
            lines += 1
        return trace

    outer = middleware(make_environ(HTTP_X_SUBJECT="outer"), Consumer().start_response)
    sys.settrace(trace)
    try:
        outer.close()  # type: ignore[attr-defined]
    finally:
        sys.settrace(None)
    interrupted = not responses
    responses.clear()
    return interrupted


def test_a_put_that_interrupts_a_put_waits_for_nothing(sink: Sink) -> None:
    interrupted_at = int(run(put_inside_put, sink.url))

    assert interrupted_at > 20
    subjects = sink.subjects()
    # The last round of each kind comes after the last line: nothing interrupted it.
    assert subjects["inner"] == subjects["outer"] == interrupted_at + 2
    assert sink.repeated() == []


# -- The end of the interpreter


def serve_at_exit(url: str, registered: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    if registered == "before":
        atexit.register(serve, middleware, "late")
    serve(middleware, "early")
    if registered == "after":
        atexit.register(serve, middleware, "late")


def test_a_request_at_exit_is_delivered(sink: Sink) -> None:
    run(serve_at_exit, sink.url, "after")

    assert_billed_once(sink, "early", "late")


def test_a_request_after_the_last_delivery_is_lost_and_said_to_be(sink: Sink) -> None:
    process = start(serve_at_exit, sink.url, "before")

    finish(
        process, errors="the process is ending; events that come now are not delivered"
    )
    assert_billed_once(sink, "early")


def serve_after_main(url: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)

    def work() -> None:
        threading.main_thread().join()
        serve(middleware, "thread")

    threading.Thread(target=work).start()
    serve(middleware, "main")


def test_a_thread_that_outlives_the_main_one_is_delivered(sink: Sink) -> None:
    run(serve_after_main, sink.url)

    assert_billed_once(sink, "main", "thread")


def drop_in_teardown(url: str, *before: str) -> None:
    middleware = metered(listed, api_url=url, flush_interval=LATER)
    for subject in before:
        serve(middleware, subject)
    environ = make_environ(HTTP_X_SUBJECT="held")
    response = middleware(environ, Consumer().start_response)
    module: Any = sys.modules[__name__]
    module.held = response, environ


@pytest.mark.parametrize("before", [(), ("served",)], ids=["first", "later"])
def test_a_response_that_modules_hold_to_the_end_is_lost_and_said_to_be(
    sink: Sink, before: tuple[str, ...]
) -> None:
    process = start(drop_in_teardown, sink.url, *before)

    finish(
        process, errors="the process is ending; events that come now are not delivered"
    )
    assert_billed_once(sink, *before)


def exit_while_away(url: str) -> None:
    middleware = metered(listed, api_url=url, shutdown_timeout=0.2)
    serve(middleware, "served")


def test_an_exit_does_not_wait_for_an_openmeter_that_does_not_answer(
    sink: Sink,
) -> None:
    sink.answering.clear()
    process = start(exit_while_away, sink.url)
    try:
        finish(process, errors="1 events could not be delivered")
    finally:
        sink.answering.set()


# -- Imports


#: Imports as little as possible, since an earlier import would hide a later one.
IMPORT_NOTHING = """
import os, sys
from wsgiref.util import setup_testing_defaults
from openmeter_wsgi import OpenMeterMiddleware, add_meters

def app(environ, start_response):
    add_meters(environ, {"tokens": 5})
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"body"]

def serve():
    environ = {"REMOTE_USER": "acme"}
    setup_testing_defaults(environ)
    response = middleware(environ, lambda status, headers: None)
    list(response)
    response.close()
    return middleware.flush(float(sys.argv[2]))

middleware = OpenMeterMiddleware(app, meters={"requests": 1}, api_url=sys.argv[1])
imported = []
sys.addaudithook(lambda event, args: event == "import" and imported.append(args[0]))
for _ in range(3):
    serve()
print(*imported, end="", flush=True)
os._exit(0)
"""


def test_a_request_and_its_delivery_to_a_named_host_import_nothing(sink: Sink) -> None:
    url = sink.url.replace("127.0.0.1", "localhost")

    assert finish(start_code(IMPORT_NOTHING, url, "30")) == ""
    assert sink.subjects() == Counter({"acme": 6})


def test_a_delivery_that_fails_imports_nothing() -> None:
    with Sink() as closed:
        url = closed.url.replace("127.0.0.1", "localhost")

    process = start_code(IMPORT_NOTHING, url, "0.3")

    assert finish(process, errors="OpenMeter did not answer") == ""
