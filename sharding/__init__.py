"""What the scripts stand on: one step of the flow from files to shards, and back, in each file.

Every script imports this before the other rooms, and the shell scripts run it by itself: so it
checks the version of Python for all of them, and any Python that there ever was can read it.
"""

import os
import sys

SCRIPTS = ("create_webdataset.py", "create_with_ray.py", "read_webdataset.py")


def is_our_command():
    # type: () -> bool
    """Tell whether one of our scripts runs, and not somebody's program that imports us."""
    main = sys.modules.get("__main__")
    script = os.path.realpath(getattr(main, "__file__", None) or os.devnull)
    here = os.path.dirname(os.path.realpath(__file__))
    beside = [os.path.join(os.path.dirname(here), name) for name in SCRIPTS]
    return script in beside or os.path.dirname(script) == here


def check_version():
    # type: () -> None
    """Refuse a Python that cannot read the other files."""
    version = sys.version_info
    if version >= (3, 10):
        return
    what = "Python 3.10 or newer is needed; this is "
    what += "%d.%d (%s)" % (version[0], version[1], sys.executable)  # noqa: UP031
    if not is_our_command() and sys.argv[:1] != ["-m"]:  # which does not tell yet what it runs
        raise ImportError(what)
    sys.stderr.write("error: " + what + "\n")
    raise SystemExit(2)


def quiet_interrupt():
    # type: () -> None
    """Let Ctrl-C end a script without a traceback while it imports the rest."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


check_version()
if __name__ != "__main__" and is_our_command():
    quiet_interrupt()
