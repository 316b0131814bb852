"""A signal ends a command whatever it is doing: the moments at which Python loses one, each brought about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fullpipe.threads import beside

# What a command does when the signal comes to it. `hit` sends it; `on` says that the command goes on.
MOMENTS = {
    "plainly": "hit(); on()",
    # every import ends in a weakref's callback (importlib._bootstrap._get_module_lock), and what is raised there is
    # dropped: this is how `pull` lost a SIGTERM
    "in a weakref's callback": """
one = Thing()
ref = weakref.ref(one, lambda _: hit())
del one
on()""",
    "in a __del__": """
Thing.__del__ = lambda self: hit()
Thing()
on()""",
    "where everything is caught": """
try: hit()
except BaseException: pass
on()""",
    "where it becomes another error": """
try: hit()
except BaseException as error: raise RuntimeError("another") from error""",
    "twice": """
for _ in range(2):
    try: hit()
    except BaseException: pass
on()""",
    "behind an acquire, which nobody undoes": """
lock = threading.Lock()
try:
    lock.acquire()
    hit()
finally:
    lock.acquire()""",
    "while it cleans up for ever": """
try: hit()
finally: time.sleep(99)""",
    "with a child, which holds our output open": """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
try: hit()
finally: time.sleep(99)""",
    "with a reader that has stalled": """
end, other = os.pipe()
os.set_blocking(other, False)
with contextlib.suppress(BlockingIOError):
    while True: os.write(other, bytes(65536))
os.set_blocking(other, True)
os.dup2(other, 1)
threading.Timer(0.1, hit).start()
sys.stdout.write("x" * 10)
sys.stdout.flush()""",
}
PRELUDE = """
import contextlib, os, signal, subprocess, sys, threading, time, weakref
from fullpipe.cli import stopping

stopping._GRACE_S = 0.5
number = int(sys.argv[1])

class Thing: pass

def hit():
    os.kill(os.getpid(), number)
    time.sleep(0)

def on():
    time.sleep(30)
    print("went on")

def command():
"""


def ended(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Its end, and that of all that hold its output open."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          timeout=25)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_no_moment_loses_it(moment: str, number: signal.Signals) -> None:
    body = "".join(f"    {line}\n" for line in MOMENTS[moment].splitlines())
    done = ended(f"{PRELUDE}{body}\nstopping.run(command)", int(number))
    assert done.returncode == 128 + number, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_who_handles_it_is_left_in_peace() -> None:
    """A load shows its table, a generation its last words, for as long as it takes: they do it inside the `except`."""
    done = ended(PRELUDE + """
    try: hit()
    except BaseException:
        end = time.monotonic() + 0.4  # several looks
        while time.monotonic() < end: time.sleep(0.01)
        print("last words", flush=True)
        raise
stopping.run(command)""", int(signal.SIGTERM))
    assert (done.returncode, done.stdout, done.stderr) == (143, "last words\n", "")


def test_what_must_not_be_divided_is_done_first() -> None:
    done = ended(PRELUDE + """
    stopping.undivided(lambda: (hit(), print("whole", flush=True)))
    time.sleep(9)
    print("on")
stopping.run(command)""", int(signal.SIGINT))
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n", "")


def test_a_second_signal_ends_at_once_and_a_double_does_not() -> None:
    """`timeout` sends its signal to the process and then to its group."""
    done = ended(PRELUDE + """
    stopping._GRACE_S, stopping.SAME_S = 99, 0.3
    try: hit()
    finally:
        hit()
        print("not yet", flush=True)
        time.sleep(0.4)
        hit()
        time.sleep(99)
stopping.run(command)""", int(signal.SIGINT))
    assert (done.returncode, done.stdout, done.stderr) == (130, "not yet\n", "")


def test_what_is_not_a_signal_ends_as_ever() -> None:
    for body, code in (("pass", 0), ("sys.exit(5)", 5)):
        assert ended(f"{PRELUDE}    {body}\nstopping.run(command)", int(signal.SIGINT)).returncode == code


def test_a_signal_that_comes_when_all_is_done_kills() -> None:
    done = ended(PRELUDE + "    pass\nstopping.run(command)\nhit()\nprint('on')", int(signal.SIGINT))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_one_that_was_ignored_stays_so() -> None:
    """As under `nohup`, or behind `&` in a script."""
    done = ended("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + PRELUDE
                 + "    hit()\n    print('on')\nstopping.run(command)", int(signal.SIGINT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_what_others_drop_is_still_reported() -> None:
    done = ended(PRELUDE + "    Thing.__del__ = lambda self: 1 / 0\n    Thing()\nstopping.run(command)",
                 int(signal.SIGINT))
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, "-m", "fullpipe", "models"], capture_output=True, text=True, timeout=25,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]])})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# ---- work that no signal tears ---------------------------------------------------------------------------------------


def test_work_is_done_beside() -> None:
    turns: list[int] = []
    found = beside(lambda: time.sleep(0.05) or threading.get_ident(), stop=lambda: None,
                   meanwhile=lambda: turns.append(1), every_s=0.01)
    assert found != threading.get_ident() and turns


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        beside(lambda: 1 / 0, stop=lambda: None)


def test_an_exception_stops_the_work_and_waits_for_its_end() -> None:
    wanted, ends = [True], []

    def work() -> None:
        while wanted:
            time.sleep(0.001)
        ends.append(1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beside(work, stop=wanted.clear, meanwhile=interrupt, every_s=0.001)
    assert ends
