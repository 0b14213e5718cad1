"""sql/40_get_job.sql. Ids of other types than text are in test_tables.py."""

import json


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
