-- emergency_stop_jobs(ids, reasons): stops several jobs in one transaction, as emergency_stop_job does each: one commit, one flush.
-- Returns  a row for each of them: id, and summary, emergency_stop_job's answer; NULL where other transactions held the
--          job for longer than lock_timeout: of that job nothing was changed, the others are stopped
-- Raises   what emergency_stop_job raises, but for lock_not_available and deadlock_detected
-- Locks    what emergency_stop_job locks, job by job in the order of the ids, all until the transaction ends

DO $$
BEGIN
    PERFORM pg_advisory_lock(hashtext('beacon-stop install'));
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), false);
END;
$$;

CREATE OR REPLACE FUNCTION emergency_stop_jobs(ids text[], reasons text[] DEFAULT NULL)
RETURNS TABLE (id text, summary json) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_reason text;
BEGIN
    FOR id, v_reason IN SELECT j.id, j.reason FROM unnest(ids, reasons) AS j (id, reason) ORDER BY j.id LOOP
        BEGIN
            summary := emergency_stop_job(id, v_reason);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            summary := NULL;
        END;
        RETURN NEXT;
    END LOOP;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_jobs(text[], text[]) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_jobs(text[], text[]) IS
    'Stops several jobs in one transaction; returns for each emergency_stop_job''s summary, or NULL where others hold the job for longer than lock_timeout.';

DO $$
BEGIN
    PERFORM pg_advisory_unlock(hashtext('beacon-stop install'));
END;
$$;
