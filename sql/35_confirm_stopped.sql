-- confirm_stopped(execution_ids): for workers, who say by it that they have dropped these executions after a stop.
-- Each that a stop has failed gets the time as "confirmed_at" in its output; the others stay as they are, and so do
-- those that were confirmed before. execution_ids is an array of the type of executions.id.
-- Returns  how many of them a stop had failed and were not confirmed yet
-- Raises   what a trigger or constraint of the application's raises
-- Locks    these executions, FOR NO KEY UPDATE, in the order of their ids, until the transaction ends; each wait is
--          bounded by lock_timeout, if that is set
DO $$
BEGIN
    -- The installation has dropped the one for another type, if the column had that.
    EXECUTE format($function$
        CREATE OR REPLACE FUNCTION confirm_stopped(execution_ids %1$s[])
        RETURNS int LANGUAGE plpgsql VOLATILE SECURITY DEFINER
        SET search_path FROM CURRENT
        SET row_security = off
        AS '
        DECLARE
            v_confirmed int;
        BEGIN
            PERFORM FROM executions e WHERE e.id = ANY (confirm_stopped.execution_ids) ORDER BY e.id FOR NO KEY UPDATE;
            UPDATE executions e
            SET output = e.output || jsonb_build_object(''confirmed_at'', utc_seconds(clock_timestamp()))
            WHERE e.id = ANY (confirm_stopped.execution_ids) AND e.status = ''failed''
              AND e.output @> ''{"emergency_stop": true}'' AND NOT e.output ? ''confirmed_at'';
            GET DIAGNOSTICS v_confirmed = ROW_COUNT;
            RETURN v_confirmed;
        END;
        ';
        REVOKE ALL ON FUNCTION confirm_stopped(%1$s[]) FROM PUBLIC;
        COMMENT ON FUNCTION confirm_stopped(%1$s[]) IS 'For workers: these executions have been dropped. '
            'Returns how many of them a stop had failed and were not confirmed yet.';
        $function$, (SELECT a.atttypid::regtype FROM pg_attribute a
                     WHERE a.attrelid = 'executions'::regclass AND a.attname = 'id'));
END;
$$;
