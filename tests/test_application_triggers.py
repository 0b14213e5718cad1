"""What the application's own triggers and rules do while a job is stopped: the stop goes through, or says that it did not."""

import json

import psycopg
import pytest

from conftest import TOKEN, Client, count_active

STOP = "SELECT emergency_stop_job(%s)"
AGAIN = """
    CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE attempt int := COALESCE((NEW.output->>'attempt')::int, 0);
    BEGIN
        IF NEW.status = 'failed' AND attempt < 3 THEN
            INSERT INTO executions (job_id, status, output) VALUES (NEW.job_id, 'pending', jsonb_build_object('attempt', attempt + 1));
        END IF;
        RETURN NULL;
    END $$
"""


@pytest.mark.parametrize(
    "kind",
    ["TRIGGER again AFTER UPDATE ON executions", "CONSTRAINT TRIGGER again AFTER UPDATE ON executions DEFERRABLE INITIALLY DEFERRED"],
)
def test_executions_that_a_trigger_starts_for_each_that_fails_are_stopped_and_counted(db, make_job, stop, kind):
    """Version 1.0: ok, 5 stopped, 5 pending; and the second stop failed for ever."""
    job_id = make_job(running=5)
    db.execute(AGAIN)
    db.execute(f"CREATE {kind} FOR EACH ROW EXECUTE FUNCTION again()")

    assert stop(job_id)["executions_stopped"] == 5 + 3 * 5
    assert count_active(db, job_id) == 0
    assert stop(job_id)["action"] == "none"


def test_what_the_caller_has_deferred_does_not_get_the_rights_of_the_functions_owner(db, make_job, service):
    """Until version 18 it fires with the rights of whoever makes it fire: a service became superuser by a stop."""
    job_id = make_job(running=1)
    db.execute(AGAIN)
    db.execute("CREATE CONSTRAINT TRIGGER again AFTER UPDATE ON executions DEFERRABLE INITIALLY DEFERRED"
               f" FOR EACH ROW EXECUTE FUNCTION again(); GRANT TEMPORARY ON DATABASE {db.info.dbname} TO PUBLIC")  # fmt: skip
    service.execute("""
        CREATE TEMP TABLE mine (id int);
        CREATE TEMP TABLE fired_as AS SELECT current_user AS role LIMIT 0;
        CREATE FUNCTION pg_temp.evil() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO pg_temp.fired_as SELECT current_user; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER evil AFTER INSERT ON mine DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION pg_temp.evil()""")

    with service.transaction():
        service.execute("INSERT INTO mine VALUES (1)")
        assert service.execute(STOP, (job_id,)).fetchone()[0]["executions_stopped"] == 4
        assert service.execute("SELECT role FROM fired_as").fetchall() == []
    assert service.execute("SELECT role FROM fired_as").fetchall() == [("beacon_service",)]


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "SET DEFAULT"])
def test_what_a_trigger_behind_a_foreign_key_that_follows_the_status_starts_is_stopped_too(db, make_job, stop, action):
    job_id = make_job(running=1)
    db.execute(f"""
        ALTER TABLE jobs ADD UNIQUE (id, status);
        CREATE TABLE board (number int, job_id text, status text,
                            FOREIGN KEY (job_id, status) REFERENCES jobs (id, status) ON UPDATE {action});
        INSERT INTO board VALUES (1, '{job_id}', 'processing');
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO executions (job_id) VALUES (OLD.job_id); RETURN NULL; END $$;
        CREATE TRIGGER again AFTER UPDATE ON board FOR EACH ROW EXECUTE FUNCTION again()""")

    assert stop(job_id)["executions_stopped"] == 2
    assert count_active(db, job_id) == 0


def test_a_trigger_that_starts_an_execution_for_ever_is_an_error_that_says_what_still_runs(db, make_job, service):
    job_id = make_job(running=5)
    db.execute(AGAIN.replace("attempt < 3", "true"))
    db.execute("CREATE TRIGGER again AFTER UPDATE ON executions FOR EACH ROW EXECUTE FUNCTION again()")

    with pytest.raises(psycopg.errors.TriggeredDataChangeViolation) as refused:
        service.execute(STOP, (job_id,))
    assert '{"pending": 5}' in refused.value.diag.message_detail
    assert count_active(db, job_id) == 5


def test_a_clean_up_execution_that_a_trigger_starts_when_the_job_fails_is_stopped_too(db, make_job, stop):
    """Version 1.0: 55000 from our own guard, over HTTP "database unavailable"."""
    job_id = make_job(running=2)
    db.execute("""
        CREATE FUNCTION clean_up() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO executions (job_id, status) VALUES (NEW.id, 'pending');
            RETURN NULL;
        END $$;
        CREATE TRIGGER clean_up AFTER UPDATE ON jobs FOR EACH ROW
            WHEN (NEW.status = 'failed' AND OLD.status <> 'failed') EXECUTE FUNCTION clean_up()""")

    assert stop(job_id)["executions_stopped"] == 3
    assert count_active(db, job_id) == 0


def test_after_the_stop_its_own_session_starts_nothing_either(db, make_job, connect):
    """What lets the triggers through while the stop is at work ends with it, and with its failure."""
    job_id = make_job(running=1)
    session = connect(autocommit=False)
    session.execute(STOP, (job_id,))

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        session.execute("INSERT INTO executions (job_id) VALUES (%s)", (job_id,))
    session.rollback()


UNDOING = {
    "a trigger that drops the update of the job": ("jobs", "RETURN NULL;"),
    "a trigger that drops the updates of executions": ("executions", "RETURN NULL;"),
    "a trigger that keeps the job's status": ("jobs", "NEW.status := OLD.status; RETURN NEW;"),
    "a trigger that keeps the executions' status": ("executions", "NEW.status := OLD.status; RETURN NEW;"),
    "a trigger that drops keys of the metadata": ("jobs", "NEW.metadata := NEW.metadata - 'emergency_stop'; RETURN NEW;"),
    "a trigger that drops keys of the output": ("executions", "NEW.output := NEW.output - 'emergency_stop'; RETURN NEW;"),
    "a trigger that drops the mark and sets another time": (
        "executions",
        "NEW.output := OLD.output; NEW.completed_at := now() - interval '1 h'; RETURN NEW;",
    ),
    "a trigger that queues what fails": ("executions", "NEW.status := 'queued'; RETURN NEW;"),
    "a trigger that cancels the job instead": ("jobs", "NEW.status := 'cancelled'; RETURN NEW;"),
    "a rule on the job": ("jobs", "NOTHING"),
    "a rule on executions": ("executions", "NOTHING"),
    "a rule that updates another table": ("jobs", "UPDATE elsewhere SET status = NEW.status"),
}


@pytest.mark.parametrize("name", UNDOING)
def test_whatever_undoes_the_stop_is_an_error_and_never_ok(make_app, db, make_job, service, name):
    """Version 1.0: ok, with survivors, or without a mark."""
    job_id = make_job(running=3, metadata={"k": 1})
    table, body = UNDOING[name]
    if body.endswith(";"):
        db.execute(f"CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
        db.execute(f"CREATE TRIGGER undo BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION undo()")
    else:
        db.execute("CREATE TABLE elsewhere AS SELECT 'processing' AS status")
        db.execute(f"CREATE RULE undo AS ON UPDATE TO {table} DO INSTEAD {body}")

    with pytest.raises(psycopg.errors.TriggeredDataChangeViolation, match=f"job '{job_id}' could not be stopped") as refused:
        service.execute(STOP, (job_id,))
    assert "trigger" in refused.value.diag.message_hint
    assert count_active(db, job_id) == 3
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (0,)
    answer = Client(make_app()).stop(job_id)
    assert (answer.status, answer.json["sqlstate"]) == (500, "27000")
    assert "could not be stopped" in answer.json["message"]


SQLSTATES = [
    "P0002", "55000", "55P03", "22012", "22021", "22023", "22P05", "23514", "25006", "P0001", "53400", "08001", "42501",
    "42883", "57014",
]  # fmt: skip


@pytest.mark.parametrize("sqlstate", SQLSTATES)
def test_the_error_of_a_trigger_is_told_as_it_is(make_app, db, make_job, sqlstate):
    """Version 1.0: 404 "job not found" for P0002, 503 "database unavailable" for 55000. Others passed for a database that
    is away (08001), that is read-only (25006), that is not ready (42501, 42883), or that takes too long (57014); or for
    a value that cannot be used (22021, 22023, 22P05)."""
    job_id = make_job(running=1)
    db.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the application says no' USING ERRCODE = '{sqlstate}';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()""")

    client = Client(make_app(lock_timeout="100ms"))
    for body in (b"{}", b'{"dry_run": true}'):
        answer = client.stop(job_id, body)
        assert (answer.status, answer.json["sqlstate"]) == (500, sqlstate)
        assert "the application says no" in answer.json["message"]
    assert count_active(db, job_id) == 1
    db.execute("CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (OLD.id <> 'other') EXECUTE FUNCTION refuse()")
    other = make_job("other", running=1)
    body = json.dumps({"job_ids": [job_id, other]}).encode()
    several = client("POST", "/admin/emergency-stop", body, HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (several.status, several.json["stopped"]) == (200, 1)
    assert "the application says no" in several.json["results"][0]["message"]
    assert count_active(db, other) == 0

    db.execute("CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()")
    released = client("POST", "/admin/jobs/other/release", b'{"reason": "x", "status": "pending"}', HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (released.status, released.json["sqlstate"]) == (500, sqlstate)


def test_a_trigger_may_stop_other_jobs_and_release_them_again(db, make_job, stop, service):
    """The call inside of the other one forgot that the other one was at work: 55000, at each attempt."""
    parent, child = make_job("parent", running=2), make_job("child", running=2)
    db.execute(AGAIN)
    db.execute("CREATE TRIGGER again AFTER UPDATE ON executions FOR EACH ROW EXECUTE FUNCTION again()")
    db.execute("""
        CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.status = 'failed' THEN
                PERFORM emergency_stop_job('child');
            ELSE
                PERFORM release_job('child', 'with its parent', NEW.status);
            END IF;
            RETURN NULL; END $$;
        CREATE TRIGGER follow AFTER UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = 'parent') EXECUTE FUNCTION follow()""")

    assert stop(parent)["executions_stopped"] == 2 * 4
    assert count_active(db, parent) + count_active(db, child) == 0
    assert service.execute("SELECT release_job('parent', 'mended', 'pending')").fetchone()[0]["ok"]
    assert db.execute("SELECT id, status FROM jobs ORDER BY id").fetchall() == [("child", "pending"), ("parent", "pending")]
    counts = "SELECT job_id, action, count(*) FROM emergency_stops GROUP BY 1, 2 ORDER BY 1, 2"
    assert db.execute(counts).fetchall() == [(id, action, 1) for id in ("child", "parent") for action in ("release", "stop")]


RECORD_KEPT_OUT = {
    "a trigger": """
        CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
        CREATE TRIGGER keep_out BEFORE INSERT ON emergency_stops FOR EACH ROW EXECUTE FUNCTION keep_out()""",
    "a rule": "CREATE RULE keep_out AS ON INSERT TO emergency_stops DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("how", RECORD_KEPT_OUT)
def test_what_cannot_be_recorded_is_not_done(db, make_job, stop, service, how):
    """The answer was ok, and there was no record."""
    running, stopped = make_job(running=1), make_job(running=1)
    stop(stopped)
    db.execute(RECORD_KEPT_OUT[how])

    for call in (f"SELECT emergency_stop_job('{running}')", f"SELECT release_job('{stopped}', 'mended', 'pending')"):
        with pytest.raises(psycopg.errors.TriggeredDataChangeViolation, match="could not be recorded"):
            service.execute(call)
    assert count_active(db, running) == 1
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (stopped,)).fetchone() == ("failed",)


def test_an_error_with_the_dry_runs_own_code_is_not_taken_for_its_end(db, make_job, service):
    job_id = make_job(running=1)
    db.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE 'BS002' USING MESSAGE = 'no'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()""")

    with pytest.raises(psycopg.Error, match="no") as refused:
        service.execute("SELECT emergency_stop_dry_run(%s)", (job_id,))
    assert refused.value.sqlstate == "BS002"


WORK_OF_A_TRIGGER = {
    "22021": "PERFORM convert_from('\\xff', 'UTF8')",
    "22P05": "PERFORM convert_to('中', 'LATIN1')",
    "22023": "PERFORM date_trunc('foo', now())",
}


@pytest.mark.parametrize("sqlstate", WORK_OF_A_TRIGGER)
def test_what_postgresql_refuses_a_trigger_is_no_error_in_the_call(client, db, make_job, stop, sqlstate):
    """It was 400, as if a value of the call could not be used; and the log did not have it."""
    running, stopped = make_job(running=1), make_job(running=1)
    stop(stopped)
    db.execute(f"""
        CREATE FUNCTION work() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {WORK_OF_A_TRIGGER[sqlstate]}; RETURN NEW; END $$;
        CREATE TRIGGER work BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION work()""")

    for call, id, body in (
        ("emergency-stop", running, {}),
        ("emergency-stop", running, {"dry_run": True}),
        ("release", stopped, {"reason": "x", "status": "pending"}),
    ):
        answer = client("POST", f"/admin/jobs/{id}/{call}", json.dumps(body).encode(), HTTP_X_ADMIN_TOKEN=TOKEN)
        assert (answer.status, answer.json["sqlstate"]) == (500, sqlstate)


def test_a_trigger_that_ends_the_session_undoes_no_stop_of_another_job(client, db, make_job):
    """The answer was 503 for all, and none was stopped."""
    ids = [make_job(id, running=1) for id in ("a", "ends", "z")]
    db.execute("""
        CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
        CREATE TRIGGER finish BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = 'ends') EXECUTE FUNCTION finish()""")

    answer = client("POST", "/admin/emergency-stop", json.dumps({"job_ids": ids}).encode(), HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (answer.status, answer.json["stopped"], answer.json["failed"]) == (200, 2, 1)
    assert answer.json["results"][1] == {"error": "database unavailable", "job_id": "ends"}
    assert [count_active(db, id) for id in ids] == [0, 1, 0]
