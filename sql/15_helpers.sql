-- Helpers: what several functions need. Nobody but the owner may call them.

-- to_job_id(id): a job's id as the column jobs.id has it. to_execution_id(id): the same for executions.id.
-- Returns  the id, or NULL where the column's type cannot hold it: then there is no such job, or execution
-- Raises   nothing of its own
-- Locks    nothing
DO $$
DECLARE
    v_function record;
BEGIN
    FOR v_function IN
        SELECT f.name, f.table_name, a.atttypid::regtype AS id_type
        FROM (VALUES ('to_job_id', 'jobs'), ('to_execution_id', 'executions')) AS f (name, table_name)
        JOIN pg_attribute a ON a.attrelid = to_regclass(f.table_name) AND a.attname = 'id'
    LOOP
        EXECUTE format('CREATE OR REPLACE FUNCTION %I(id text) RETURNS %s LANGUAGE plpgsql IMMUTABLE SET search_path FROM CURRENT AS %L',
                       v_function.name, v_function.id_type, format(CASE v_function.id_type
            WHEN 'text'::regtype THEN 'BEGIN RETURN id; END'
            -- A cast would cut what is too long.
            WHEN 'varchar'::regtype THEN '
DECLARE
    v_id %2$I.id%%TYPE;
BEGIN
    v_id := id;
    RETURN v_id;
EXCEPTION WHEN string_data_right_truncation THEN
    RETURN NULL;
END'
            ELSE '
BEGIN
    RETURN id::%1$s;
EXCEPTION WHEN invalid_text_representation OR numeric_value_out_of_range THEN
    RETURN NULL;
END' END, v_function.id_type, v_function.table_name));
        EXECUTE format('REVOKE ALL ON FUNCTION %I(text) FROM PUBLIC', v_function.name);
        EXECUTE format('COMMENT ON FUNCTION %I(text) IS %L', v_function.name,
                       'The id in the type of its column, or NULL where that cannot hold it.');
    END LOOP;
END;
$$;

-- job_barrier(id): the key of the advisory lock that is a job's barrier.
-- Whoever starts an execution of the job holds that lock shared until their transaction ends; the stop takes it alone.
-- Returns  the key for pg_advisory_xact_lock(bigint); id is jobs.id as text
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION job_barrier(id text)
RETURNS bigint LANGUAGE plpgsql STABLE  -- a function in SQL would be planned anew in each call
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN hashtextextended(job_barrier.id, 'jobs'::regclass::oid::bigint);
END;
$$;
REVOKE ALL ON FUNCTION job_barrier(text) FROM PUBLIC;
COMMENT ON FUNCTION job_barrier(text) IS 'The key of the advisory lock that is the barrier of this job.';

-- require_read_committed(function_name): refuses a transaction in which a function that changes jobs cannot see all.
-- Returns  nothing
-- Raises   invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
-- Locks    nothing
CREATE OR REPLACE FUNCTION require_read_committed(function_name text)
RETURNS void LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE invalid_transaction_state
            USING MESSAGE = format('%s cannot run in a %s transaction', function_name, upper(current_setting('transaction_isolation'))),
                  DETAIL = 'Its snapshot would not show what others have changed since.',
                  HINT = 'Call it in a READ COMMITTED transaction.';
    END IF;
    IF current_setting('transaction_read_only')::boolean THEN
        RAISE read_only_sql_transaction
            USING MESSAGE = format('%s cannot run in a read-only transaction', function_name),
                  DETAIL = 'On a standby, jobs may be missing, or not yet be what they are on the primary.',
                  HINT = 'Call it on the primary.';
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION require_read_committed(text) FROM PUBLIC;
COMMENT ON FUNCTION require_read_committed(text) IS 'Raises 25000 above READ COMMITTED and 25006 in a read-only transaction.';

-- commit_durably(): makes the commit of this transaction wait until it is flushed, here and by a synchronous standby.
-- A SET clause of a function would end with the function, before the commit. A stricter setting is kept.
-- Returns  nothing
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION commit_durably()
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION commit_durably() FROM PUBLIC;
COMMENT ON FUNCTION commit_durably() IS 'Makes the commit of this transaction wait until it is flushed; keeps a stricter setting.';

-- utc_seconds(at): a time as the answers and the marks show it.
-- Returns  '2025-09-29T23:48:00Z'
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION utc_seconds(at timestamptz)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN to_char(utc_seconds.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
END;
$$;
REVOKE ALL ON FUNCTION utc_seconds(timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION utc_seconds(timestamptz) IS 'A time in UTC to the second, as in 2025-09-29T23:48:00Z.';

-- as_object(value, key): JSON to which keys can be added without losing what was there.
-- Returns  value if it is an object; {key: value} for any other value; {} for NULL and JSON's null
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION as_object(value jsonb, key text)
RETURNS jsonb LANGUAGE plpgsql IMMUTABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN CASE WHEN jsonb_typeof(value) = 'object' THEN value
                WHEN value <> 'null' THEN jsonb_build_object(key, value)
                ELSE '{}'
           END;
END;
$$;
REVOKE ALL ON FUNCTION as_object(jsonb, text) FROM PUBLIC;
COMMENT ON FUNCTION as_object(jsonb, text) IS 'The value as a JSON object, under this key if it is none, so that keys can be added to it.';

-- notify_workers(channel, payload): tells those who listen, at the commit, if that cannot keep the transaction from committing.
-- Returns  nothing
-- Raises   nothing; a WARNING where nobody is told because the notification queue is nearly full
-- Locks    at the commit, as every NOTIFY, the queue
CREATE OR REPLACE FUNCTION notify_workers(channel text, payload json)
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    -- NOTIFY refuses a longer payload, and fails at the commit where the queue is full.
    IF pg_notification_queue_usage() >= 0.9 THEN
        RAISE WARNING USING
            MESSAGE = format('nobody was notified on channel %s: the notification queue is nearly full', channel),
            HINT = 'A session that listens and stays in one transaction keeps the queue from being emptied. End it.';
    ELSIF octet_length(payload::text) < 8000 THEN
        PERFORM pg_notify(channel, payload::text);
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION notify_workers(text, json) FROM PUBLIC;
COMMENT ON FUNCTION notify_workers(text, json) IS
    'Notifies the workers at the commit; only warns where the queue is nearly full, which would make the commit fail.';

-- is_running(number): whether this is the number of a transaction, or of a part of one, that has not ended yet.
-- Returns  true or false
-- Raises   nothing of its own for a number that was taken from a row
-- Locks    nothing
CREATE OR REPLACE FUNCTION is_running(number xid)
RETURNS boolean LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_next CONSTANT bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
BEGIN
    -- pg_xact_status takes the whole number; a row has its lower half, which starts anew now and then.
    RETURN pg_xact_status((v_next + ((number::text::bigint - v_next + 2147483648) & 4294967295) - 2147483648)::text::xid8) = 'in progress';
END;
$$;
REVOKE ALL ON FUNCTION is_running(xid) FROM PUBLIC;
COMMENT ON FUNCTION is_running(xid) IS 'Whether the transaction, or the part of one, with this number has not ended yet.';
