-- emergency_stop_end_blockers(id): ends the sessions that emergency_stop_blockers(id) names, and no others.
-- Returns  {"job_id": "a", "sessions_ended": 2, "not_ended": []}; where the owner of this function may not end one
--          of them, that one is in not_ended, as {"pid", "application_name", "state", "transaction_seconds"}, and
--          none is ended, since the stop would go on waiting for it
-- Raises   nothing of its own
-- Locks    nothing

DO $$
BEGIN
    PERFORM pg_advisory_lock(hashtext('beacon-stop install'));
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), false);
END;
$$;

CREATE OR REPLACE FUNCTION emergency_stop_end_blockers(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_pids      int[];
    v_not_ended json;
    v_ended     bigint;
BEGIN
    -- The rule of pg_terminate_backend: superusers' sessions only by a superuser, others by pg_signal_backend or their role.
    SELECT array_agg(b.pid),
           json_agg(json_build_object('pid', b.pid, 'application_name', b.application_name, 'state', b.state,
                                      'transaction_seconds', b.transaction_seconds))
               FILTER (WHERE NOT (u.rolsuper OR COALESCE(NOT r.rolsuper AND (
                   pg_has_role(u.oid, r.oid, 'USAGE') OR pg_has_role(u.oid, 'pg_signal_backend', 'USAGE')), false))
                   OR b.pid = 0)
    INTO v_pids, v_not_ended
    FROM emergency_stop_blockers(emergency_stop_end_blockers.id) b
    JOIN pg_roles u ON u.rolname = current_user
    LEFT JOIN pg_stat_activity a ON a.pid = b.pid
    LEFT JOIN pg_roles r ON r.oid = a.usesysid;

    IF v_not_ended IS NULL THEN
        SELECT count(*) FILTER (WHERE pg_terminate_backend(p.pid)) INTO v_ended FROM unnest(v_pids) AS p (pid);
    END IF;
    RETURN json_build_object('job_id', emergency_stop_end_blockers.id, 'sessions_ended', COALESCE(v_ended, 0),
                             'not_ended', COALESCE(v_not_ended, '[]'));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_end_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_end_blockers(text) IS
    'Ends exactly the sessions that emergency_stop_blockers names, all or none; returns {job_id, sessions_ended, not_ended}. Locks nothing.';

DO $$
BEGIN
    PERFORM pg_advisory_unlock(hashtext('beacon-stop install'));
END;
$$;
