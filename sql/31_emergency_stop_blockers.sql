-- emergency_stop_blockers(id): the sessions that hold up a stop of a job which is waiting now, in another session.
-- Returns  a row for each: pid (0 for a prepared transaction), application_name, state, transaction_seconds (the age
--          of its transaction); no row while no stop of that job waits
-- Raises   nothing of its own
-- Locks    nothing
--
-- A session holds the stop up if it holds what the stop waits for, or what the sessions queued before it wait for.
-- Those that merely wait are left out, and so are other stops of the job that are at work. Batches, which hold the
-- same barriers in the same way, are not: they are known by a lock of their own.

CREATE OR REPLACE FUNCTION emergency_stop_blockers(id text)
RETURNS TABLE (pid int, application_name text, state text, transaction_seconds numeric)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_now     CONSTANT timestamptz := clock_timestamp();
    v_barrier CONSTANT bigint := hashtextextended(emergency_stop_blockers.id, 'jobs'::regclass::oid::bigint);
    v_batch   CONSTANT bigint := hashtext('beacon-stop batch')::bigint;
BEGIN
    RETURN QUERY
    WITH RECURSIVE locks AS MATERIALIZED (
        SELECT l.*, ROW(l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid,
                        l.transactionid, l.classid, l.objid, l.objsubid) AS object
        FROM pg_locks l
    ),
    stops AS MATERIALIZED (
        SELECT DISTINCT l.pid
        FROM locks l
        WHERE l.locktype = 'advisory' AND l.mode = 'ExclusiveLock' AND l.objsubid = 1
          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
          AND l.classid = (v_barrier >> 32 & 4294967295)::oid
          AND l.objid = (v_barrier & 4294967295)::oid
          AND NOT EXISTS (
              SELECT
              FROM locks b
              WHERE b.pid = l.pid AND b.locktype = 'advisory' AND b.objsubid = 1 AND b.database = l.database
                AND b.classid = (v_batch >> 32 & 4294967295)::oid
                AND b.objid = (v_batch & 4294967295)::oid
          )
    ),
    queued (waiter) AS (
        SELECT s.pid FROM stops s
        UNION
        SELECT b.blocker
        FROM queued q, unnest(pg_blocking_pids(q.waiter)) AS b (blocker)
        WHERE EXISTS (SELECT FROM stops s WHERE s.pid = b.blocker)
           OR NOT EXISTS (
               SELECT
               FROM locks w
               JOIN locks h ON h.object IS NOT DISTINCT FROM w.object AND h.granted AND h.pid = b.blocker
               WHERE w.pid = q.waiter AND NOT w.granted AND w.locktype <> 'tuple'
           ) AND b.blocker <> 0
    )
    SELECT DISTINCT b.blocker, a.application_name,
           CASE b.blocker WHEN 0 THEN 'prepared transaction' ELSE a.state END,
           round(extract(epoch FROM v_now - a.xact_start)::numeric, 3)
    FROM queued q
    CROSS JOIN unnest(pg_blocking_pids(q.waiter)) AS b (blocker)
    LEFT JOIN pg_stat_activity a ON a.pid = b.blocker
    WHERE NOT EXISTS (SELECT FROM queued o WHERE o.waiter = b.blocker)
       OR EXISTS (SELECT FROM stops s WHERE s.pid = b.blocker) AND a.state LIKE 'idle in transaction%'
    ORDER BY 1;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_blockers(text) IS
    'The sessions that hold up a stop of this job which is waiting now in another session: pid, application_name, state, transaction_seconds. Locks nothing.';
