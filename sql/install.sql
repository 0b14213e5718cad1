-- Installs Beacon Stop into the first schema of search_path: psql -f sql/install.sql. It can be repeated at any time.
\set ON_ERROR_STOP on
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
\ir 00_begin.sql
\ir 05_changes.sql
\ir 10_tables.sql
\ir 15_helpers.sql
\ir 20_guard.sql
\ir 30_emergency_stop_job.sql
\ir 31_emergency_stop_blockers.sql
\ir 32_emergency_stop_jobs.sql
\ir 33_emergency_stop_dry_run.sql
\ir 34_emergency_stop_status.sql
\ir 35_confirm_stopped.sql
\ir 36_release_job.sql
\ir 37_runaway_jobs.sql
\ir 38_emergency_stop_faults.sql
\ir 40_get_job.sql
\ir 50_list_executions.sql
\ir 60_timeout_stuck_jobs.sql
\ir 70_repair_stuck_jobs.sql
\ir 98_manifest.sql
\ir 99_end.sql
COMMIT;
