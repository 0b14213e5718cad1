-- emergency_stop_dry_run(id): what a stop of this job would do now. It does all that the stop does, on the same rows
-- and with the same locks, and rolls it back. Nobody is notified, no session is ended.
-- Returns  emergency_stop_job's answer with two more keys, "dry_run": true and "took_ms": 3.1 (milliseconds);
--          {"error": "job not found", "job_id": "a"}
-- Raises   what emergency_stop_job raises
--          invalid_parameter_value (22023)  the job has more than 10,000 active executions
-- Locks    what emergency_stop_job locks, while it runs; nothing afterwards
CREATE OR REPLACE FUNCTION emergency_stop_dry_run(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id           CONSTANT jobs.id%TYPE := to_job_id(emergency_stop_dry_run.id);
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_began        CONSTANT timestamptz := clock_timestamp();
    v_is_large     boolean;
    v_answer       json;
    v_took         numeric;
BEGIN
    BEGIN
        PERFORM set_config('lock_timeout', '10ms', true);
        v_is_large := EXISTS (
            SELECT FROM executions e
            WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') OFFSET 10000);
        PERFORM set_config('lock_timeout', v_lock_timeout, true);
    EXCEPTION WHEN lock_not_available THEN  -- a whole table is locked: the stop names those who lock it
    END;
    IF v_is_large IS NOT TRUE THEN
        BEGIN
            v_answer := emergency_stop_job(emergency_stop_dry_run.id);
            v_took := round(extract(epoch FROM clock_timestamp() - v_began) * 1000, 1);
            RAISE SQLSTATE 'BS002';
        EXCEPTION WHEN SQLSTATE 'BS002' THEN  -- all of it is undone, the settings and locks of the stop included
            IF v_answer IS NULL THEN
                RAISE;  -- it is a trigger's of the application's
            END IF;
        END;
        v_is_large := (v_answer ->> 'executions_stopped')::bigint > 10000;
    END IF;
    IF v_is_large THEN
        RAISE invalid_parameter_value
            USING SCHEMA = 'beacon_stop',
                  MESSAGE = format('job %L has more than 10000 active executions: expected at most that many for a '
                                   'dry run', emergency_stop_dry_run.id),
                  HINT = 'emergency_stop_status(id) counts them without changing anything.';
    END IF;

    IF (v_answer ->> 'ok')::boolean THEN  -- two more keys, at the end
        RETURN (left(v_answer::text, -1) || format(', "dry_run": true, "took_ms": %s}', v_took))::json;
    END IF;
    RETURN v_answer;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_dry_run(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_dry_run(text) IS
    'Rehearses emergency_stop_job and rolls it back; returns its answer with dry_run and took_ms. '
    'Raises what the stop raises, 22023 for a job with more than 10,000 active executions.';
