-- Takes Beacon Stop away from the first schema of search_path: psql -f sql/uninstall.sql. It can be repeated.
-- What stays: the tables, all their columns and rows, and the records (emergency_stops, batch_changes) with their indexes.
--
-- Raises   lock_not_available (55P03)  others have used the tables for longer than lock_timeout, or 10 s where that is 0
-- Locks    as the installation, all of our tables at once, if it takes anything away

DO $$
DECLARE
    v_schema CONSTANT regnamespace := quote_ident(current_schema())::regnamespace;
    v_drop   text;
    v_count  int := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
    IF to_regprocedure('lock_all_tables()') IS NOT NULL THEN
        PERFORM lock_all_tables();
    END IF;
    -- Functions last: triggers need them.
    FOR v_drop IN
        SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass)
        FROM pg_trigger t
        JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE p.pronamespace = v_schema
          AND p.proname IN ('guard_inserted_executions', 'guard_updated_execution', 'guard_updated_job', 'keep_append_only')
        UNION ALL
        SELECT format('DROP INDEX %I', i.indexname)
        FROM pg_indexes i
        WHERE i.schemaname = current_schema() AND i.tablename IN ('jobs', 'executions')
          AND i.indexname IN ('executions_job_id_unfinished_idx', 'executions_job_id_active_idx', 'executions_job_id_id_idx',
                              'jobs_updated_at_ongoing_idx', 'jobs_updated_at_unfinished_idx', 'jobs_updated_at_failed_idx')
        UNION ALL
        SELECT format('DROP FUNCTION %s', p.oid::regprocedure)
        FROM pg_proc p
        WHERE p.pronamespace = v_schema AND 'search_path=' || current_setting('search_path') = ANY (p.proconfig)
          AND p.proname IN (
              'lock_all_tables', 'outdated_functions', 'missing_columns', 'missing_indexes', 'missing_triggers', 'installation_steps',
              'keep_append_only', 'to_job_id', 'to_execution_id', 'job_barrier', 'require_read_committed', 'commit_durably',
              'utc_seconds', 'as_object', 'notify_workers',
              'admit_execution', 'guard_inserted_executions', 'guard_updated_execution', 'guard_updated_job',
              'limit_lock_wait', 'wait_for_barrier', 'lock_job_row', 'lock_rows', 'unfinished_executions', 'last_record', 'fail_job',
              'without_reason_of_last_stop', 'attempt_stop', 'stop_answer', 'emergency_stop_job',
              'running_row_holders', 'job_holders', 'emergency_stop_blockers', 'end_or_name_holders', 'emergency_stop_end_blockers',
              'emergency_stop_jobs', 'emergency_stop_dry_run', 'is_emergency_stopped', 'stop_confirmation', 'emergency_stop_status',
              'confirm_stopped', 'release_job', 'execution_order', 'executions_to_read', 'runaway_jobs',
              'function_faults', 'table_faults', 'constraint_faults', 'stop_warnings', 'emergency_stop_faults',
              'function_checksums', 'installed_functions',
              'get_job', 'list_executions', 'job_has_progressed', 'time_out_job', 'timeout_stuck_jobs',
              'republications', 'reason_to_skip', 'republish_job', 'repair_stuck_jobs')
    LOOP
        EXECUTE v_drop;
        v_count := v_count + 1;
        IF v_drop NOT LIKE 'DROP FUNCTION %' THEN
            RAISE NOTICE USING MESSAGE = v_drop;
        END IF;
    END LOOP;
    RAISE NOTICE USING MESSAGE = format('schema %I: %s objects taken away, functions included; tables, rows and records stay',
                                        current_schema(), v_count);
END;
$$;
