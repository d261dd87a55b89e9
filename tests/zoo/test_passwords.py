"""The password of a study's database is written nowhere and still used."""

from __future__ import annotations

import sys

import pytest
import sqlalchemy

from tdmpc2_sb3.zoo import passwords

ADDRESS = "postgresql+psycopg://tuner:{}@database/optuna"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(passwords, "_hidden", False)
    for name in ("PGPASSWORD", "PGPASSFILE", "MYSQL_PWD", passwords.VARIABLE):
        monkeypatch.delenv(name, raising=False)


def used_after(monkeypatch, arguments: list[str], address: str) -> dict:
    """What the driver is given by an engine for the address after `hide` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rl_zoo3.train", *arguments])
    passwords.hide()
    seen: list[dict] = []

    def connect(dialect, record, arguments, options):
        seen.append(dict(options))
        raise ConnectionRefusedError

    engine = sqlalchemy.create_engine(address)
    sqlalchemy.event.listen(engine, "do_connect", connect)
    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    return seen[0]


@pytest.mark.parametrize("form", ["--storage {}", "--storage={}", "--stor {}"])
@pytest.mark.parametrize("written", ["p%40ss:w/rd", "secret", "a b", "a@b@c", "p'q\"r?#", "a+b"])
def test_it_leaves_the_arguments_and_comes_back_at_the_connection(monkeypatch, form, written):
    arguments = [part.format(ADDRESS.format(written)) for part in form.split(" ")]
    options = used_after(monkeypatch, arguments, ADDRESS.format("***"))
    assert options["password"] == written.replace("%40", "@")
    assert options["user"] == "tuner"
    for argv in (sys.argv, sys.orig_argv):
        assert written not in " ".join(argv)
        assert ADDRESS.format("***") in " ".join(argv)


def test_it_may_stand_in_the_query(monkeypatch):
    address = "postgresql+psycopg://database/optuna?user=tuner&password={}&connect_timeout=3"
    options = used_after(
        monkeypatch, ["--storage", address.format("secret")], address.format("***")
    )
    assert options["password"] == "secret"
    assert sys.argv[-1] == address.format("***")


def test_several_keep_their_places(monkeypatch):
    """As libpq's options: the query's win over the address', and a plus is a blank in them."""
    address = "postgresql+psycopg://tuner:{}@database/optuna?SSLpassword={}&user=x&token={}"
    options = used_after(
        monkeypatch,
        ["--storage", address.format("first", "a+b%26", "third")],
        address.format("***", "***", "***"),
    )
    assert options["password"] == "first"
    assert options["SSLpassword"] == "a b&"
    assert options["token"] == "third"
    assert sys.argv[-1] == address.format("***", "***", "***")


def test_the_last_of_two_options_counts(monkeypatch):
    first, last = ADDRESS.format("first"), ADDRESS.format("last")
    options = used_after(
        monkeypatch, ["--storage", first, f"--storage={last}"], ADDRESS.format("***")
    )
    assert options["password"] == "last"
    assert "first" not in " ".join([*sys.argv, *sys.orig_argv])


@pytest.mark.parametrize(
    "form", ["DRIVER=x;UID=u;PWD={};TDS=8", "DRIVER%3Dx%3BUID%3Du%3BPWD%3D{}%3BTDS%3D8", "Pwd={}"]
)
def test_a_string_of_odbc(form):
    address = f"mssql+pyodbc:///?odbc_connect={form}&x=1"
    masked, found = passwords._split(address.format("se%2540cret"))
    assert masked == address.format("***")
    assert list(found.values()) == ["se@cret"]


@pytest.mark.parametrize(
    "form", ["UID=u;PWD={};TDS=8", "UID%3Du%3BPWD%3D{}%3BTDS%3D8", "PWD={}&x=1"]
)
@pytest.mark.parametrize(("written", "is_percent"), [("{p;w=x}", False), ("%7Bp%3Bw%7D", True)])
def test_a_password_in_braces_may_hold_the_separator(form, written, is_percent):
    address = f"mssql+pyodbc:///?odbc_connect={form}"
    masked, found = passwords._split(address.format(written))
    assert masked == address.format("***")
    assert found == {"password": "{p;w}" if is_percent else "{p;w=x}"}


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("p%61ssword", "password"), ("PASS%57D", "PASSWD"), ("sslpassphrase", "sslpassphrase"),
        ("api_key", "api_key"), ("ApiKey", "ApiKey"), ("aws_secret_access_key",) * 2,
        ("credentials", "credentials"), ("auth-token", "auth-token"),
    ],
)  # fmt: skip
def test_names_of_secrets_in_other_spellings(entry, name):
    address = f"postgresql://host/db?x=1&{entry}={{}}&sslkey=client.key"
    masked, found = passwords._split(address.format("se%20cret+"))
    assert masked == address.format("***")
    assert found == {name: "se cret "}


def test_names_that_are_no_secrets():
    for name in ("sslkey", "keyboard", "passive", "tokens", "key", "author", "target"):
        assert not passwords.is_secret(name)


def test_a_masked_one_is_looked_for(monkeypatch, tmp_path):
    masked = ["--storage", ADDRESS.format("***")]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="is masked: set PGPASSWORD, PGPASSFILE or TDMPC2"):
        used_after(monkeypatch, masked, masked[1])
    monkeypatch.setattr(passwords, "_hidden", False)
    monkeypatch.setenv(passwords.VARIABLE, "from the variable")
    assert used_after(monkeypatch, masked, masked[1])["password"] == "from the variable"


@pytest.mark.parametrize(
    "storage", ["logs/tune.log", "sqlite:///study.db", "postgresql+psycopg://tuner@database/optuna"]
)
def test_addresses_without_one_stay(monkeypatch, storage):
    monkeypatch.setattr(sys, "argv", ["train", "--storage", storage])
    monkeypatch.setattr(sys, "orig_argv", ["python", "--storage", storage])
    passwords.hide()
    assert sys.argv[-1] == storage
    assert not passwords._hidden


def test_texts():
    text = "python train --storage mysql://me:secret@host/x -i 'http://you:hidden@there' --seed 3"
    assert passwords.mask(text) == (
        "python train --storage mysql://me:***@host/x -i 'http://you:***@there' --seed 3"
    )
