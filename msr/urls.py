"""Database URLs: from every form people have to the one form the drivers take.

The rules, where the drivers and libpq differ:

- A `+driver` suffix of the scheme (SQLAlchemy) says nothing to us and is dropped.
- A query parameter wins over the same thing before the `?`, as in libpq; asyncpg alone would
  ignore `host`, `port`, `user`, `password` and `dbname` there.
- asyncpg sends every parameter it does not know to the server as a setting, and the server then
  refuses the connection. So what only libpq, SQLAlchemy or Prisma understand is dropped here; the
  rest passes, for it may be a setting (`search_path`, `statement_timeout`).
- At most one bare `@`, and no bare `#`: anything else is a password that somebody forgot to
  percent-encode, and guessing would send half of it to the wrong host.
- SQLite paths are percent-decoded like any other URL's path.

No message holds any part of a URL beyond its scheme and the name of a parameter. Errors are raised
outside `except` blocks, so that not even `__context__` leads to an exception that quotes the URL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode

from msr.errors import ConfigError

__all__ = ["DatabaseUrl", "Dialect", "hide_passwords", "parse_url"]

Dialect = Literal["postgresql", "sqlite"]
"""Which SQL a database speaks."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9.-]*)(?:\+[A-Za-z0-9_.+-]*)?://")
_AUTHORITY = re.compile(r"(?:(?P<auth>[^@]*)@)?(?P<hosts>[^@]*)")
_HOST = re.compile(r"(?:\[(?P<v6>[\w:.%]+)\]|(?P<name>[^\[\]:\s]+))(?::(?P<port>[0-9]{1,5}))?")
_PERCENT_GARBAGE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
_SECONDS = re.compile(r"-?[0-9]{1,6}(?:\.[0-9]+)?")
_SECRET = re.compile(r"password|secret|token|_key", re.IGNORECASE)
_PASSWORD = re.compile(r"""(?<=://)([^\s:/@"']*):[^\s/@"']+@""")
_PARAMETER = re.compile(r"[A-Za-z_][\w.-]*(?==)")

_ACCEPTED = "postgresql://, postgres://, postgresql+asyncpg://, sqlite:// or sqlite+aiosqlite://"
_MALFORMED = (
    "the URL cannot be read: write postgresql://user:password@host:port/database and "
    "percent-encode special characters in the password "
    "(% as %25, @ as %40, / as %2F, # as %23, ? as %3F)"
)
_SQLITE_SLASHES = (
    "the URL names a host: a relative SQLite file takes three slashes (sqlite:///app.db), "
    "an absolute one four (sqlite:////srv/app.db)"
)

# client_encoding: asyncpg speaks UTF-8 only and sets it itself.
# statement_cache_size and its kin: the handler always connects with 0, because of poolers.
_DROPPED = {
    # libpq
    "channel_binding", "client_encoding", "gssdelegation", "gssencmode", "load_balance_hosts",
    "max_protocol_version", "min_protocol_version", "require_auth", "requirepeer",
    "scram_client_key", "scram_server_key", "servicefile", "sslcertmode", "sslcompression",
    "sslcrldir", "sslkeylogfile", "sslsni", "tcp_user_timeout",
    # SQLAlchemy and the arguments of asyncpg.connect()
    "async_fallback", "command_timeout", "max_cacheable_statement_size",
    "max_cached_statement_lifetime", "prepare_threshold", "prepared_statement_cache_size",
    "prepared_statement_name_func", "statement_cache_size",
    # Prisma
    "connection_limit", "pgbouncer", "pool_timeout", "socket_timeout",
}  # fmt: skip
_DROPPED_PREFIXES = ("keepalives", "oauth_")
_SSL_WORDS = dict.fromkeys(("true", "1", "on", "yes"), "require") | dict.fromkeys(
    ("false", "0", "off", "no"), "disable"
)
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": (
        "any", "primary", "standby", "read-write", "read-only", "prefer-standby",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class DatabaseUrl:
    """A database URL that has been understood.

    `dsn` is for the driver and holds the password; `display` is for people and does not. `path`
    is the SQLite file, None for a database in memory and for PostgreSQL. `connect_timeout` is
    in seconds, None where the URL does not say or asks for no limit.
    """

    dialect: Dialect
    dsn: str = field(repr=False)
    path: str | None
    connect_timeout: float | None
    display: str

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.display!r})"

    def __str__(self) -> str:
        return self.display


def hide_passwords(text: str) -> str:
    """The text, without the passwords of the URLs in it: a script may have put one in its error."""
    return _PASSWORD.sub(r"\1:***@", text)


def parse_url(url: str, source: str = "argument") -> DatabaseUrl:
    """Read a database URL; touches neither the network nor the disk.

    Raises `ConfigError` (key `url`, the given source) for a URL that cannot be used.
    """
    if not isinstance(url, str):
        raise _error("the URL must be text", source)
    url = url.strip()
    match = _SCHEME.match(url)
    if match is None:
        raise _error(f"this is no database URL; it must start with {_ACCEPTED}", source)
    scheme = match[1].lower()
    rest = url[match.end() :]
    if scheme == "sqlite":
        return _sqlite(rest, source)
    if scheme in ("postgresql", "postgres"):
        return _postgresql(rest, source)
    raise _error(f"unknown scheme {scheme!r}; the URL must start with {_ACCEPTED}", source)


def _error(message: str, source: str) -> ConfigError:
    return ConfigError(message, key="url", source=source)


def _malformed(source: str) -> ConfigError:
    return _error(_MALFORMED, source)


def _decodable(text: str) -> bool:
    """Whether percent-decoding `text` loses nothing: `unquote` alone never complains."""
    if _PERCENT_GARBAGE.search(text) or not text.isprintable():
        return False
    try:
        unquote(text, errors="strict")
    except UnicodeDecodeError:
        return False
    return True


def _sqlite(rest: str, source: str) -> DatabaseUrl:
    rest, question, query = rest.partition("?")
    if question:
        name = _PARAMETER.match(query)
        what = f"parameter {name[0]!r}" if name else "text after '?'"
        raise _error(
            f"{what} is not supported in a SQLite URL (write ? in a file name as %3F)", source
        )
    if rest in ("", "/", ":memory:", "/:memory:"):
        return DatabaseUrl("sqlite", "sqlite://:memory:", None, None, "sqlite://:memory:")
    if not rest.startswith("/"):
        raise _error(_SQLITE_SLASHES, source)
    if not _decodable(rest):
        raise _error(
            "the path in the SQLite URL cannot be read: percent-encode special characters "
            "(% as %25)",
            source,
        )
    canonical = f"sqlite://{rest}"
    return DatabaseUrl("sqlite", canonical, unquote(rest[1:]), None, canonical)


def _postgresql(rest: str, source: str) -> DatabaseUrl:
    before_query, _, query = rest.partition("?")
    authority, _, path = before_query.partition("/")
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not _decodable(rest) or "#" in rest or "@" in path + query:
        raise _malformed(source)
    user, _, password = (match["auth"] or "").partition(":")
    params = _parameters(query, source)
    hosts = _hosts(match["hosts"], params, source)
    user = params.pop("user", unquote(user))
    password = params.pop("password", unquote(password))
    database = params.pop("database", unquote(path))
    database = params.pop("dbname", database)
    connect_timeout = _connect_timeout(params, source)
    _translate(params, source)

    # Percent-encoded, an IPv6 address needs no brackets; inside a list of hosts newer Pythons
    # refuse them.
    places = [(quote(host, safe=""), port) for host, port in hosts]
    shown = [(f"[{host}]" if ":" in host else quote(host, safe=""), port) for host, port in hosts]
    masked = {name: "***" if _SECRET.search(name) else value for name, value in params.items()}
    return DatabaseUrl(
        dialect="postgresql",
        dsn=_join(user, quote(password, safe=""), places, database, params),
        path=None,
        connect_timeout=connect_timeout,
        display=_join(user, "***" if password else "", shown, database, masked),
    )


def _join(
    user: str,
    password: str,
    hosts: list[tuple[str, str]],
    database: str,
    params: dict[str, str],
) -> str:
    auth = quote(user, safe="") + (f":{password}" if password else "")
    places = ",".join(f"{host}:{port}" if port else host for host, port in hosts)
    return (
        f"postgresql://{auth}{'@' if auth else ''}{places}"
        f"{'/' if database else ''}{quote(database, safe='')}"
        f"{'?' if params else ''}{urlencode(params, quote_via=quote, safe='*')}"
    )


def _parameters(query: str, source: str) -> dict[str, str]:
    """The query as a dictionary; the last value wins, but hosts and ports add up to a list."""
    params: dict[str, str] = {}
    if any("=" not in part for part in query.split("&") if part):
        raise _malformed(source)
    for name, value in parse_qsl(query):
        several = name in ("host", "port") and name in params
        params[name] = f"{params[name]},{value}" if several else value
    return params


def _hosts(authority: str, params: dict[str, str], source: str) -> list[tuple[str, str]]:
    """Hosts and ports (`""` for the default one), taken out of `params` where they stand there."""
    if re.fullmatch(r":[0-9]+", authority):  # the default host at this port, as in libpq
        params.setdefault("port", authority[1:])
        authority = ""
    hostaddr = params.pop("hostaddr", "")
    in_query = params.pop("host", "" if authority else hostaddr)
    specs = in_query or authority
    hosts = [_host(spec, bool(in_query), source) for spec in specs.split(",")] if specs else []
    ports = params["port"].split(",") if "port" in params else []
    for port in [port for _, port in hosts if port] + ports:
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise _malformed(source)
    if hosts and ports:
        del params["port"]
        if len(ports) not in (1, len(hosts)):
            raise _error("the URL must have one port, or one for each host", source)
        ports *= len(hosts) // len(ports)
        hosts = [(host, port) for (host, _), port in zip(hosts, ports, strict=True)]
    return hosts


def _host(spec: str, in_query: bool, source: str) -> tuple[str, str]:
    if in_query and (spec.startswith("/") or ("[" not in spec and spec.count(":") > 1)):
        return spec, ""  # a socket's folder or a bare IPv6 address
    match = _HOST.fullmatch(spec)
    if match is None:
        raise _malformed(source)
    host = match["v6"] or match["name"]
    return (host if in_query else unquote(host)), match["port"] or ""


def _connect_timeout(params: dict[str, str], source: str) -> float | None:
    """libpq's `connect_timeout` or SQLAlchemy's `timeout`; nought or less means no limit."""
    text = params.pop("timeout", "")
    text = params.pop("connect_timeout", text)
    if not text:
        return None
    if not _SECONDS.fullmatch(text):
        raise _error("connect_timeout in the URL must be a number of seconds", source)
    return float(text) if float(text) > 0 else None


def _translate(params: dict[str, str], source: str) -> None:
    """Leave in `params` only what asyncpg understands, in its words."""
    if "ssl" in params:
        ssl = params.pop("ssl")
        params.setdefault("sslmode", _SSL_WORDS.get(ssl.lower(), ssl))
    if "fallback_application_name" in params:
        fallback = params.pop("fallback_application_name")
        params.setdefault("application_name", fallback)
    for name, choices in _CHOICES.items():
        if params.get(name, choices[0]) not in choices:
            raise _error(f"{name} in the URL must be one of {', '.join(choices)}", source)
    for name in [*params]:
        if name in _DROPPED or name.startswith(_DROPPED_PREFIXES):
            del params[name]
