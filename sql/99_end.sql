-- Ends the installation: rights that an earlier version's functions had, what will hurt, and whether the brake works.
--
-- Raises   object_not_in_prerequisite_state (55000)  the brake would not work; the message says what is in the way

-- Whoever had a right on a function of an earlier version has it on the one of the same name that took its place.
DO $$
DECLARE
    v_right record;
BEGIN
    FOR v_right IN
        SELECT p.oid::regprocedure AS function, r.role::oid::regrole AS role
        FROM jsonb_to_recordset(current_setting('beacon_stop.rights')::jsonb) AS r (function text, role oid)
        JOIN pg_proc p ON p.proname = r.function AND p.pronamespace = quote_ident(current_schema())::regnamespace
        WHERE 'search_path=' || current_setting('search_path') = ANY (p.proconfig)
          AND NOT has_function_privilege(r.role, p.oid, 'EXECUTE')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', v_right.function, v_right.role);
        RAISE NOTICE USING MESSAGE = format('function %s: %s may execute it, as before', v_right.function, v_right.role);
    END LOOP;
END;
$$;

DO $$
DECLARE
    v_states text;
BEGIN
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE WARNING USING
            MESSAGE = format('everyone may create functions in schema %I, also such as take the place of what these functions call', current_schema()),
            HINT = format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC;', current_schema());
    END IF;
    IF EXISTS (SELECT FROM pg_attribute a
               WHERE a.attrelid IN (to_regclass('jobs'), to_regclass('executions')) AND a.atttypid = 'timestamp'::regtype
                 AND a.attname IN ('created_at', 'updated_at', 'started_at', 'completed_at')) THEN
        RAISE NOTICE USING
            MESSAGE = format('columns without a time zone are taken to be in %s, the TimeZone of this session', current_setting('timezone')),
            HINT = 'If the application writes them in another one, set TimeZone to that and install again.';
    END IF;

    -- By the index of what has not ended, whatever the size of the table. emergency_stop_faults() warns below of those that
    -- the table's statistics have.
    PERFORM set_config('enable_seqscan', 'off', true);
    SELECT string_agg(DISTINCT quote_literal(e.status), ', ') INTO v_states
    FROM executions e
    WHERE e.status NOT IN ('completed', 'failed', 'cancelled') AND e.status NOT IN ('pending', 'running', 'processing')
      AND e.status NOT IN (SELECT unnest(p.most_common_vals::text::text[])
                           FROM pg_stats p
                           WHERE p.schemaname = current_schema() AND p.tablename = 'executions' AND p.attname = 'status');
    PERFORM set_config('enable_seqscan', 'on', true);
    IF v_states IS NOT NULL THEN
        RAISE WARNING USING
            MESSAGE = format('table executions has rows in states that are not known: %s', v_states),
            HINT = 'A stop leaves such executions alone, and says so.';
    END IF;

    -- No index has them all. Of a large table it is enough what its statistics say.
    SELECT string_agg(DISTINCT quote_literal(s.status), ', ') INTO v_states
    FROM (
        SELECT j.status FROM jobs j WHERE pg_relation_size('jobs') < 100 * 1024 * 1024
        UNION ALL
        SELECT unnest(p.most_common_vals::text::text[])
        FROM pg_stats p
        WHERE p.schemaname = current_schema() AND p.tablename = 'jobs' AND p.attname = 'status'
          AND pg_relation_size('jobs') >= 100 * 1024 * 1024
    ) AS s (status)
    WHERE s.status NOT IN ('created', 'pending', 'processing', 'completed', 'failed', 'cancelled');
    IF v_states IS NOT NULL THEN
        RAISE WARNING USING
            MESSAGE = format('table jobs has rows in states that are not known: %s', v_states),
            HINT = 'A stop fails such a job. The batches leave it alone.';
    END IF;
END;
$$;

DO $$
DECLARE
    v_fault  text;
    v_faults text[] := ARRAY(SELECT s.does FROM installation_steps() AS s);
BEGIN
    IF v_faults <> '{}' THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('still missing after the installation: %s', array_to_string(v_faults, '; '));
    END IF;
    FOR v_fault IN SELECT f.* FROM emergency_stop_faults() AS f LOOP
        IF v_fault LIKE 'warning: %' THEN
            RAISE WARNING USING MESSAGE = substr(v_fault, length('warning: ') + 1);
        ELSE
            v_faults := v_faults || v_fault;
        END IF;
    END LOOP;
    IF v_faults <> '{}' THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = v_faults[1],
                  DETAIL = array_to_string(v_faults, E'\n'),
                  HINT = 'Nothing was installed or changed.';
    END IF;
END;
$$;
