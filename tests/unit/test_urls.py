"""Every form of URL becomes what the driver takes, and no password gets out."""

from __future__ import annotations

import traceback
from typing import Any
from urllib.parse import quote

import pytest
from asyncpg import connect_utils
from hypothesis import example, given
from hypothesis import strategies as st

from msr.errors import ConfigError
from msr.urls import DatabaseUrl, parse_url

SECRET = "hunter2"


def asyncpg_reads(dsn: str) -> tuple[list[Any], Any]:
    """The addresses and parameters that asyncpg finds in a DSN."""
    nothing = dict.fromkeys(
        (
            *("host", "port", "user", "password", "passfile", "database", "ssl", "service"),
            *("servicefile", "direct_tls", "server_settings", "target_session_attrs"),
            *("krbsrvname", "gsslib"),
        )
    )
    addresses, parameters = connect_utils._parse_connect_dsn_and_args(dsn=dsn, **nothing)
    return addresses, parameters


def refused(url: Any, source: str = "argument") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_url(url, source)
    error = caught.value
    assert (error.key, error.source) == ("url", source)
    assert str(error).startswith(f"{source}: url: ")
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def everything_shown(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "".join((str(error), repr(error), repr(error.args), repr(vars(error)), *lines))


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("postgresql://u:p@h:5433/db", "postgresql://u:p@h:5433/db"),
        ("postgres://u:p@h/db", "postgresql://u:p@h/db"),
        ("postgresql+asyncpg://u:p@h/db", "postgresql://u:p@h/db"),
        ("postgresql+psycopg2://u:p@h/db", "postgresql://u:p@h/db"),
        ("PostgreSQL+psycopg://u@h/db", "postgresql://u@h/db"),
        ("  postgresql://h/db\n", "postgresql://h/db"),
        ("postgresql://", "postgresql://"),
        ("postgresql:///db", "postgresql:///db"),
        ("postgresql://h", "postgresql://h"),
        ("postgresql://:p@h/db", "postgresql://:p@h/db"),
        ("postgresql://u:@h/db", "postgresql://u@h/db"),
        ("postgresql://u:a:b@h/db", "postgresql://u:a%3Ab@h/db"),
        ("postgresql://u:p%40%2Fq@h/my%20db", "postgresql://u:p%40%2Fq@h/my%20db"),
        ("postgresql://h1:1,h2:2/db", "postgresql://h1:1,h2:2/db"),
        ("postgresql://u@%2Frun%2Fpg:5433/db", "postgresql://u@%2Frun%2Fpg:5433/db"),
        ("postgresql://u@:5433/db", "postgresql://u@/db?port=5433"),
        ("postgresql://h/db?port=5433", "postgresql://h:5433/db"),
        ("postgresql://h1,h2/db?port=5433", "postgresql://h1:5433,h2:5433/db"),
        ("postgresql:///db?port=5433", "postgresql:///db?port=5433"),
        ("postgresql://h/db?application_name=", "postgresql://h/db"),
        ("postgresql://h/db?", "postgresql://h/db"),
    ],
)
def test_postgresql_urls_are_normalised(url: str, dsn: str) -> None:
    assert parse_url(url) == DatabaseUrl("postgresql", dsn, None, None, parse_url(url).display)
    assert parse_url(url).dsn == dsn


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("postgresql://h:5433/db", [("h", 5433)]),
        ("postgresql://[::1]:5433/db", [("::1", 5433)]),
        ("postgresql://[::1],[fe80::1%25eth0]:1/db", [("::1", 5432), ("fe80::1%eth0", 1)]),
        ("postgresql://h1,h2:5433/db", [("h1", 5432), ("h2", 5433)]),
        ("postgresql://%2Frun%2Fpg:5433/db", ["/run/pg/.s.PGSQL.5433"]),
        ("postgresql:///db?host=/run/pg", ["/run/pg/.s.PGSQL.5432"]),
        ("postgresql:///db?host=/run/pg&port=5433", ["/run/pg/.s.PGSQL.5433"]),
        ("postgresql:///db?host=::1&port=5433", [("::1", 5433)]),
        ("postgresql://localhost:1/db?host=/run/pg", ["/run/pg/.s.PGSQL.5432"]),
        ("postgresql:///db?host=h1:1&host=h2:2", [("h1", 1), ("h2", 2)]),
        ("postgresql:///db?host=h1,h2&port=1,2", [("h1", 1), ("h2", 2)]),
        ("postgresql:///db?hostaddr=10.0.0.1", [("10.0.0.1", 5432)]),
        ("postgresql://h/db?hostaddr=10.0.0.1", [("h", 5432)]),
        ("postgresql://h:1/db?port=2", [("h", 2)]),
    ],
)
def test_asyncpg_connects_where_libpq_would(url: str, addresses: list[Any]) -> None:
    assert asyncpg_reads(parse_url(url).dsn)[0] == addresses


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        *(
            (f"{name}=1", "")
            for name in (
                *("channel_binding", "keepalives", "keepalives_idle", "keepalives_interval"),
                *("keepalives_count", "gssencmode", "tcp_user_timeout", "client_encoding"),
                *("prepared_statement_cache_size", "statement_cache_size", "async_fallback"),
                *("command_timeout", "require_auth", "load_balance_hosts", "pgbouncer"),
                *("scram_client_key", "oauth_client_secret", "connect_timeout", "timeout"),
            )
        ),
        *(
            (pair, pair)
            for pair in (
                *("sslmode=verify-full", "sslrootcert=ca.pem", "sslcert=c.pem", "sslkey=k.pem"),
                *("sslnegotiation=direct", "target_session_attrs=read-write", "service=s"),
                *("application_name=app", "options=-c%20search_path%3Dfoo", "passfile=f"),
                *("search_path=foo", "statement_timeout=5s", "ssl_min_protocol_version=TLSv1.3"),
            )
        ),
        ("options=-c+search_path%3Dfoo", "options=-c%20search_path%3Dfoo"),
        ("ssl=require", "sslmode=require"),
        ("ssl=true", "sslmode=require"),
        ("ssl=False", "sslmode=disable"),
        ("ssl=prefer&sslmode=require", "sslmode=require"),
        ("fallback_application_name=app", "application_name=app"),
        ("fallback_application_name=a&application_name=b", "application_name=b"),
        ("application_name=a&application_name=b", "application_name=b"),
    ],
)
def test_parameters_are_kept_translated_or_dropped(query: str, kept: str) -> None:
    dsn = parse_url(f"postgresql://h/db?{query}").dsn
    assert dsn == "postgresql://h/db" + (f"?{kept}" if kept else "")


def test_asyncpg_gets_only_server_settings_that_are_ones() -> None:
    url = (
        "postgresql+asyncpg://u:p@h/db?sslmode=require&channel_binding=require&keepalives=1"
        "&target_session_attrs=read-write&application_name=app&search_path=foo&prepare_threshold=0"
    )
    _, parameters = asyncpg_reads(parse_url(url).dsn)
    assert parameters.server_settings == {"application_name": "app", "search_path": "foo"}
    assert parameters.sslmode is connect_utils.SSLMode.require
    assert parameters.target_session_attrs is connect_utils.SessionAttribute.read_write


def test_the_query_wins_over_what_stands_before_it() -> None:
    url = "postgresql://u:p@h/db?user=you&password=secret&dbname=other"
    _, parameters = asyncpg_reads(parse_url(url).dsn)
    assert (parameters.user, parameters.password) == ("you", "secret")
    assert parameters.database == "other"
    assert parse_url("postgresql://h/db?database=other").dsn == "postgresql://h/other"


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("", None),
        ("connect_timeout=5", 5.0),
        ("connect_timeout=2.5", 2.5),
        ("connect_timeout=0", None),
        ("connect_timeout=-1", None),
        ("timeout=7", 7.0),
        ("timeout=7&connect_timeout=5", 5.0),
    ],
)
def test_connect_timeout_is_in_seconds(query: str, seconds: float | None) -> None:
    assert parse_url(f"postgresql://h/db?{query}").connect_timeout == seconds


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///rel.db", "rel.db"),
        ("sqlite:///./a/rel.db", "./a/rel.db"),
        ("sqlite:////abs.db", "/abs.db"),
        ("sqlite+aiosqlite:///rel.db", "rel.db"),
        ("sqlite+aiosqlite:////srv/abs.db", "/srv/abs.db"),
        ("sqlite+pysqlite:///rel.db", "rel.db"),
        ("SQLite:///rel.db", "rel.db"),
        ("sqlite:///C:/data/app.db", "C:/data/app.db"),
        ("sqlite:///my%20app%3F.db", "my app?.db"),
        ("sqlite:///a#b@c.db", "a#b@c.db"),
    ],
)
def test_sqlite_files(url: str, path: str) -> None:
    parsed = parse_url(url)
    assert (parsed.dialect, parsed.path) == ("sqlite", path)
    assert parsed.display == "sqlite:///" + url.partition(":///")[2]


@pytest.mark.parametrize("rest", ["", "/", ":memory:", "/:memory:"])
@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite"])
def test_sqlite_in_memory(scheme: str, rest: str) -> None:
    memory = "sqlite://:memory:"
    assert parse_url(f"{scheme}://{rest}") == DatabaseUrl("sqlite", memory, None, None, memory)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://u:hunter2@h/db", "unknown scheme 'mysql'; the URL must start with postgresql://"),
        ("sqlite3:///hunter2.db", "unknown scheme 'sqlite3'"),
        ("hunter2", "it must start with postgresql://"),
        ("", "it must start with postgresql://"),
        ("postgresql:/u:hunter2@h/db", "it must start with postgresql://"),
        ("u:hunter2+x://h/db", "it must start with postgresql://"),
        ("sqlite://hunter2.db", "three slashes"),
        ("sqlite://u:hunter2@h/x.db", "three slashes"),
        ("sqlite:///x.db?mode=hunter2", "parameter 'mode' is not supported"),
        ("sqlite:///x.db?hunter2", "text after '?' is not supported"),
        ("sqlite:///hunter2%zz.db", "percent-encode"),
        ("sqlite:///hunter2%00.db", "percent-encode"),
        ("postgresql://h/db?connect_timeout=hunter2", "connect_timeout in the URL must be"),
        ("postgresql://h/db?connect_timeout=nan", "connect_timeout in the URL must be"),
        ("postgresql://h/db?sslmode=hunter2", "one of disable, allow, prefer, require, verify-ca"),
        ("postgresql://h/db?ssl=hunter2", "sslmode in the URL must be one of"),
        ("postgresql://h/db?target_session_attrs=hunter2", "must be one of any, primary"),
        ("postgresql://h1,h2,h3/db?port=1,2", "one port, or one for each host"),
        *(
            (url, "percent-encode special characters in the password")
            for url in (
                "postgresql://u:hunter2",
                "postgresql://u:/hunter2@h/db",
                "postgresql://u:hunter2/1@h/db",
                "postgresql://u:12/hunter2@h/db",
                "postgresql://u:12#hunter2@h/db",
                "postgresql://u:12?hunter2@h/db",
                "postgresql://u:12?a=hunter2@h/db",
                "postgresql://u:12@hunter2@h/db",
                "postgresql://u:a@hunter2/c@h/db",
                "postgresql://u:a@hunter2?c=d@h/db",
                "postgresql://u:50%hunter2@h/db",
                "postgresql://u:hunter2%ff@h/db",
                "postgresql://u:hunter2%00@h/db",
                "postgresql://u:hunter2\t@h/db",
                "postgresql://u:hunter2\udcff@h/db",
                "postgresql://u:hunter2@::1/db",
                "postgresql://u:hunter2@[::1/db",
                "postgresql://u:hunter2@h]/db",
                "postgresql://u:hunter2@h1,,h2/db",
                "postgresql://u:hunter2@h:0/db",
                "postgresql://u:hunter2@h:65536/db",
                "postgresql://u:hunter2@h:123456/db",
                "postgresql://h/db?hunter2",
                "postgresql://h/db?port=hunter2",
                "postgresql://h/db?port=1,hunter2",
                "postgresql://h/db?host=a:hunter2",
            )
        ),
    ],
)
def test_refusals_help_and_keep_secrets(url: str, words: str) -> None:
    error = refused(url, "MSR_URL")
    assert words in str(error)
    assert SECRET not in everything_shown(error)


@pytest.mark.parametrize("url", [None, 5, b"sqlite:///x.db"])
def test_a_url_must_be_text(url: object) -> None:
    assert "must be text" in str(refused(url))


@pytest.mark.parametrize(
    ("url", "display"),
    [
        ("postgres://u:hunter2@h:1/db", "postgresql://u:***@h:1/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("postgresql://:hunter2@h/db", "postgresql://:***@h/db"),
        ("postgresql://h/db?password=hunter2", "postgresql://:***@h/db"),
        ("postgresql://h/db?sslpassword=hunter2", "postgresql://h/db?sslpassword=***"),
        ("postgresql://h/db?scram_client_key=hunter2", "postgresql://h/db"),
        ("postgresql://u:hunter2@[::1]:1,h2/db", "postgresql://u:***@[::1]:1,h2/db"),
        ("postgresql://h/db?sslmode=require", "postgresql://h/db?sslmode=require"),
        ("sqlite+aiosqlite:///a/b.db", "sqlite:///a/b.db"),
    ],
)
def test_people_see_the_display_only(url: str, display: str) -> None:
    parsed = parse_url(url)
    assert parsed.display == str(parsed) == display
    assert repr(parsed) == f"DatabaseUrl({display!r})"


# Something that nothing else in a message or URL looks like, with whatever people have around it.
nasty = st.builds(
    "{}qZ7{}".format,
    st.text("/#?@%:[]&=+ ,;\\'\"<>\u00e9\u2100\ufe55\n09", max_size=8),
    st.text("/#?@%:[]&=+ ,;\\'\"<>\u00e9\u2100\ufe55\n09", max_size=8),
)


@given(nasty)
@example("1/qZ7@")
@example("1?qZ7=1")
@example("12#qZ7")
@example("a@qZ7/b")
@example("%qZ7")
@example("[qZ7]")
def test_a_password_as_typed_never_gets_out(password: str) -> None:
    """Either it is understood as one password, or the refusal says nothing of it."""
    try:
        parsed = parse_url(f"postgresql://user:{password}@host:5432/db?sslmode=disable")
    except ConfigError as caught:
        error = caught
    else:
        assert parsed.display == "postgresql://user:***@host:5432/db?sslmode=disable"
        assert "qZ7" not in repr(parsed)
        assert asyncpg_reads(parsed.dsn)[0] == [("host", 5432)]
        return
    assert "qZ7" not in everything_shown(error)
    assert error.__context__ is None


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_an_encoded_password_arrives_whole(password: str) -> None:
    for url in (
        f"postgresql://user:{quote(password, safe='')}@host/db?sslmode=disable",
        f"postgresql://user@host/db?password={quote(password, safe='')}&sslmode=disable",
    ):
        parsed = parse_url(url)
        addresses, parameters = asyncpg_reads(parsed.dsn)
        assert addresses == [("host", 5432)]
        assert (parameters.user, parameters.password) == ("user", password)
        assert parsed.display == "postgresql://user:***@host/db?sslmode=disable"
