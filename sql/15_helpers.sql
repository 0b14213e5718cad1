-- Helpers: what several functions need. Nobody but the owner may call them.

-- to_job_id(id), to_execution_id(id): an id as its column has it; NULL where the column's type cannot hold it.
DO $$
DECLARE
    v_function record;
BEGIN
    FOR v_function IN
        SELECT f.name, f.table_name, a.atttypid::regtype AS id_type
        FROM (VALUES ('to_job_id', 'jobs'), ('to_execution_id', 'executions')) AS f (name, table_name)
        JOIN pg_attribute a ON a.attrelid = to_regclass(f.table_name) AND a.attname = 'id'
    LOOP
        -- A cast to varchar(n) would cut an id that is too long; the assignment refuses it. But both cut spaces at the
        -- end, which would make it another id: the comparison with left() refuses such an id.
        EXECUTE format('CREATE OR REPLACE FUNCTION %I(id text) RETURNS %s LANGUAGE plpgsql IMMUTABLE '
                       'SET search_path FROM CURRENT AS %L', v_function.name, v_function.id_type,
                       format(CASE v_function.id_type WHEN 'text'::regtype THEN 'BEGIN RETURN id; END' ELSE '
DECLARE
    v_id %I.id%%TYPE;
BEGIN
    v_id := id::%s;
    RETURN CASE WHEN v_id::text || '' '' = left(id, length(v_id::text) + 1) THEN NULL ELSE v_id END;
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END' END, v_function.table_name, v_function.id_type));
    END LOOP;
END;
$$;

-- job_barrier(id): the key of the advisory lock that is a job's barrier; id is jobs.id as text.
-- The head of 20_guard.sql says who takes it, and how.
CREATE OR REPLACE FUNCTION job_barrier(id text)
RETURNS bigint LANGUAGE plpgsql IMMUTABLE  -- a function in SQL would be planned anew in each call
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN hashtextextended(job_barrier.id, 'jobs'::regclass::oid::bigint);
END;
$$;

-- require_read_committed(function_name): refuses a transaction in which a function that changes jobs cannot see all.
-- Raises   invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
CREATE OR REPLACE FUNCTION require_read_committed(function_name text)
RETURNS void LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE invalid_transaction_state
            USING MESSAGE = format('%s cannot run in a %s transaction',
                                   function_name, upper(current_setting('transaction_isolation'))),
                  DETAIL = 'Its snapshot would not show what others have changed since.',
                  HINT = 'Call it in a READ COMMITTED transaction.';
    END IF;
    IF current_setting('transaction_read_only')::boolean THEN
        RAISE read_only_sql_transaction
            USING SCHEMA = 'beacon_stop',  -- by which the service knows that no trigger has raised it
                  MESSAGE = format('%s cannot run in a read-only transaction', function_name),
                  DETAIL = 'On a standby, jobs may be missing, or not yet be what they are on the primary.',
                  HINT = 'Call it on the primary.';
    END IF;
END;
$$;

-- commit_durably(): makes the commit of this transaction wait until it is flushed, here and by a synchronous standby.
-- A SET clause of a function would end with the function, before the commit. A stricter setting is kept.
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

-- utc_seconds(at): a time as the answers and the marks show it, 2025-09-29T23:48:00Z.
CREATE OR REPLACE FUNCTION utc_seconds(at timestamptz)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN to_char(utc_seconds.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
END;
$$;

-- as_object(value, key): JSON to which keys can be added without losing what was there.
-- Returns  value if it is an object; {key: value} for any other value; {} for NULL and JSON's null
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

-- notify_workers(channel, payload): tells those who listen, at the commit; never makes the commit fail. If the queue is
-- nearly full, it raises a WARNING instead. If the payload is too long for NOTIFY, nobody is told, without a WARNING.
CREATE OR REPLACE FUNCTION notify_workers(channel text, payload json)
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    -- NOTIFY fails at the commit if the queue is full, and refuses a payload of 8,000 bytes or more.
    IF pg_notification_queue_usage() >= 0.9 THEN
        RAISE WARNING USING
            MESSAGE = format('nobody was notified on channel %s: the notification queue is nearly full', channel),
            HINT = 'A session that listens and stays in one transaction keeps the queue from being emptied. End it.';
    ELSIF octet_length(payload::text) < 8000 THEN
        PERFORM pg_notify(channel, payload::text);
    END IF;
END;
$$;

-- is_running(number): whether the transaction, or the part of one, with this number has not ended yet.
CREATE OR REPLACE FUNCTION is_running(number xid)
RETURNS boolean LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_next CONSTANT bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
BEGIN
    -- pg_xact_status takes the whole number; a row has its lower half, which starts anew now and then.
    RETURN 'in progress' = pg_xact_status(
        (v_next + ((number::text::bigint - v_next + 2147483648) & 4294967295) - 2147483648)::text::xid8);
END;
$$;
