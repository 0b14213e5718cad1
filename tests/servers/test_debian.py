"""What the embedded PostgreSQL lacks and Debian's has: plpgsql_check, and collations in which different texts are equal."""

from collections.abc import Iterator
from pathlib import Path

import beacon_stop
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from conftest import new_folder
from processes import Cluster

LOOSE = "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with new_folder() as folder:
        cluster = Cluster(Path(folder)).create(fsync="off").start()
        yield cluster
        cluster.stop()


@pytest.fixture
def db(cluster: Cluster) -> Iterator[psycopg.Connection]:
    """An empty database."""
    with psycopg.connect(cluster.url, autocommit=True) as server:
        server.execute("DROP DATABASE IF EXISTS bare WITH (FORCE)")
        server.execute("CREATE DATABASE bare")
    with psycopg.connect(cluster.url, dbname="bare", autocommit=True) as db:
        yield db


def install(cluster: Cluster) -> None:
    beacon_stop.init_db(make_conninfo(cluster.url, dbname="bare"))


def test_plpgsql_check_finds_nothing(cluster, db):
    """In version 1.0 this test never ran: fetchone() of a row without columns is (), which is false."""
    install(cluster)
    db.execute("CREATE SCHEMA checks; CREATE EXTENSION plpgsql_check SCHEMA checks")
    checked = db.execute("""
        SELECT p.oid::regprocedure::text, ARRAY(
            SELECT checks.plpgsql_check_function(
                p.oid, COALESCE(t.tgrelid, 0), oldtable => t.tgoldtable, newtable => t.tgnewtable,
                all_warnings => true))
        FROM pg_proc p
        LEFT JOIN pg_trigger t ON t.tgfoid = p.oid
        JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
        WHERE p.pronamespace = 'public'::regnamespace
        ORDER BY 1""").fetchall()

    assert {"guard_inserted_executions()", "keep_append_only()", "get_job(text)"} < {signature for signature, _ in checked}
    assert [(signature, findings) for signature, findings in checked if findings] == []


@pytest.mark.parametrize(
    ("statement", "column"),
    [
        ("CREATE TABLE jobs (id text COLLATE loose PRIMARY KEY, status text)", "jobs.id"),
        ("CREATE TABLE executions (id bigint, job_id text COLLATE loose, status text)", "executions.job_id"),
        ("CREATE TABLE executions (id text COLLATE loose, job_id text, status text)", "executions.id"),
    ],
)
def test_ids_of_which_different_ones_are_equal_are_refused(cluster, db, statement, column):
    """Version 1.0 left survivors: the guard and the stop had different keys for the same job."""
    db.execute(LOOSE + statement)

    with pytest.raises(psycopg.Error, match=f"column {column} has the nondeterministic collation loose: expected one"):
        install(cluster)
