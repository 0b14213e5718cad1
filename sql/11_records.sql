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
    END IF;
END;
$$;
COMMENT ON TABLE emergency_stops IS
    'Append-only: a row for each stop and each release, made at stopped_at. new_status is NULL in the rows of version 1.0.';
COMMENT ON TABLE batch_changes IS 'Append-only: a row for each job that timeout_stuck_jobs or repair_stuck_jobs has changed.';

-- keep_append_only(): refuses every change of the records but their owner's, whatever rights were granted.
-- Raises   insufficient_privilege (42501)
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

DO $$
DECLARE
    v_step    record;
    v_grantee text;
BEGIN
    -- Rights on functions that are dropped are kept for those that replace them.
    PERFORM set_config('beacon_stop.rights', (
        SELECT COALESCE(jsonb_agg(DISTINCT jsonb_build_object('function', p.proname, 'role', g.grantee)), '[]')::text
        FROM pg_proc p, aclexplode(p.proacl) AS g
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND g.grantee NOT IN (0, p.proowner)
          AND 'search_path=' || current_setting('search_path') = ANY (p.proconfig)), true);

    FOR v_step IN SELECT * FROM installation_steps() LOOP
        RAISE NOTICE USING MESSAGE = v_step.does;
        -- Triggers are made in 98_manifest.sql, when all their functions are there.
        IF v_step.does NOT LIKE 'trigger %' THEN
            EXECUTE v_step.statement;
        END IF;
    END LOOP;
    IF NOT FOUND THEN
        RAISE NOTICE 'columns, indexes, triggers: all there already';
    END IF;

    -- Default privileges of the installer may have granted more than reading.
    FOR v_grantee IN
        SELECT DISTINCT CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END
        FROM pg_class c, aclexplode(c.relacl) g
        WHERE c.oid IN (to_regclass('emergency_stops'), to_regclass('emergency_stops_id_seq'),
                        to_regclass('batch_changes'), to_regclass('batch_changes_id_seq')) AND g.grantee <> c.relowner
    LOOP
        EXECUTE format('REVOKE INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER ON emergency_stops, batch_changes FROM %s;'
                       'REVOKE ALL ON SEQUENCE emergency_stops_id_seq, batch_changes_id_seq FROM %1$s', v_grantee);
    END LOOP;
END;
$$;
REVOKE ALL ON emergency_stops, batch_changes FROM PUBLIC;
