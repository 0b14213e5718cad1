-- emergency_stop_jobs(ids, reasons): stops several jobs in one transaction, each as emergency_stop_job does: one commit, one
-- flush. It waits for nobody: a job that others hold is left out, to be stopped by itself.
-- Returns  a row for each id, in the order given: id, and summary, emergency_stop_job's answer; NULL where other transactions
--          held the job for longer than 5 ms: of that job nothing was changed, the others are stopped
-- Raises   what emergency_stop_job raises, but for lock_not_available
-- Locks    what emergency_stop_job locks, job by job in the order given, all until the transaction ends

CREATE OR REPLACE FUNCTION emergency_stop_jobs(ids text[], reasons text[] DEFAULT NULL)
RETURNS TABLE (id text, summary json) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_reason       text;
BEGIN
    FOR id, v_reason IN SELECT j.id, j.reason FROM unnest(ids, reasons) AS j (id, reason) LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '5ms', true);
            summary := emergency_stop_job(id, v_reason);
        EXCEPTION WHEN lock_not_available THEN
            summary := NULL;
        END;
        RETURN NEXT;
    END LOOP;
    -- Before the commit, in which NOTIFY waits for others who are committing.
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_jobs(text[], text[]) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_jobs(text[], text[]) IS
    'Stops several jobs in one transaction; returns for each emergency_stop_job''s summary, or NULL where others hold the job: that one is not stopped.';
