-- emergency_stop_blockers(id): the sessions that would hold up a stop of a job now. No stop need be waiting.
-- Returns  a row for each: pid (0 for a prepared transaction), application_name (a prepared transaction's gid),
--          database_user, state, transaction_seconds (the age of its transaction), query (the first 200 characters of its
--          last statement); no row for an unknown job
-- Raises   read_only_sql_transaction (25006)  the transaction is read-only, and others hold rows of the job
-- Locks    for a moment those rows of the job that transactions which still run have locked before
--
-- It reads who holds what, and waits for nothing. What can hold up a stop: the job's barrier, which whoever starts an
-- execution shares; the rows of the job and of its active executions; and locks on whole tables.

-- sessions_of_part(part, relation, began): the transactions of which this number can be a part, a savepoint that was released or the
-- block of a function. PostgreSQL knows whose it is, but tells nobody but a session that waits for it.
-- Returns  xid: of each transaction that is older, had begun by then, and has locked rows of that table; ambiguous:
--          whether there are several
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION sessions_of_part(part xid, relation regclass, began timestamptz)
RETURNS TABLE (xid xid, ambiguous boolean) LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
    SELECT t.transactionid, count(*) OVER () > 1
    FROM pg_locks t
    LEFT JOIN pg_stat_activity a ON a.pid = t.pid
    LEFT JOIN pg_prepared_xacts p ON t.pid IS NULL AND p.transaction = t.transactionid
    WHERE is_running(part) AND t.locktype = 'transactionid' AND t.granted AND t.pid IS DISTINCT FROM pg_backend_pid()
      AND age(t.transactionid) > age(part)
      AND (a.backend_xid = t.transactionid OR p.transaction IS NOT NULL)
      AND COALESCE(a.xact_start, p.prepared) <= began IS NOT FALSE
      AND EXISTS (SELECT FROM pg_locks l
                  WHERE l.virtualtransaction = t.virtualtransaction AND l.pid IS NOT DISTINCT FROM t.pid AND l.locktype = 'relation'
                    AND l.relation = sessions_of_part.relation AND l.mode IN ('RowShareLock', 'RowExclusiveLock'));
END;
$$;
REVOKE ALL ON FUNCTION sessions_of_part(xid, regclass, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION sessions_of_part(xid, regclass, timestamptz) IS 'The transactions of which this number can be a part, and whether there are several.';

-- running_row_holders(id, began): the transactions that hold the row of a job, or of one of its active executions, against a stop.
-- Returns  xid: the transaction; xmax: as the row has it; ambiguous: it may be another one, so that nobody should be ended because of it. That is so
--          where a number can also mean several transactions at once (a multixact), or be a part of one of several
-- Raises   read_only_sql_transaction (25006)  as above
-- Locks    as above
CREATE OR REPLACE FUNCTION running_row_holders(id text, began timestamptz)
RETURNS TABLE (xid xid, xmax xid, ambiguous boolean) LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id      CONSTANT jobs.id%TYPE := to_job_id(running_row_holders.id);
    v_running CONSTANT xid[] := ARRAY(SELECT l.transactionid FROM pg_locks l WHERE l.locktype = 'transactionid' AND l.granted);
    v_free    tid[];
    v_job_is_free boolean;
    v_row     record;
    v_members xid[];
BEGIN
    -- A transaction number in xmax does not tell in which mode the row is locked. What can be locked is not held.
    BEGIN
        PERFORM limit_lock_wait('10ms');
        v_job_is_free := EXISTS (SELECT FROM (
            SELECT FROM jobs j WHERE j.id = v_id AND j.xmax <> '0' FOR NO KEY UPDATE SKIP LOCKED) f);
        v_free := ARRAY(SELECT e.ctid FROM executions e
                        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') AND e.xmax <> '0'
                        FOR NO KEY UPDATE SKIP LOCKED);
        RAISE triggered_action_exception;
    EXCEPTION
        WHEN triggered_action_exception THEN  -- which lets go of them
        WHEN lock_not_available THEN  -- a whole table is locked: whoever holds that is known by it
            RETURN;
    END;
    FOR v_row IN
        SELECT j.xmax, j.tableoid AS relation FROM jobs j WHERE j.id = v_id AND j.xmax <> '0' AND NOT v_job_is_free
        UNION
        SELECT e.xmax, e.tableoid FROM executions e
        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') AND e.xmax <> '0' AND e.ctid <> ALL (v_free)
    LOOP
        v_members := NULL;
        IF mxid_age(v_row.xmax) > 0 THEN  -- it may be the number of a multixact
            BEGIN
                v_members := ARRAY(SELECT m.xid FROM pg_get_multixact_members(v_row.xmax) m WHERE m.mode <> 'keysh');
            EXCEPTION WHEN invalid_parameter_value OR internal_error THEN  -- it is none, or one that is long gone
            END;
        END IF;
        RETURN QUERY
            SELECT h.number, v_row.xmax, v_row.xmax = ANY (v_running) AND COALESCE(cardinality(v_members) > 0, false)
            FROM unnest(v_members || v_row.xmax) AS h (number)
            WHERE h.number = ANY (v_running)
            UNION ALL
            SELECT p.xid, v_row.xmax, p.ambiguous
            FROM unnest(COALESCE(v_members, ARRAY[v_row.xmax])) AS h (number)
            CROSS JOIN LATERAL sessions_of_part(h.number, v_row.relation, began) p
            WHERE h.number <> ALL (v_running);
    END LOOP;
END;
$$;
REVOKE ALL ON FUNCTION running_row_holders(text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION running_row_holders(text, timestamptz) IS 'The transactions that hold rows of this job against a stop, and whether that is ambiguous.';

-- job_holders(id, began): as emergency_stop_blockers, and what has to be known before a session is ended. Where several
-- transactions may hold a row, only those count that had begun by then.
-- Returns  the same columns; and since: when its transaction began, NULL if it has none or that is not to be seen;
--          may_be_ended: whether the owner of these functions may end it, and it is beyond doubt that it holds the job
-- Raises, Locks  as emergency_stop_blockers
CREATE OR REPLACE FUNCTION job_holders(id text, began timestamptz)
RETURNS TABLE (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text,
               since timestamptz, may_be_ended boolean)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_key     CONSTANT text := to_job_id(job_holders.id)::text;
    v_barrier CONSTANT bigint := job_barrier(v_key);
    v_owner   CONSTANT oid := quote_ident(current_user)::regrole::oid;
BEGIN
    PERFORM pg_stat_clear_snapshot();  -- or a transaction that looks again is told what sessions did when it looked first
    RETURN QUERY
    WITH locks AS MATERIALIZED (
        SELECT l.*, a.state
        FROM pg_locks l
        LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.pid IS DISTINCT FROM pg_backend_pid()
          AND (l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) OR l.locktype = 'transactionid')
    ), barrier AS (
        SELECT l.pid, l.virtualtransaction,
               -- A stop at work has the barrier alone. One that is done, or a batch, shares it with itself besides.
               -- Of one that has just ended, the lock was seen before the state was.
               NOT bool_or(l.mode = 'ShareLock') AND l.pid IS NOT NULL
               AND (bool_and(l.state NOT LIKE 'idle%') IS NOT FALSE OR NOT EXISTS (
                       SELECT FROM pg_locks n
                       WHERE n.locktype = 'advisory' AND n.granted AND n.objsubid = 1 AND n.pid = l.pid
                         AND n.classid = (v_barrier >> 32 & 4294967295)::oid AND n.objid = (v_barrier & 4294967295)::oid)) AS stop_at_work
        FROM locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
          AND l.classid = (v_barrier >> 32 & 4294967295)::oid AND l.objid = (v_barrier & 4294967295)::oid
        GROUP BY l.pid, l.virtualtransaction
    ), rows AS MATERIALIZED (
        SELECT l.pid, l.virtualtransaction, r.xmax, r.ambiguous
        FROM running_row_holders(v_key, began) r
        JOIN locks l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = r.xid
    ), certain AS MATERIALIZED (
        SELECT b.pid, b.virtualtransaction FROM barrier b
        UNION
        SELECT r.pid, r.virtualtransaction FROM rows r WHERE NOT r.ambiguous
        UNION
        -- Who waits for such a lock is in the way as well: later requests queue behind it.
        SELECT l.pid, l.virtualtransaction
        FROM locks l
        WHERE l.locktype = 'relation' AND l.relation IN ('jobs'::regclass, 'executions'::regclass, 'emergency_stops'::regclass)
          AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    ), found AS (
        SELECT c.pid, c.virtualtransaction, false AS ambiguous FROM certain c
        UNION
        -- Of those who may hold a row, one who is known to hold the job is the one.
        SELECT r.pid, r.virtualtransaction, true
        FROM rows r
        WHERE r.ambiguous AND NOT EXISTS (SELECT FROM rows o JOIN certain c USING (virtualtransaction) WHERE o.xmax = r.xmax)
    )
    SELECT COALESCE(f.pid, 0), COALESCE(p.gid, a.application_name), COALESCE(p.owner, a.usename)::text,
           CASE WHEN f.pid IS NULL THEN 'prepared transaction' ELSE a.state END,
           round(extract(epoch FROM clock_timestamp() - COALESCE(p.prepared, a.xact_start))::numeric, 3), left(a.query, 200),
           COALESCE(p.prepared, a.xact_start),
           -- The rule of pg_terminate_backend.
           NOT bool_and(f.ambiguous) AND f.pid IS NOT NULL AND (o.rolsuper OR COALESCE(
               NOT r.rolsuper AND (pg_has_role(v_owner, r.oid, 'USAGE') OR pg_has_role(v_owner, 'pg_signal_backend', 'USAGE')), false))
    FROM found f
    JOIN pg_roles o ON o.oid = v_owner
    LEFT JOIN pg_stat_activity a ON a.pid = f.pid
    LEFT JOIN pg_roles r ON r.oid = a.usesysid
    LEFT JOIN LATERAL (SELECT x.gid, x.owner, x.prepared
                       FROM locks l
                       JOIN pg_prepared_xacts x ON x.transaction = l.transactionid
                       WHERE f.pid IS NULL AND l.pid IS NULL AND l.virtualtransaction = f.virtualtransaction) p ON true
    WHERE NOT EXISTS (SELECT FROM barrier b WHERE b.pid = f.pid AND b.stop_at_work)
    GROUP BY f.pid, f.virtualtransaction, p.gid, p.owner, p.prepared, a.application_name, a.usename, a.state, a.xact_start, a.query,
             o.rolsuper, r.rolsuper, r.oid
    ORDER BY 1, 2;
END;
$$;
REVOKE ALL ON FUNCTION job_holders(text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION job_holders(text, timestamptz) IS 'The sessions that would hold up a stop of this job now, since when, and whether they may be ended.';

CREATE OR REPLACE FUNCTION emergency_stop_blockers(id text)
RETURNS TABLE (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET row_security = off
AS $$
BEGIN
    RETURN QUERY
        SELECT h.pid, h.application_name, h.database_user, h.state, h.transaction_seconds, h.query
        FROM job_holders(emergency_stop_blockers.id, 'infinity') h;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_blockers(text) IS
    'The sessions that would hold up a stop of this job now: pid, application_name, database_user, state, transaction_seconds, query. '
    'Waits for nothing; tries for a moment to lock rows of the job that others seem to hold.';

-- end_or_name_holders(id, patience, force, problem): what is left to do once a stop has waited for that long.
-- Returns  with force: how many sessions were ended, those whose transactions had begun before the wait; they are gone then.
--          0 where nobody holds the job any more, and no problem is given
-- Raises   lock_not_available (55P03)  where others hold the job, with the holders as JSON in DETAIL; where nobody does, with
--          the problem, the message of the error that was met, and no DETAIL
-- Locks    as emergency_stop_blockers
CREATE OR REPLACE FUNCTION end_or_name_holders(id text, patience interval, force boolean, problem text)
RETURNS int LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_began     CONSTANT timestamptz := clock_timestamp() - patience;
    v_messages  CONSTANT text := current_setting('client_min_messages');
    v_pids      int[];
    v_holders   json;
    v_not_ended json;
BEGIN
    -- Only who was there when the wait began has held the job for that long. Where all have come since, all are named.
    WITH holders AS MATERIALIZED (
        SELECT h.*, COALESCE(h.since <= v_began, true) AS overdue, json_build_object(
                   'pid', h.pid, 'application_name', h.application_name, 'database_user', h.database_user, 'state', h.state,
                   'transaction_seconds', h.transaction_seconds, 'query', h.query) AS shown
        FROM job_holders(end_or_name_holders.id, v_began) h
    )
    SELECT COALESCE(array_agg(h.pid) FILTER (WHERE h.overdue), '{}'),
           COALESCE(json_agg(h.shown) FILTER (WHERE h.overdue), json_agg(h.shown), '[]'),
           json_agg(h.shown) FILTER (WHERE h.overdue AND NOT h.may_be_ended)
    INTO v_pids, v_holders, v_not_ended
    FROM holders h;

    IF force AND cardinality(v_pids) > 0 AND v_not_ended IS NULL THEN
        PERFORM set_config('client_min_messages', 'error', true);  -- that one has ended meanwhile is nothing to warn of
        PERFORM pg_terminate_backend(p.pid) FROM unnest(v_pids) AS p (pid);
        PERFORM pg_terminate_backend(p.pid, 1000) FROM unnest(v_pids) AS p (pid);  -- waits for its end
        PERFORM set_config('client_min_messages', v_messages, true);
        RETURN cardinality(v_pids);
    END IF;
    IF json_array_length(v_holders) = 0 AND problem IS NULL THEN
        RETURN 0;
    ELSIF json_array_length(v_holders) = 0 THEN
        RAISE lock_not_available
            USING MESSAGE = format('job %s could not be stopped in %s: %s', quote_literal(id), patience, problem),
                  HINT = 'Nobody holds the job now. Look at the triggers of the tables jobs and executions, or try again.';
    END IF;
    RAISE lock_not_available
        USING MESSAGE = format('job %s is locked', quote_literal(id)),
              DETAIL = CASE WHEN force AND v_not_ended IS NOT NULL
                            THEN json_build_object('blocked_by', v_holders, 'not_ended', v_not_ended) ELSE v_holders END,
              HINT = CASE WHEN force AND v_not_ended IS NOT NULL
                          THEN 'A superuser can end the sessions in not_ended, and an operator the prepared transactions, with ROLLBACK PREPARED. Nothing was changed, and nobody was ended.'
                          ELSE format('Others have held it for %s; nothing was changed. To end those sessions: SELECT emergency_stop_job(id, force => true).', patience)
                     END;
END;
$$;
REVOKE ALL ON FUNCTION end_or_name_holders(text, interval, boolean, text) FROM PUBLIC;
COMMENT ON FUNCTION end_or_name_holders(text, interval, boolean, text) IS
    'Ends the sessions that have held this job for that long, if force is given; else raises 55P03 with them as JSON in DETAIL.';
