"""A year of a team's life with the installed `msr`, from January to December, on both databases.

The team has a shop, whose database was made by hand. Each month is a function and brings one
thing that happens to every team sooner or later. In December a new colleague migrates an empty
database with the same folder: both must then have the same schema, and it is `SCHEMA`.
"""

from __future__ import annotations

import json
import re
import textwrap
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Result, run_msr, write_scripts
from tests.support.dump import dump
from tests.support.migrations import is_sqlite
from tests.support.postgres import PostgresServer
from tests.support.queries import query

MADE_BY_HAND = {
    "V1_customers.sql": """\
        CREATE TABLE customers (id INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL);
        """,
    "V2_orders.sql": """\
        CREATE TABLE orders (
            id INTEGER NOT NULL PRIMARY KEY,
            customer_id INTEGER NOT NULL REFERENCES customers (id),
            cents INTEGER NOT NULL
        );
        """,
}

SCHEMA = {
    "customers": ["id integer not null", "name text not null", "email text"],
    "orders": [
        "id integer not null",
        "customer_id integer not null",
        "cents integer not null",
        "status text not null",
        "discount integer not null",
    ],
    "invoices": ["order_id integer not null", "sent text"],
    "payments": ["order_id integer not null", "cents integer not null"],
    "returns": ["order_id integer not null", "reason text not null"],
    "view order_totals": ["customer_id", "orders", "cents"],
    "index orders_customer": ["customer_id"],
    "unique index customers_email": ["email"],
}

OURS = re.compile(r"(?:unique index )?(?:schema_version|migration_locks)")

TOTALS = """\
    DROP VIEW IF EXISTS order_totals;
    CREATE VIEW order_totals AS
    SELECT customer_id, count(*) AS orders, sum({cents}) AS cents FROM orders GROUP BY customer_id;
    """

# Relations and their columns in order; keys belong to their table's constraints and are left out.
POSTGRES_RELATIONS = """
SELECT CASE WHEN c.relkind = 'v' THEN 'view ' WHEN i.indisunique AND i.indisvalid THEN
        'unique index ' WHEN i.indisvalid THEN 'index ' WHEN c.relkind = 'i' THEN 'invalid index '
        ELSE '' END || c.relname,
    a.attname, CASE WHEN c.relkind = 'r' THEN format_type(a.atttypid, NULL) END,
    a.attnotnull AND c.relkind = 'r'
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'i')
    AND NOT a.attisdropped
    AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = c.oid AND k.contype <> 'f')
ORDER BY 1, a.attnum
"""
SQLITE_RELATIONS = """
SELECT iif(s.type = 'view', 'view ', '') || s.name AS name, c.name,
    iif(s.type = 'table', lower(c.type), NULL), s.type = 'table' AND c."notnull", c.cid AS place
FROM sqlite_master AS s, pragma_table_info(s.name) AS c WHERE s.type IN ('table', 'view')
UNION ALL
SELECT iif(i."unique", 'unique index ', 'index ') || i.name, c.name, NULL, 0, c.seqno
FROM sqlite_master AS s, pragma_index_list(s.name) AS i, pragma_index_info(i.name) AS c
WHERE s.type = 'table' AND i.origin = 'c'
ORDER BY 1, place
"""


@dataclass(frozen=True)
class Team:
    """The team's folder with the scripts, and the database of its shop."""

    url: str
    folder: Path

    def msr(self, *arguments: str, answer: str | None = None) -> Result:
        return run_msr(*arguments, "--url", self.url, "--folder", str(self.folder), input=answer)

    def done(self, *arguments: str, answer: str | None = None) -> list[str]:
        """The scripts that a command ran, which must have succeeded, without a warning."""
        result = self.msr(*arguments, answer=answer)
        assert (result.exit_code, result.stderr) == (0, ""), result
        return re.findall(r"^\S+Z (?:Applied|Rolled back) (\S+) ", result.stdout, re.MULTILINE)

    def refused(self, *arguments: str) -> str:
        """Why a command did nothing at all, for a reason that it found before."""
        before = dump(self.url)
        result = self.msr(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result
        assert dump(self.url) == before
        return result.stderr

    def failed(self, *arguments: str) -> str:
        """Why a script failed."""
        result = self.msr(*arguments)
        assert result.exit_code == 3, result
        return result.stderr

    def write(self, name: str, text: str) -> None:
        write_scripts(self.folder, {name: text})

    def statuses(self) -> dict[str, str]:
        """The status of every script, by the name of its file."""
        scripts = json.loads(self.msr("list", "--json").stdout)["scripts"]
        return {script["file"]: script["status"] for script in scripts}

    def totals(self) -> list[tuple[Any, ...]]:
        """What the shop's own page reads from the view."""
        return query(self.url, "SELECT customer_id, orders, cents FROM order_totals ORDER BY 1")

    def schema(self) -> dict[str, list[str]]:
        """Tables, views and indexes with their columns, without those of msr."""
        relations: dict[str, list[str]] = {}
        rows = query(self.url, SQLITE_RELATIONS if is_sqlite(self.url) else POSTGRES_RELATIONS)
        for name, column, kind, not_null, *_ in rows:
            if not OURS.match(name):
                text = f"{column} {kind or ''}".rstrip() + (" not null" if not_null else "")
                relations.setdefault(name, []).append(text)
        return relations

    def view(self) -> str:
        """The text of the view, as the database keeps it."""
        sqlite = "SELECT sql FROM sqlite_master WHERE name = 'order_totals'"
        postgres = "SELECT pg_get_viewdef('order_totals'::regclass)"
        [(text,)] = query(self.url, sqlite if is_sqlite(self.url) else postgres)
        return str(text)


@pytest.fixture
def team(database_url: str, tmp_path: Path) -> Team:
    """The team on the first of January: a database full of orders, and no script."""
    statements = [textwrap.dedent(text) for text in MADE_BY_HAND.values()]
    query(
        database_url,
        *statements,
        "INSERT INTO customers VALUES (1, 'Ada'), (2, 'Bob')",
        "INSERT INTO orders VALUES (10, 1, 500), (11, 1, 700), (12, 2, 900)",
    )
    return Team(database_url, tmp_path / "migrations")


@pytest.fixture
def colleague(team: Team, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Team]:
    """The same folder, and a database of the same kind with nothing in it."""
    if is_sqlite(team.url):
        yield Team(f"sqlite:///{tmp_path / 'fresh.db'}", team.folder)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex[:16]}"
    url = server.create_database(name)
    try:
        yield Team(url, team.folder)
    finally:
        server.drop_database(name)


@pytest.mark.timeout(180)  # almost fifty commands, one after the other
def test_a_year(team: Team, colleague: Team) -> None:
    """Whatever happened on the way, all of it is undone, settled or done, and nothing is lost."""
    january_starts_with_the_database_that_there_is(team)
    february_brings_the_first_scripts(team)
    march_merges_two_branches_out_of_order(team)
    april_deploys_a_bad_script(team)
    may_edits_a_comment_of_an_applied_script(team)
    june_takes_a_script_back_and_corrects_it(team)
    july_changes_the_view(team)
    august_renames_a_file(team)
    september_fails_outside_a_transaction(team)
    october_moves_data_with_python(team)
    november_writes_a_script_with_msr_new(team)
    december_looks_back(team)
    december_has_a_new_colleague(team, colleague)


def january_starts_with_the_database_that_there_is(team: Team) -> None:
    """The tables get scripts, which must not run here: a baseline says so."""
    for name, text in MADE_BY_HAND.items():
        team.write(name, text)

    # Who forgets the baseline is stopped by the tables themselves, and can still make up for it.
    assert "V1_customers.sql" in team.failed("migrate")
    assert team.statuses() == {"V1_customers.sql": "pending", "V2_orders.sql": "pending"}

    assert team.done("baseline", "2") == []
    assert team.done("migrate") == []
    assert team.statuses() == {"V1_customers.sql": "baseline", "V2_orders.sql": "baseline"}


def february_brings_the_first_scripts(team: Team) -> None:
    """A column, and a view that is made anew whenever its file changes."""
    team.write("V20250203101500_email.up.sql", "ALTER TABLE customers ADD COLUMN email TEXT;")
    team.write("V20250203101500_email.down.sql", "ALTER TABLE customers DROP COLUMN email;")
    team.write("R_order_totals.sql", TOTALS.format(cents="cents"))

    assert team.done("migrate") == ["V20250203101500_email.up.sql", "R_order_totals.sql"]
    assert team.totals() == [(1, 2, 1200), (2, 1, 900)]
    assert team.done("migrate") == []


def march_merges_two_branches_out_of_order(team: Team) -> None:
    """Ada began on the 3rd and Bob on the 5th, but Bob's branch was merged and deployed first."""
    ada, bob = "V20250303090000_invoices.sql", "V20250305140000_status.sql"
    team.write(bob, "ALTER TABLE orders ADD COLUMN status TEXT NOT NULL DEFAULT 'new';")
    assert team.done("migrate") == [bob]

    team.write(ada, "CREATE TABLE invoices (order_id INTEGER NOT NULL, sent TEXT);")
    why = team.refused("migrate")
    assert f"{ada}: is older than version 20250305140000, which is applied already" in why
    assert "--out-of-order" in why
    assert team.statuses()[ada] == "out-of-order"

    assert team.done("migrate", "--out-of-order") == [ada]
    assert team.done("migrate") == []


def april_deploys_a_bad_script(team: Team) -> None:
    """Its second statement fails, so the first is undone as well, and the file may be put right."""
    script = "V20250401080000_payments.sql"
    table = "CREATE TABLE payments (order_id INTEGER NOT NULL, cents INTEGER NOT NULL);\n"
    team.write(script, f"{table}INSERT INTO payments SELECT id, price FROM orders;\n")
    before = team.schema()

    why = team.failed("migrate")

    assert f"{script}, line 2" in why
    assert "the script was rolled back" in why
    assert team.schema() == before
    assert team.statuses()[script] == "pending"

    team.write(script, f"{table}INSERT INTO payments SELECT id, cents FROM orders;\n")
    assert team.done("migrate") == [script]
    assert query(team.url, "SELECT sum(cents) FROM payments") == [(2100,)]


def may_edits_a_comment_of_an_applied_script(team: Team) -> None:
    """The next run refuses it; who has seen that it is only a comment may accept it."""
    script = team.folder / "V20250305140000_status.sql"
    script.write_text(f"-- new, paid or sent\n{script.read_text()}")
    assert f"{script.name}: was edited after it was applied" in team.refused("migrate")

    # Who says no has changed nothing.
    assert team.done("repair", answer="n\n") == []
    assert team.statuses()[script.name] == "changed"

    result = team.msr("repair", answer="y\n")

    assert (result.exit_code, result.stderr) == (0, "")
    assert "\n+-- new, paid or sent\n" in result.stdout
    assert result.stdout.endswith("✓ 1 script accepted as edited\n")
    assert team.statuses()[script.name] == "applied"
    assert team.done("migrate") == []


def june_takes_a_script_back_and_corrects_it(team: Team) -> None:
    """The discount should have been a number. The view that is in the way is made anew after."""
    up, down = "V20250602110000_discount.up.sql", "V20250602110000_discount.down.sql"
    team.write(up, "ALTER TABLE orders ADD COLUMN discount TEXT;")
    way_back = "DROP VIEW order_totals;\nALTER TABLE orders DROP COLUMN discount;\n"
    team.write(down, way_back)
    before = team.schema()
    assert team.done("migrate") == [up]
    assert "discount text" in team.schema()["orders"]

    assert team.done("down", "20250401080000") == [down]

    assert team.schema() == {name: before[name] for name in before if name != "view order_totals"}
    assert team.statuses()[up] == "pending"

    team.write(up, "ALTER TABLE orders ADD COLUMN discount INTEGER NOT NULL DEFAULT 0;")
    assert team.done("migrate") == [up, "R_order_totals.sql"]
    assert team.totals() == [(1, 2, 1200), (2, 1, 900)]


def july_changes_the_view(team: Team) -> None:
    """A repeatable script is edited as if there were no history, and runs once more."""
    query(team.url, "UPDATE orders SET discount = 100 WHERE id = 12")
    team.write("R_order_totals.sql", TOTALS.format(cents="cents - discount"))

    assert team.done("migrate") == ["R_order_totals.sql"]
    assert team.totals() == [(1, 2, 1200), (2, 1, 800)]
    assert team.done("migrate") == []


def august_renames_a_file(team: Team) -> None:
    """The version is what counts: another name, of both its files, is no other script."""
    for direction in ("up", "down"):
        before = team.folder / f"V20250203101500_email.{direction}.sql"
        before.rename(team.folder / f"V20250203101500_customers_have_an_email.{direction}.sql")

    assert team.done("migrate") == []
    assert team.statuses()["V20250203101500_customers_have_an_email.up.sql"] == "applied"


def september_fails_outside_a_transaction(team: Team) -> None:
    """One half is there and the other is not: a person settles that, and the next run goes on."""
    version, script = "20250901090000", "V20250901090000_indexes.sql"
    concurrently = "" if is_sqlite(team.url) else "CONCURRENTLY "
    team.write(
        script,
        f"""\
        -- msr: no-transaction
        CREATE INDEX {concurrently}orders_customer ON orders (customer_id);
        CREATE UNIQUE INDEX {concurrently}customers_email ON customers (email);
        """,
    )
    query(team.url, "UPDATE customers SET email = 'shared@example.com'")

    why = team.failed("migrate")

    assert f"{script}, line 3" in why
    assert "what the script had committed stays, so check it by hand" in why
    assert team.statuses()[script] == "failed"
    assert "index orders_customer" in team.schema()
    refused = team.refused("migrate")
    assert f"'msr repair {version} --retry'" in refused
    invalid = "invalid index customers_email" in team.schema()
    assert invalid == ("the invalid index public.customers_email" in refused)
    assert invalid == (not is_sqlite(team.url))

    query(
        team.url,
        "UPDATE customers SET email = 'bob@example.com' WHERE id = 2",
        "DROP INDEX orders_customer",
    )
    assert team.done("repair", version, "--retry") == []
    assert not any("index" in name for name in team.schema())
    assert team.done("migrate") == [script]
    assert team.done("migrate") == []


def october_moves_data_with_python(team: Team) -> None:
    """A script in Python, in a folder of its own; the order of versions is one all the same."""
    script = "billing/V20251006130000_invoice_everything.py"
    team.write(
        script,
        '''\
        """Every order that has been paid gets its invoice."""


        async def up(db):
            await db.execute("INSERT INTO invoices (order_id) SELECT order_id FROM payments")
        ''',
    )

    assert team.done("migrate") == [script]
    assert query(team.url, "SELECT order_id FROM invoices ORDER BY 1") == [(10,), (11,), (12,)]


def november_writes_a_script_with_msr_new(team: Team) -> None:
    """`msr new` chooses a version above all others, and leaves both directions to be filled in."""
    up, down = (
        Path(file) for file in json.loads(team.msr("new", "Returns!", "--json").stdout)["files"]
    )
    assert (up.parent, down.parent) == (team.folder, team.folder)
    assert re.fullmatch(r"V\d{14}_Returns\.up\.sql", up.name)
    with up.open("a") as file:
        file.write("CREATE TABLE returns (order_id INTEGER NOT NULL, reason TEXT NOT NULL);\n")
    with down.open("a") as file:
        file.write("DROP TABLE returns;\n")

    # There and back and there again, before it is given to the others.
    assert team.done("migrate") == [up.name]
    assert team.done("down", "--steps", "1") == [down.name]
    assert "returns" not in team.schema()
    assert team.done("migrate") == [up.name, "R_order_totals.sql"]


def december_looks_back(team: Team) -> None:
    """Nothing is left to be settled, and the shop has what it had."""
    result = team.msr("validate", "--database")

    assert result == Result(0, "✓ No problems found\n", "")
    assert team.schema() == SCHEMA
    assert query(team.url, "SELECT name FROM customers ORDER BY id") == [("Ada",), ("Bob",)]
    assert team.totals() == [(1, 2, 1200), (2, 1, 800)]


def december_has_a_new_colleague(team: Team, colleague: Team) -> None:
    """From nothing, the scripts of the baseline run as well, and the branches in their order."""
    assert [re.sub(r"V\d{14}_R", "V_R", name) for name in colleague.done("migrate")] == [
        "V1_customers.sql",
        "V2_orders.sql",
        "V20250203101500_customers_have_an_email.up.sql",
        "V20250303090000_invoices.sql",
        "V20250305140000_status.sql",
        "V20250401080000_payments.sql",
        "V20250602110000_discount.up.sql",
        "V20250901090000_indexes.sql",
        "billing/V20251006130000_invoice_everything.py",
        "V_Returns.up.sql",
        "R_order_totals.sql",
    ]

    assert colleague.schema() == team.schema() == SCHEMA
    assert colleague.view() == team.view()
    assert set(colleague.statuses().values()) == {"applied"}
    assert colleague.statuses() == {**team.statuses(), **dict.fromkeys(MADE_BY_HAND, "applied")}
    assert colleague.msr("validate", "--database") == Result(0, "✓ No problems found\n", "")
