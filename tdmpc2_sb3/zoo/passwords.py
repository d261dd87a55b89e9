"""The password of a study's database: the zoo never sees it, so it is written nowhere.

The zoo writes its command line into `args.yml`, `command.txt`, the study and Weights & Biases. Here
the password in `--storage` gives way to a mask before the zoo reads its arguments, and comes back
where SQLAlchemy connects.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MASK = "***"

#: Holds the password of a masked address; for PostgreSQL its own variables and file do as well.
VARIABLE = "TDMPC2_SB3_STORAGE_PASSWORD"

_IN_ADDRESS = re.compile(r"^([\w+.-]+://[^:/@]*:)([^@]*)(?=@)")
_IN_QUERY = re.compile(r"([?&](?:password|passwd|pwd)=)([^&#\s'\"]*)")
_IN_TEXT = re.compile(r"([\w+.-]+://[^\s:/@'\"]*:)([^\s/'\"]+)(?=@)")

_hidden = False
_password: str | None = None


def mask(text: str) -> str:
    """Return a text with the passwords of all addresses in it masked."""
    return _IN_QUERY.sub(rf"\1{MASK}", _IN_TEXT.sub(rf"\1{MASK}", text))


def hide() -> None:
    """Mask the password of this process's `--storage`, and use it where it is needed.

    :raises SystemExit: if it is masked already and nobody can be asked
    """
    global _hidden
    if _hidden or multiprocessing.parent_process() is not None:
        return
    found = {password for argv in (sys.argv, sys.orig_argv) for password in _mask_argument(argv)}
    if not found:
        return
    _hidden = True
    _use(next((each for each in found if each != MASK), None) or _find_password())


def _mask_argument(argv: list[str]) -> list[str]:
    """Mask the option's value in place, and return the passwords that it had."""
    found = []
    for position, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        # argparse also accepts the option's unambiguous beginnings.
        if not (option.startswith("--sto") and "--storage".startswith(option)):
            continue
        if equals:
            masked, passwords = _split(value)
            argv[position] = f"{option}={masked}"
        elif position + 1 < len(argv):
            argv[position + 1], passwords = _split(argv[position + 1])
        else:
            continue
        found += passwords
    return found


def _split(address: str) -> tuple[str, list[str]]:
    passwords = [
        unquote(found.group(2))
        for pattern in (_IN_ADDRESS, _IN_QUERY)
        if "://" in address and (found := pattern.search(address))
    ]
    masked = _IN_QUERY.sub(rf"\1{MASK}", _IN_ADDRESS.sub(rf"\1{MASK}", address))
    return (masked, passwords) if passwords else (address, [])


def _find_password() -> str | None:
    """The password of a masked address; None if the database's driver finds it itself."""
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    own = {"PGPASSWORD", "PGPASSFILE", "MYSQL_PWD"} & os.environ.keys()
    if own or Path("~/.pgpass").expanduser().exists():
        return None
    if sys.stdin is not None and sys.stdin.isatty():
        return getpass.getpass("Password of the study's database (--storage): ")
    raise SystemExit(
        f"The password in --storage is masked: set PGPASSWORD, PGPASSFILE or {VARIABLE}, or write "
        "it in again."
    )


def _use(password: str | None) -> None:
    global _password
    _password = password
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, "do_connect", _connect):
        event.listen(Engine, "do_connect", _connect)


def _connect(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    """Put the password into what SQLAlchemy hands to the database's driver."""
    for name in [name for name, value in options.items() if value == MASK]:
        if _password is None:
            del options[name]
        else:
            options[name] = _password
    for position, value in enumerate(arguments):
        if isinstance(value, str):  # drivers that take one string
            arguments[position] = value.replace(MASK, _password or "")
