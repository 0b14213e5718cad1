-- The append-only records of what was done to jobs and executions: emergency_stops and batch_changes.
-- Last, what the tables that were there already lack is added to all of them.

DO $$
BEGIN
    IF to_regclass('emergency_stops') IS NULL THEN
        CREATE TABLE emergency_stops (
            id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            action             text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release')),
            job_id             text NOT NULL,  -- jobs.id as text; no foreign key, since the record outlives the job
            previous_status    text NOT NULL,
            new_status         text,
            executions_stopped bigint NOT NULL CHECK (executions_stopped >= 0),
            sessions_ended     int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0),
            reason             text CHECK (length(reason) <= 1000),
            caller             jsonb CHECK (jsonb_typeof(caller) = 'object'),
            stopped_by         text NOT NULL DEFAULT 'admin',
            database_user      text NOT NULL DEFAULT session_user,
            client_address     inet DEFAULT inet_client_addr(),
            stopped_at         timestamptz NOT NULL
        );
        RAISE NOTICE 'table emergency_stops: made';
    END IF;
    IF to_regclass('batch_changes') IS NULL THEN
        CREATE TABLE batch_changes (
            id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            operation          text NOT NULL CHECK (operation IN ('timeout_stuck_jobs', 'repair_stuck_jobs')),
            job_id             text NOT NULL,
            previous_status    text NOT NULL,
            executions_stopped bigint CHECK (executions_stopped >= 0),
            attempt            int CHECK (attempt > 0),
            changed_by         text NOT NULL DEFAULT 'admin',
            database_user      text NOT NULL DEFAULT session_user,
            client_address     inet DEFAULT inet_client_addr(),
            changed_at         timestamptz NOT NULL,
            CHECK (CASE operation WHEN 'timeout_stuck_jobs' THEN executions_stopped ELSE attempt END IS NOT NULL)
        );
        RAISE NOTICE 'table batch_changes: made';
    END IF;
END;
$$;

-- keep_append_only(): refuses every change of the records but their owner's, whatever rights were granted.
-- Raises   insufficient_privilege (42501)
-- Locks    nothing
CREATE OR REPLACE FUNCTION keep_append_only()
RETURNS trigger LANGUAGE plpgsql SECURITY INVOKER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_user <> (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = TG_RELID) THEN
        RAISE insufficient_privilege
            USING MESSAGE = format('table %s is append-only', TG_TABLE_NAME),
                  HINT = 'Only its owner may change or remove a row.';
    END IF;
    RETURN NULL;
END;
$$;

-- The steps, each of which says what it did. Rights on functions that are dropped are kept for those that replace them.
DO $$
DECLARE
    v_step record;
BEGIN
    PERFORM set_config('beacon_stop.rights', (
        SELECT COALESCE(jsonb_agg(DISTINCT jsonb_build_object('function', p.proname, 'role', g.grantee)), '[]')::text
        FROM pg_proc p, aclexplode(p.proacl) AS g
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND g.grantee NOT IN (0, p.proowner)
          AND 'search_path=' || current_setting('search_path') = ANY (p.proconfig)), true);
    FOR v_step IN SELECT * FROM installation_steps() LOOP
        IF v_step.statement IS NOT NULL THEN
            EXECUTE v_step.statement;
        END IF;
        RAISE NOTICE USING MESSAGE = v_step.does;
    END LOOP;
    IF NOT FOUND THEN
        RAISE NOTICE 'columns, indexes, triggers: all there already';
    END IF;
END;
$$;

DO $$
DECLARE
    v_table   text;
    v_grantee name;
BEGIN
    FOREACH v_table IN ARRAY '{emergency_stops,batch_changes}'::text[] LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass(v_table) AND t.tgname = 'append_only') THEN
            EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %I
                                FOR EACH STATEMENT EXECUTE FUNCTION keep_append_only()', v_table);
        END IF;
        -- Default privileges of the installer may have granted more than reading, of the table and of its sequence.
        FOR v_grantee IN
            SELECT DISTINCT pg_get_userbyid(g.grantee)
            FROM pg_class c, aclexplode(c.relacl) g
            WHERE c.oid IN (to_regclass(v_table), to_regclass(v_table || '_id_seq')) AND g.grantee NOT IN (0, c.relowner)
        LOOP
            EXECUTE format('REVOKE INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER ON %I FROM %I', v_table, v_grantee);
            EXECUTE format('REVOKE ALL ON SEQUENCE %I FROM %I', v_table || '_id_seq', v_grantee);
        END LOOP;
        EXECUTE format('REVOKE ALL ON %I FROM PUBLIC', v_table);
        EXECUTE format('REVOKE ALL ON SEQUENCE %I FROM PUBLIC', v_table || '_id_seq');
    END LOOP;
END;
$$;

COMMENT ON TABLE emergency_stops IS 'Append-only: one row for each emergency stop and for each release.';
COMMENT ON COLUMN emergency_stops.stopped_at IS 'When the stop, or the release, was made.';
COMMENT ON COLUMN emergency_stops.new_status IS 'The state that the job was left in; NULL in rows of version 1.0.';
COMMENT ON COLUMN emergency_stops.sessions_ended IS 'How many sessions that held the job were ended.';
COMMENT ON COLUMN emergency_stops.caller IS 'What the caller says of itself: actor, client (its address), request_id.';
COMMENT ON COLUMN emergency_stops.client_address IS 'Where the database session came from; NULL for a Unix socket.';
COMMENT ON TABLE batch_changes IS 'Append-only: one row for each job that a batch, timeout_stuck_jobs or repair_stuck_jobs, has changed.';
COMMENT ON COLUMN batch_changes.executions_stopped IS 'Of timeout_stuck_jobs: how many executions it failed.';
COMMENT ON COLUMN batch_changes.attempt IS 'Of repair_stuck_jobs: 1 for the first republication of the job, at most 3.';
