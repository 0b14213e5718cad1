-- Ends the installation: says what will hurt, and refuses what would keep the brake from working.
--
-- Raises   object_not_in_prerequisite_state (55000)  the brake would not work; the message says what is in the way
DO $$
DECLARE
    v_fault  text;
    v_faults text[];
BEGIN
    IF EXISTS (SELECT FROM pg_attribute a
               WHERE a.attrelid IN (to_regclass('jobs'), to_regclass('executions')) AND a.atttypid = 'timestamp'::regtype
                 AND a.attname IN ('created_at', 'updated_at', 'started_at', 'completed_at')) THEN
        RAISE NOTICE USING
            MESSAGE = format('columns without a time zone are taken to be in %s, the TimeZone of this session', current_setting('timezone')),
            HINT = 'If the application writes them in another one, set TimeZone to that and install again.';
    END IF;
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE WARNING USING
            MESSAGE = format('everyone may create functions in schema %I, also such as take the place of what these functions call', current_schema()),
            HINT = format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC;', current_schema());
    END IF;

    -- The index of what has not ended finds executions in other states, whatever the size of the table. No index finds such
    -- jobs: of a large table, what its statistics say is enough.
    PERFORM set_config('enable_seqscan', 'off', true);
    FOR v_fault IN
        SELECT f.* FROM emergency_stop_faults() AS f
        UNION
        SELECT format('warning: executions have the status %L, which is none of the six that a stop knows: it leaves them alone', e.status)
        FROM executions e
        WHERE e.status NOT IN ('completed', 'failed', 'cancelled') AND e.status NOT IN ('pending', 'running', 'processing')
        UNION
        SELECT format('warning: jobs have the status %L, which is none of the six that are known: the batches leave them alone', s.status)
        FROM (
            SELECT j.status FROM jobs j WHERE pg_relation_size('jobs') < 100 * 1024 * 1024
            UNION ALL
            SELECT unnest(p.most_common_vals::text::text[])
            FROM pg_stats p
            WHERE p.schemaname = current_schema() AND p.tablename = 'jobs' AND p.attname = 'status'
              AND pg_relation_size('jobs') >= 100 * 1024 * 1024
        ) AS s (status)
        WHERE s.status NOT IN ('created', 'pending', 'processing', 'completed', 'failed', 'cancelled')
        ORDER BY 1
    LOOP
        IF starts_with(v_fault, 'warning: ') THEN
            RAISE WARNING USING MESSAGE = substr(v_fault, length('warning: ') + 1);
        ELSE
            v_faults := v_faults || v_fault;
        END IF;
    END LOOP;
    PERFORM set_config('enable_seqscan', 'on', true);
    IF v_faults IS NOT NULL THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = v_faults[1],
                  DETAIL = array_to_string(v_faults, E'\n'),
                  HINT = 'Nothing was installed or changed.';
    END IF;
END;
$$;
