"""sql/40_get_job.sql. Ids of other types than text are in test_tables.py."""

import json

import psycopg
import pytest


def test_a_job(db, service, make_job):
    job_id = make_job(metadata={"b": 1, "a": [None]})
    db.execute("UPDATE jobs SET created_at = '2025-09-29 23:48:00.5+02', updated_at = '2025-09-30 00:00:00+00'")

    answer = service.execute("SELECT get_job(%s)::text", (job_id,)).fetchone()[0]
    assert list(json.loads(answer).items()) == [
        (
            "job",
            {
                "id": job_id,
                "status": "processing",
                "metadata": {"a": [None], "b": 1},
                "created_at": "2025-09-29T21:48:00.500000Z",
                "updated_at": "2025-09-30T00:00:00.000000Z",
            },
        ),
        ("status", "processing"),
    ]


def test_a_job_without_metadata_says_null(service, make_job):
    assert service.execute("SELECT get_job(%s)->'job'->'metadata'", (make_job(),)).fetchone() == (None,)


def test_an_unknown_job(service):
    assert service.execute("SELECT get_job('nix')").fetchone()[0] == {"error": "job not found", "job_id": "nix"}


def test_rows_that_are_hidden_from_the_owner_are_an_error_not_unknown(db, service, make_job):
    """Version 1.0 said that there is no such job."""
    make_job("a", running=1)
    hide_rows(db)

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        service.execute("SELECT get_job('a')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        service.execute("SELECT * FROM list_executions('a')")


def hide_rows(db: psycopg.Connection) -> None:
    """Make an ordinary role the owner of all, from whom the tables hide every row."""
    db.execute("DROP ROLE IF EXISTS beacon_owner")
    db.execute("CREATE ROLE beacon_owner")
    db.execute("GRANT CREATE, USAGE ON SCHEMA public TO beacon_owner")
    for kind, query in {
        "TABLE": "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'",
        "FUNCTION": "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    }.items():
        for (name,) in db.execute(query).fetchall():
            db.execute(f"ALTER {kind} {name} OWNER TO beacon_owner")
    for table in ("jobs", "executions"):
        db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
