-- Ends the installation: says what will hurt, and refuses what would keep the brake from working.
--
-- Raises   object_not_in_prerequisite_state (55000)  the brake would not work; the message says what is in the way
DO $$
DECLARE
    v_fault  text;
    v_faults text[];
BEGIN
    IF EXISTS (SELECT FROM pg_attribute a
               WHERE a.attrelid IN (to_regclass('jobs'), to_regclass('executions'))
                 AND a.attname IN ('created_at', 'updated_at', 'started_at', 'completed_at')
                 AND a.atttypid = 'timestamp'::regtype) THEN
        RAISE NOTICE USING
            MESSAGE = format('columns without a time zone are taken to be in %s, the TimeZone of this session',
                             current_setting('timezone')),
            HINT = 'If the application writes them in another one, set TimeZone to that and install again.';
    END IF;

    -- Of executions, an index has those that have not ended. Of jobs, no index has all states: many rows are enough.
    PERFORM set_config('enable_seqscan', 'off', true);
    FOR v_fault IN
        SELECT f.* FROM emergency_stop_faults() AS f
        UNION
        SELECT format('warning: everyone may create functions in schema %I, also such as take the place of what these '
                      'functions call: REVOKE CREATE ON SCHEMA %1$I FROM PUBLIC', current_schema())
        WHERE has_schema_privilege('public', current_schema(), 'CREATE')
        UNION
        SELECT format('warning: executions have the status %L, which is none of the six that a stop knows: '
                      'it leaves them alone', e.status COLLATE "C")
        FROM executions e
        WHERE e.status NOT IN ('completed', 'failed', 'cancelled')
          AND e.status NOT IN ('pending', 'running', 'processing')
        UNION
        SELECT format('warning: jobs have the status %L, which is none of the six that are known: '
                      'the batches leave them alone', j.status COLLATE "C")
        FROM (SELECT o.status FROM jobs o LIMIT 100000) AS j
        WHERE j.status NOT IN ('created', 'pending', 'processing', 'completed', 'failed', 'cancelled')
        ORDER BY 1
    LOOP
        IF starts_with(v_fault, 'warning: ') THEN
            RAISE WARNING USING MESSAGE = substr(v_fault, length('warning: ') + 1);
        ELSE
            v_faults := v_faults || v_fault;
        END IF;
    END LOOP;
    IF v_faults IS NOT NULL THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = v_faults[1], DETAIL = array_to_string(v_faults, E'\n'),
                  HINT = 'Nothing was installed or changed.';
    END IF;
    PERFORM set_config('enable_seqscan', 'on', true);
END;
$$;
