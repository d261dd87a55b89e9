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
from urllib.parse import unquote, unquote_plus

MASK = "***"

#: Holds the password of a masked address; for PostgreSQL its own variables and file do as well.
VARIABLE = "TDMPC2_SB3_STORAGE_PASSWORD"

# An address that is written by hand has passwords with any character, the @ included.
_IN_ADDRESS = re.compile(r"^([\w+.-]+://[^:/@]*:)([^@]*(?:@[^/?#@]*)*)(?=@)")
_IN_TEXT = re.compile(r"([\w+.-]+://[^\s:/@'\"]*:)([^\s/'\"]+)(?=@)")

#: Names of what is secret: entries of an address' query, such as `sslpassword`, and within
#: `odbc_connect`; arguments of environments.
_SECRET = (
    r"[\w.-]*(?:pass|passwd|password|passphrase|pwd|secret|token|credentials?"
    r"|(?:api|access|account|auth|private|secret)[_-]?key)"
)
_NAME = re.compile(_SECRET, re.I)
_IN_QUERY = re.compile(r"([?&]([^=&]+)=)([^&]*)")
_IN_ODBC = re.compile(
    rf"((?:[=;]|%3B|%3D)({_SECRET})(?:=|%3D))"
    r"((?:\{|%7B)(?:(?!\}|%7D)[^&])*(?:\}|%7D)|(?:(?!%3B)[^&;])*)",
    re.I,
)
_IN_TEXT_QUERY = re.compile(rf"((?:[?&;]|%3B){_SECRET}(?:=|%3D))((?:(?!%3B)[^&;#\s'\"])*)", re.I)

_hidden = False
_secrets: dict[str, str] = {}  # by the entry's name; "password" is the address' own


def is_secret(name: str) -> bool:
    """Say whether what has such a name, such as `api_key`, is to be told to nobody."""
    return _NAME.fullmatch(name) is not None


def mask(text: str) -> str:
    """Return a text with the passwords of all addresses in it masked."""
    return _IN_TEXT_QUERY.sub(rf"\1{MASK}", _IN_TEXT.sub(rf"\1{MASK}", text))


def mask_address(address: str) -> str:
    """Return an address of a database with its passwords masked."""
    return _split(address)[0]


def hide() -> None:
    """Mask the password of this process's `--storage`, and use it where it is needed.

    :raises SystemExit: if it is masked already and nobody can be asked
    """
    global _hidden
    if _hidden or multiprocessing.parent_process() is not None:
        return
    found: dict[str, str] = {}
    for argv in (sys.orig_argv, sys.argv):  # what argparse reads wins
        found.update(_mask_argument(argv))
    if not found:
        return
    _hidden = True
    _use(found, _find_password() if MASK in found.values() else None)


def _mask_argument(argv: list[str]) -> dict[str, str]:
    """Mask the option's value in place, and return the passwords that it had, by their names."""
    found: dict[str, str] = {}
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
        found.update(passwords)
    return found


def _split(address: str) -> tuple[str, dict[str, str]]:
    """The masked address, and what was masked as SQLAlchemy would read it, by name."""
    if "://" not in address:
        return address, {}
    found: dict[str, str] = {}

    def own(match: re.Match[str]) -> str:
        found["password"] = unquote(match.group(2))
        return match.group(1) + MASK

    def entry(match: re.Match[str]) -> str:
        name = unquote_plus(match.group(2))
        if not is_secret(name):
            return match.group()
        found[name] = unquote_plus(match.group(3))
        return match.group(1) + MASK

    def odbc(match: re.Match[str]) -> str:
        found["password"] = unquote_plus(unquote_plus(match.group(3)))
        return match.group(1) + MASK

    masked = _IN_ADDRESS.sub(own, address)
    before, mark, query = masked.partition("?")
    query = _IN_QUERY.sub(entry, mark + query)
    if "odbc_connect=" in query:
        query = _IN_ODBC.sub(odbc, query)
    return before + query, found


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


def _use(found: dict[str, str], looked_up: str | None) -> None:
    """Let SQLAlchemy connect with these passwords, and with the one looked up for a mask."""
    global _secrets
    known = {name: looked_up if value == MASK else value for name, value in found.items()}
    _secrets = {name: value for name, value in known.items() if value is not None}
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, "do_connect", _connect):
        event.listen(Engine, "do_connect", _connect)


def _connect(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    """Put the passwords into what SQLAlchemy hands to the database's driver."""
    own = _secrets.get("password")
    for name in [name for name, value in options.items() if value == MASK]:
        # Drivers have names of their own for the address' password.
        value = _secrets.get(name, own)
        if value is None:
            del options[name]
        else:
            options[name] = value
    for position, value in enumerate(arguments):
        if isinstance(value, str):  # drivers that take one string
            arguments[position] = value.replace(MASK, own or "")
