-- emergency_stop_blockers(id): the sessions that would hold up a stop of a job now. No stop need be waiting.
-- Returns  a row for each: pid (0 for a prepared transaction), application_name (a prepared transaction's gid),
--          database_user, state, transaction_seconds (the age of its transaction), query (the first 200 characters of
--          its last statement); no row for an unknown job
-- Raises   read_only_sql_transaction (25006)  the transaction is read-only, and others hold rows of the job
-- Locks    for a moment those rows of the job that others have locked before, but do not hold any more
--
-- It reads who holds what, and waits for nothing. Three things can hold up a stop: the job's barrier, which every
-- session that starts an execution shares; the rows of the job and of its active executions; and locks on whole tables.

-- held_rows(id): the rows of a job, and of its active executions, that others hold against a stop.
CREATE OR REPLACE FUNCTION held_rows(id text)
RETURNS TABLE (xmax xid, relation oid) LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := to_job_id(held_rows.id);
BEGIN
    PERFORM limit_lock_wait('10ms');
    -- A transaction number in xmax does not tell in which mode the row is locked. What can be locked is not held.
    RETURN QUERY
        WITH free_job AS (
            SELECT FROM jobs j WHERE j.id = v_id AND j.xmax <> '0' FOR NO KEY UPDATE SKIP LOCKED
        ), free AS (
            SELECT e.ctid FROM executions e
            WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') AND e.xmax <> '0'
            FOR NO KEY UPDATE SKIP LOCKED
        )
        SELECT j.xmax, j.tableoid FROM jobs j
        WHERE j.id = v_id AND j.xmax <> '0' AND NOT EXISTS (SELECT FROM free_job)
        UNION
        SELECT e.xmax, e.tableoid FROM executions e
        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') AND e.xmax <> '0'
          AND e.ctid NOT IN (SELECT f.ctid FROM free f);
    RAISE triggered_action_exception;
EXCEPTION
    -- The locks are given back. The rows that RETURN QUERY has added stay in the result.
    WHEN triggered_action_exception THEN
    -- A whole table is locked. holders_of_job() finds in pg_locks who locks it.
    WHEN lock_not_available THEN
END;
$$;

-- multixact_members(number): the transactions that share a row whose xmax this is; NULL if it is no multixact's number.
CREATE OR REPLACE FUNCTION multixact_members(number xid)
RETURNS xid[] LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN ARRAY(SELECT m.xid FROM pg_get_multixact_members(number) m WHERE m.mode <> 'keysh');
EXCEPTION WHEN invalid_parameter_value OR internal_error THEN
    RETURN NULL;
END;
$$;

-- holders_of_job(id, whole_table): as emergency_stop_blockers, and may_be_ended: whether the owner of these functions
-- may end the session, and it is beyond doubt that it holds the job. Besides, the stops of the job that are at work:
-- is_stop. whole_table is the table that a stop has to lock against sharers: whoever has locked any rows of it, and
-- rests in its transaction, holds the job, too.
-- The xmax of a row can be the number of a part of a transaction, such as a savepoint that was released. PostgreSQL
-- knows whose part it is, but tells only those who wait for it. So it can be one of all transactions that are older
-- and have locked rows of the table.
CREATE OR REPLACE FUNCTION holders_of_job(id text, whole_table text DEFAULT NULL)
RETURNS TABLE (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text,
               may_be_ended boolean, is_stop boolean)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
SET jit = off  -- which takes longer to compile the plan than the plan takes to run
AS $$
DECLARE
    v_key     CONSTANT text := to_job_id(holders_of_job.id)::text;
    v_barrier CONSTANT bigint := job_barrier(v_key);
BEGIN
    PERFORM pg_stat_clear_snapshot();  -- or a second look in this transaction would show the sessions of the first
    RETURN QUERY
    WITH locks AS MATERIALIZED (
        SELECT l.*, a.state, a.backend_xid
        FROM pg_locks l
        LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        LEFT JOIN pg_database d ON d.oid = l.database
        WHERE l.pid IS DISTINCT FROM pg_backend_pid()
          AND (d.datname = current_database() OR l.locktype = 'transactionid' AND l.granted)
    ), transactions AS MATERIALIZED (
        SELECT l.virtualtransaction, l.pid, l.transactionid AS number, p.prepared AS since, p.gid, p.owner,
               l.backend_xid = l.transactionid OR p.gid IS NOT NULL AS is_whole
        FROM locks l LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND p.transaction = l.transactionid
        WHERE l.locktype = 'transactionid'
    ), barrier AS (
        -- A stop at work has the barrier alone, in a transaction, whose number is not 0. One that is done, or a batch,
        -- shares it with itself besides.
        SELECT l.virtualtransaction, l.pid,
               bool_or(l.mode = 'ShareLock' OR l.virtualtransaction LIKE '%/0' OR l.state LIKE 'idle in transaction%')
               IS NOT TRUE AS stop_at_work
        FROM locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
          AND (l.classid::bigint << 32 | l.objid::bigint) = v_barrier
        GROUP BY l.virtualtransaction, l.pid
    ), numbers AS MATERIALIZED (
        -- In this order: a transaction that ends after the look at pg_locks must not be taken for a part of another.
        SELECT h.ordinality AS row, h.xmax, h.relation, n.number, (n.number <> h.xmax OR m.members IS NULL)
               AND n.number NOT IN (SELECT l.transactionid FROM pg_locks l WHERE l.locktype = 'transactionid')
               AND is_running(n.number) AS is_part
        FROM held_rows(v_key) WITH ORDINALITY h CROSS JOIN multixact_members(h.xmax) AS m (members)
        CROSS JOIN unnest(m.members || h.xmax) AS n (number)
    ), rows AS MATERIALIZED (
        -- A multixact and a transaction can have the same number.
        SELECT t.virtualtransaction, t.pid, n.xmax, count(*) OVER (PARTITION BY n.row, n.number::text) > 1
               OR bool_or(n.number = n.xmax) OVER x <> bool_and(n.number = n.xmax) OVER x AS is_ambiguous
        FROM numbers n
        JOIN transactions t ON t.number = n.number OR n.is_part AND t.is_whole AND age(t.number) > age(n.number)
             AND EXISTS (SELECT FROM locks l
                         WHERE l.virtualtransaction = t.virtualtransaction AND l.locktype = 'relation'
                           AND l.relation = n.relation AND l.mode IN ('RowShareLock', 'RowExclusiveLock'))
        WINDOW x AS (PARTITION BY n.row)
    ), certain AS MATERIALIZED (
        SELECT b.virtualtransaction, b.pid FROM barrier b
        UNION
        SELECT r.virtualtransaction, r.pid FROM rows r WHERE NOT r.is_ambiguous
        UNION
        -- Who waits for such a lock is in the way as well: later requests queue behind it.
        SELECT l.virtualtransaction, l.pid FROM locks l
        WHERE l.locktype = 'relation' AND l.relation::regclass IN ('jobs', 'executions', 'emergency_stops')
          AND (l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
               OR l.relation = to_regclass(whole_table) AND l.mode IN ('RowShareLock', 'RowExclusiveLock')
                  AND (l.pid IS NULL OR l.state LIKE 'idle in transaction%'))
    ), found AS (
        -- Of those who may hold a row, one who is known to hold the job is the one.
        SELECT c.virtualtransaction, c.pid, true AS is_certain FROM certain c
        UNION
        SELECT r.virtualtransaction, r.pid, false FROM rows r
        WHERE NOT EXISTS (SELECT FROM rows o JOIN certain c USING (virtualtransaction) WHERE o.xmax = r.xmax)
    )
    SELECT COALESCE(f.pid, 0), COALESCE(p.gid, a.application_name), COALESCE(p.owner, a.usename)::text,
           CASE WHEN f.pid IS NULL THEN 'prepared transaction' ELSE a.state END,
           -- The last of these has begun between the look at the sessions and that at the locks.
           round(extract(epoch FROM clock_timestamp() - COALESCE(
               p.since, a.xact_start, CASE WHEN a.state IN ('idle', 'active') AND f.virtualtransaction NOT LIKE '%/0'
                                           THEN clock_timestamp() END)), 3), left(a.query, 200),
           -- The rule of pg_terminate_backend.
           f.is_certain AND f.pid IS NOT NULL AND COALESCE(o.rolsuper OR NOT r.rolsuper AND (
               pg_has_role(r.oid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE')), false),
           EXISTS (SELECT FROM barrier b WHERE b.pid = f.pid AND b.stop_at_work)
    FROM found f JOIN pg_roles o ON o.rolname = current_user
    LEFT JOIN pg_stat_activity a ON a.pid = f.pid LEFT JOIN pg_roles r ON r.oid = a.usesysid
    LEFT JOIN transactions p ON p.gid IS NOT NULL AND p.virtualtransaction = f.virtualtransaction
    ORDER BY 1, 2;
END;
$$;

CREATE OR REPLACE FUNCTION emergency_stop_blockers(id text)
RETURNS TABLE (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET row_security = off
AS $$
    SELECT h.pid, h.application_name, h.database_user, h.state, h.transaction_seconds, h.query
    FROM holders_of_job(emergency_stop_blockers.id) h
    WHERE NOT h.is_stop;
$$;
REVOKE ALL ON FUNCTION emergency_stop_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_blockers(text) IS
    'The sessions that would hold up a stop of this job now: pid, application_name, database_user, state, '
    'transaction_seconds, query. Waits for nothing; locks for a moment rows of the job that others seem to hold.';

-- end_or_name_holders(id, patience, force, problem, sessions_ended, whole_table): what is left to do once a stop has
-- waited for that long, in the end for that table. With force it ends those who have held the job for that long, and
-- returns how many have ended. Without, it raises 55P03, with the holders as JSON in DETAIL, and with how many sessions
-- the stop has ended before, NULL if force was not used yet. Where nobody holds the job any more, it returns NULL; or,
-- if a problem is given, it raises 55P03. The problem is the message of an error that was met although nobody else had
-- a lock of the job's, or is empty. Only for such an error there is no DETAIL.
CREATE OR REPLACE FUNCTION end_or_name_holders(
    id text, patience interval, force boolean, problem text, sessions_ended int DEFAULT NULL,
    whole_table text DEFAULT NULL)
RETURNS int LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
SET client_min_messages = error  -- that a session to be ended has ended by itself is nothing to warn of
AS $$
DECLARE
    -- emergency_stop_jobs() passes a short patience; this setting then says how long a holder must have held the job.
    v_waited    CONSTANT interval :=
        COALESCE(NULLIF(current_setting('beacon_stop.waited', true), '')::interval, patience);
    v_problem   text;
    v_held      record;
    v_not_ended json;
    v_hint      text;
BEGIN
    -- A holder is overdue if its transaction is as old as the wait, or of unknown age. If there is none, the stop has
    -- waited for those who use the table that it wanted to lock.
    FOR v_look IN 1..2 LOOP
        SELECT COALESCE(array_agg(h.pid) FILTER (WHERE o.overdue), '{}') AS pids,
               json_agg(s) FILTER (WHERE NOT h.is_stop) AS holders,
               json_agg(s) FILTER (WHERE o.overdue AND NOT h.may_be_ended) AS not_ended, bool_or(h.is_stop) AS by_a_stop
        INTO v_held
        FROM holders_of_job(end_or_name_holders.id, CASE v_look WHEN 2 THEN whole_table END) h
        CROSS JOIN LATERAL (
            SELECT NOT h.is_stop AND COALESCE(h.transaction_seconds >= extract(epoch FROM v_waited), true) AS overdue) o
        CROSS JOIN LATERAL (
            SELECT h.pid, h.application_name, h.database_user, h.state, h.transaction_seconds, h.query) s;
        EXIT WHEN whole_table IS NULL OR cardinality(v_held.pids) > 0;
    END LOOP;

    IF force AND cardinality(v_held.pids) > 0 AND v_held.not_ended IS NULL THEN
        PERFORM pg_terminate_backend(p.pid) FROM unnest(v_held.pids) AS p (pid);
        PERFORM pg_terminate_backend(p.pid, 1000) FROM unnest(v_held.pids) AS p (pid);  -- waits for its end
        PERFORM pg_stat_clear_snapshot();
        RETURN (SELECT count(*)::int FROM unnest(v_held.pids) AS p (pid)
                WHERE p.pid NOT IN (SELECT a.pid FROM pg_stat_activity a));
    ELSIF v_held.holders IS NOT NULL THEN
        v_not_ended := CASE WHEN force THEN v_held.not_ended END;
        v_hint := format('Others have held it for %s. ', patience) || CASE
            WHEN sessions_ended IS NOT NULL THEN 'Those that held it before were told to end. These have not ended '
                                                 'yet, or came after them: send the call again.'
            WHEN cardinality(v_held.pids) = 0 THEN
                'None of them has held it for that long, so even force => true ends none. Ask again.'
            WHEN v_held.not_ended IS NULL THEN 'To end those who have held it all that time: '
                                               'SELECT emergency_stop_job(id, force => true).'
            ELSE 'Even force => true cannot end all of them, and so ends none: an operator has to end a prepared '
                 'transaction, with ROLLBACK PREPARED, and a superuser the other sessions.' END;
    ELSIF problem IS NULL THEN
        RETURN NULL;
    ELSIF v_held.by_a_stop THEN
        v_hint := 'Another stop of this job is at work. Ask again.';
    ELSIF problem = '' THEN
        v_hint := 'Nobody holds it now. Short transactions have held it in turn: send the call again.';
    ELSE
        v_problem := format('job %L could not be stopped in %s: %s', id, patience, problem);
        v_hint := 'Nobody holds it. Look at what the triggers of jobs, executions and emergency_stops wait for.';
    END IF;
    RAISE lock_not_available USING
        MESSAGE = COALESCE(v_problem, format('job %L is locked', id)),
        DETAIL = CASE
            WHEN v_problem IS NOT NULL THEN ''
            WHEN v_not_ended IS NULL AND COALESCE(sessions_ended, 0) = 0 THEN COALESCE(v_held.holders, '[]')::text
            ELSE (SELECT json_object_agg(d.key, d.value)
                  FROM (VALUES ('blocked_by', COALESCE(v_held.holders, '[]')), ('not_ended', v_not_ended),
                               ('sessions_ended', to_json(NULLIF(sessions_ended, 0)))) AS d (key, value)
                  WHERE d.value IS NOT NULL)::text END,
        HINT = v_hint || CASE WHEN sessions_ended > 0
                              THEN format(' Sessions were ended: %s. Nothing else was changed.', sessions_ended)
                              ELSE ' Nothing was changed.' END;
END;
$$;
