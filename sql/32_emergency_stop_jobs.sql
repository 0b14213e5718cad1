-- emergency_stop_jobs(ids, reason, caller, force, patience): stops several jobs in one transaction, each as
-- emergency_stop_job does: one commit, one flush. A job that others hold does not hold up the others; it is left out,
-- to be tried again. caller is one object for all of them, or an array with an object for each. force ends the sessions
-- that have held a job for lock_timeout (10 s where that is 0), and no others.
-- Returns  a row for each id, in the order given: id, and summary, which is emergency_stop_job's answer, or
--          {"error": "job is locked", "job_id": "a", "blocked_by": [...]} where others held the job for longer than
--          patience (with "not_ended", as emergency_stop_job says; with "message", where nobody is known to hold it):
--          of that job nothing was changed
-- Raises   what emergency_stop_job raises, but for lock_not_available
-- Locks    what emergency_stop_job locks, job by job in the order of the ids, all until the transaction ends
CREATE OR REPLACE FUNCTION emergency_stop_jobs(
    ids text[], reason text DEFAULT NULL, caller jsonb DEFAULT NULL, force boolean DEFAULT false,
    patience interval DEFAULT '5 ms')
RETURNS TABLE (id text, summary json) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_is_several   CONSTANT text := current_setting('beacon_stop.is_several', true);  -- of the call whose trigger
    v_waited       CONSTANT text := current_setting('beacon_stop.waited', true);      -- has called this one
    v_summaries    json[] := '{}'::json[];
    v_job          record;
    v_detail       text;
BEGIN
    PERFORM require_read_committed('emergency_stop_jobs');
    PERFORM set_config('beacon_stop.is_several', 'on', true);
    -- Only against those who have held a job for lock_timeout.
    PERFORM set_config('beacon_stop.waited', CASE v_lock_timeout WHEN '0' THEN '10s' ELSE v_lock_timeout END, true)
    WHERE force;
    FOR v_job IN  -- in one order for all callers, so that two of them do not wait for each other
        SELECT j.id, j.number,
               CASE jsonb_typeof(caller) WHEN 'array' THEN caller -> (j.number - 1)::int ELSE caller END AS caller
        FROM unnest(ids) WITH ORDINALITY AS j (id, number)
        ORDER BY j.id
    LOOP
        BEGIN
            PERFORM limit_lock_wait(patience);
            v_summaries[v_job.number] := emergency_stop_job(v_job.id, reason, force, v_job.caller);
        EXCEPTION WHEN lock_not_available THEN
            GET STACKED DIAGNOSTICS v_detail = PG_EXCEPTION_DETAIL;
            v_summaries[v_job.number] := CASE
                WHEN v_detail LIKE '{%'
                THEN format('{"error": "job is locked", "job_id": %s, %s', to_json(v_job.id), substr(v_detail, 2))::json
                WHEN v_detail = '' THEN json_build_object(
                    'error', 'job is locked', 'job_id', v_job.id, 'blocked_by', '[]'::json, 'message', SQLERRM)
                ELSE json_build_object('error', 'job is locked', 'job_id', v_job.id, 'blocked_by', v_detail::json)
            END;
        END;
    END LOOP;
    -- This stop is done with all of them only now.
    PERFORM set_config('beacon_stop.is_several', v_is_several, true);
    PERFORM pg_advisory_xact_lock_shared(job_barrier(to_job_id(j.id)::text))
    FROM unnest(ids, v_summaries) AS j (id, summary)
    WHERE j.summary ->> 'stopped_at' IS NOT NULL;
    -- Before the commit, in which NOTIFY waits for others who are committing.
    PERFORM set_config('lock_timeout', v_lock_timeout, true), set_config('beacon_stop.waited', v_waited, true);
    RETURN QUERY SELECT j.id, j.summary FROM unnest(ids, v_summaries) AS j (id, summary);
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_jobs(text[], text, jsonb, boolean, interval) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_jobs(text[], text, jsonb, boolean, interval) IS
    'Stops several jobs in one transaction; returns for each what emergency_stop_job answers, or {error, job_id, '
    'blocked_by} where others hold it: that one is not stopped. Raises and locks what that does, but for 55P03.';
