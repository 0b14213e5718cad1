-- The router: turns a front database into one over any number of shards, which are databases with the files of sql/.
--
-- A front database gets this file alone and has no tables. Its functions have the names, arguments and answers of the
-- shards' functions, so the service runs on it unchanged. What each returns, raises and locks, its file in sql/ says.
-- confirm_stopped is not offered here, because the ids of executions belong to a shard.
--
-- Needs    the extension plproxy, and a server named beacon_stop, whose options p0, p1, ... name the shards' databases.
--          Their number is a power of two; several may name the same database. A job is in partition
--          hashtext(id) & (number of partitions - 1), where id is written as the column jobs.id shows it.
-- Raises   what the shards raise, with their SQLSTATEs; connection_failure (08006) where a shard is away
-- Locks    what the shards' functions lock. A call is a transaction of its own on a shard, committed when it returns.
--
-- The file is one transaction. It can be loaded again, and over the one of version 1.0.

BEGIN;

DO $$
DECLARE
    v_old regprocedure;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE invalid_schema_name
            USING MESSAGE = 'search_path names no schema that exists: expected the one to install into';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
    IF to_regclass('jobs') IS NOT NULL THEN
        RAISE duplicate_table
            USING MESSAGE = 'this database has jobs of its own: expected a front database without any';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_foreign_server s WHERE s.srvname = 'beacon_stop') THEN
        RAISE undefined_object
            USING MESSAGE = 'server beacon_stop is missing: expected one of the wrapper plproxy, with options p0, p1';
    END IF;
    -- Version 1.0 had these with other arguments or results.
    FOR v_old IN
        SELECT p.oid
        FROM pg_proc p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND to_regprocedure('emergency_stop_end_blockers(text)') IS NOT NULL
          AND p.proname IN ('shard_emergency_stop_job', 'emergency_stop_job', 'emergency_stop_blockers',
                            'emergency_stop_end_blockers', 'list_executions', 'shard_timeout_stuck_jobs',
                            'shard_repair_stuck_jobs', 'batch_on_all_shards')
    LOOP
        EXECUTE format('DROP FUNCTION %s', v_old);
    END LOOP;
END;
$$;

-- partitions(): which partition is on which shard. A shard is known by its lowest partition.
CREATE OR REPLACE FUNCTION partitions()
RETURNS TABLE (partition int, shard int) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT p.number, min(p.number) OVER (PARTITION BY p.shard)
    FROM (SELECT substr(o.option_name, 2)::int AS number, o.option_value AS shard
          FROM pg_foreign_server s, pg_options_to_table(s.srvoptions) o
          WHERE s.srvname = 'beacon_stop' AND o.option_name ~ '^p[0-9]+$') p;
$$;

-- partition_of(id): the partition of this job.
CREATE OR REPLACE FUNCTION partition_of(id text)
RETURNS int LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT hashtext(COALESCE(partition_of.id, '')) & (count(*)::int - 1) FROM partitions();
$$;

-- shard_call(partition, call, arguments, lock_timeout): calls a function on the shard of this partition.
-- Returns  the function's answer; of one that returns rows, an array of them, or NULL if there are none
-- Raises   internal_error (XX000) where the shard is away; what the function raises, with other words before its texts
CREATE OR REPLACE FUNCTION shard_call(partition int, call text, arguments jsonb, lock_timeout text)
RETURNS json LANGUAGE plproxy VOLATILE
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON partition;
    SELECT CASE call
        WHEN 'emergency_stop_job' THEN emergency_stop_job(a ->> 'id', a ->> 'reason', (a ->> 'force')::boolean, caller)
        WHEN 'emergency_stop_jobs' THEN (
            SELECT json_agg(j.summary ORDER BY j.number)
            FROM emergency_stop_jobs(ARRAY(SELECT jsonb_array_elements_text(a -> 'ids')), a ->> 'reason', caller,
                                     (a ->> 'force')::boolean, (a ->> 'patience')::interval)
                WITH ORDINALITY AS j (id, summary, number))
        WHEN 'emergency_stop_blockers' THEN (SELECT json_agg(b) FROM emergency_stop_blockers(a ->> 'id') b)
        WHEN 'emergency_stop_dry_run' THEN emergency_stop_dry_run(a ->> 'id')
        WHEN 'emergency_stop_status' THEN emergency_stop_status(a ->> 'id')
        WHEN 'emergency_stop_faults' THEN (SELECT json_agg(f) FROM emergency_stop_faults() f)
        WHEN 'release_job' THEN release_job(a ->> 'id', a ->> 'reason', a ->> 'status', caller)
        WHEN 'get_job' THEN get_job(a ->> 'id')
        WHEN 'list_executions' THEN (
            SELECT json_agg(e ORDER BY e.number)
            FROM list_executions(a ->> 'job_id', a ->> 'status', a ->> 'after', (a ->> 'max_rows')::bigint,
                                 (a ->> 'max_bytes')::bigint) WITH ORDINALITY AS e (id, execution, number))
        WHEN 'runaway_jobs' THEN runaway_jobs((a ->> 'minutes')::int, (a ->> 'max_jobs')::int)
        WHEN 'timeout_stuck_jobs' THEN timeout_stuck_jobs((a ->> 'span')::interval, (a ->> 'max_jobs')::int)
        WHEN 'repair_stuck_jobs' THEN repair_stuck_jobs((a ->> 'span')::interval, (a ->> 'max_jobs')::int)
    END
    FROM (SELECT set_config('lock_timeout', lock_timeout, true), arguments::jsonb AS a,
                 NULLIF(arguments::jsonb -> 'caller', 'null') AS caller OFFSET 0) AS s;
$$;

-- on_shard(partition, call, arguments): as shard_call, under the lock_timeout of this session.
-- Raises   what the function raises, a locked job's DETAIL included; connection_failure (08006) where the shard is away
CREATE OR REPLACE FUNCTION on_shard(partition int, call text, arguments jsonb)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answer json;
    v_detail text;
    v_hint   text;
BEGIN
    FOR v_try IN 1 .. 2 LOOP
        BEGIN
            v_answer := shard_call(partition, call, arguments, current_setting('lock_timeout'));
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                -- PL/Proxy puts words of its own before both.
                GET STACKED DIAGNOSTICS v_detail = PG_EXCEPTION_DETAIL, v_hint = PG_EXCEPTION_HINT;
                RAISE lock_not_available
                    USING MESSAGE = SQLERRM, DETAIL = substr(v_detail, length('Remote detail: ') + 1),
                          HINT = substr(v_hint, length('Remote hint: ') + 1);
            WHEN internal_error OR admin_shutdown OR crash_shutdown OR cannot_connect_now THEN
                -- The next call makes a new session there. All calls can be repeated.
                CONTINUE WHEN v_try = 1;
                -- A function there may have raised XX000. PL/Proxy's own errors begin with its name.
                IF SQLSTATE = 'XX000' AND NOT starts_with(SQLERRM, 'PL/Proxy function ') THEN
                    RAISE;
                END IF;
                -- By the name of the schema the service tells it from trouble that a trigger has with a connection.
                RAISE connection_failure USING SCHEMA = 'beacon_stop', MESSAGE = format('shard p%s is away: %s', (
                    SELECT p.shard FROM partitions() p WHERE p.partition = on_shard.partition), SQLERRM);
        END;
    END LOOP;
    RETURN v_answer;
END;
$$;

-- on_shards(call, arguments, max_jobs, hint): calls a function on one shard after the other, with the arguments under
-- the shard's number. Each may change an equal share of what the earlier ones have left of max_jobs.
-- Returns  the answer of each shard, or what is said of it if it is away
-- Raises   connection_failure (08006), if there is a hint, for a shard that is away: after the others have been called
CREATE OR REPLACE FUNCTION on_shards(call text, arguments jsonb, max_jobs int, hint text)
RETURNS TABLE (shard int, answer json, away text) LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_left  int := max_jobs;
    v_away  text;
    v_shard record;
BEGIN
    FOR v_shard IN
        SELECT a.key::int AS number, a.value AS arguments,
               count(*) OVER () - row_number() OVER (ORDER BY a.key::int) + 1 AS shards_left
        FROM jsonb_each(on_shards.arguments) a
        ORDER BY number
    LOOP
        shard := v_shard.number;
        answer := NULL;
        away := NULL;
        -- A number that is out of range goes to the shards as it is, to be refused there.
        IF max_jobs BETWEEN 0 AND 1000 THEN
            v_shard.arguments := v_shard.arguments
                || jsonb_build_object('max_jobs', ceil(v_left::numeric / v_shard.shards_left));
        END IF;
        BEGIN
            answer := on_shard(shard, call, v_shard.arguments);
            v_left := v_left - COALESCE(answer ->> 'timed_out_count', answer ->> 'republished_count')::int;
        EXCEPTION WHEN connection_failure THEN
            away := SQLERRM;
            v_away := greatest(v_away, away);
        END;
        RETURN NEXT;
    END LOOP;
    IF v_away IS NOT NULL AND hint IS NOT NULL THEN
        RAISE connection_failure USING SCHEMA = 'beacon_stop', MESSAGE = v_away, HINT = on_shards.hint;
    END IF;
END;
$$;

-- batch_on_shards(call, span, max_jobs): runs a batch on all shards. Together they change max_jobs at most.
-- Returns  their answers as one
-- Raises   connection_failure (08006) for a shard that is away, after the others; what these have done stays done
CREATE OR REPLACE FUNCTION batch_on_shards(call text, span interval, max_jobs int)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answers json[];
BEGIN
    SELECT array_agg(o.answer ORDER BY o.shard) INTO v_answers
    FROM on_shards(call, (SELECT jsonb_object_agg(p.shard, jsonb_build_object('span', span, 'max_jobs', max_jobs))
                          FROM partitions() p), max_jobs, 'The batch has run on the other shards.') o;
    RETURN (
        SELECT json_object_agg(k.key, CASE
            WHEN k.key IN ('timed_out_count', 'republished_count') THEN
                (SELECT to_json(sum((a ->> k.key)::int)) FROM unnest(v_answers) a)
            WHEN k.key IN ('timed_out_jobs', 'republished_jobs') THEN
                array_to_json(ARRAY(SELECT json_array_elements(a -> k.key) FROM unnest(v_answers) a))
            WHEN k.key = 'skipped' THEN (
                SELECT json_object_agg(r.reason, (SELECT sum((a -> k.key ->> r.reason)::int) FROM unnest(v_answers) a))
                FROM json_object_keys(k.value) AS r (reason))
            WHEN k.key = 'more' THEN (SELECT to_json(bool_or((a ->> k.key)::boolean)) FROM unnest(v_answers) a)
            ELSE k.value END ORDER BY k.place)
        FROM json_each(v_answers[1]) WITH ORDINALITY AS k (key, value, place));
END;
$$;

-- The functions that answer what one other function answers: one JSON, or rows of these columns.
DO $do$
DECLARE
    v_statement text;
BEGIN
    FOR v_statement IN
        SELECT format('CREATE OR REPLACE FUNCTION %s RETURNS %s LANGUAGE plpgsql VOLATILE SECURITY DEFINER
                       SET search_path FROM CURRENT AS %L',
                      f.signature, COALESCE('TABLE (' || f.columns || ')', 'json'), format(CASE
                          WHEN f.columns IS NULL THEN 'BEGIN RETURN %s; END'
                          ELSE 'BEGIN RETURN QUERY SELECT r.* FROM json_to_recordset(%s) AS r (%s); END'
                      END, f.answer, f.columns))
        FROM (VALUES
            ('emergency_stop_job(id text, reason text DEFAULT NULL, force boolean DEFAULT false,
                                 caller jsonb DEFAULT NULL)', NULL,
             $q$on_shard(partition_of(id), 'emergency_stop_job', jsonb_build_object(
                    'id', id, 'reason', reason, 'force', force, 'caller', caller))$q$),
            ('emergency_stop_dry_run(id text)', NULL,
             $q$on_shard(partition_of(id), 'emergency_stop_dry_run', jsonb_build_object('id', id))$q$),
            ('emergency_stop_status(id text)', NULL,
             $q$on_shard(partition_of(id), 'emergency_stop_status', jsonb_build_object('id', id))$q$),
            ('emergency_stop_blockers(id text)',
             'pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text',
             $q$on_shard(partition_of(id), 'emergency_stop_blockers', jsonb_build_object('id', id))$q$),
            ('release_job(id text, reason text, status text, caller jsonb DEFAULT NULL)', NULL,
             $q$on_shard(partition_of(id), 'release_job', jsonb_build_object(
                    'id', id, 'reason', reason, 'status', status, 'caller', caller))$q$),
            ('get_job(id text)', NULL,
             $q$on_shard(partition_of(id), 'get_job', jsonb_build_object('id', id))$q$),
            -- The rows come as one JSON array, so max_rows or max_bytes has to keep them below 1 GB.
            ('list_executions(job_id text, status text DEFAULT NULL, after text DEFAULT NULL,
                              max_rows bigint DEFAULT NULL, max_bytes bigint DEFAULT NULL)', 'id text, execution json',
             $q$on_shard(partition_of(job_id), 'list_executions', jsonb_build_object(
                    'job_id', job_id, 'status', status, 'after', after, 'max_rows', max_rows,
                    'max_bytes', max_bytes))$q$),
            ($q$timeout_stuck_jobs(threshold interval DEFAULT '15 minutes', max_jobs int DEFAULT 100)$q$, NULL,
             $q$batch_on_shards('timeout_stuck_jobs', threshold, max_jobs)$q$),
            ($q$repair_stuck_jobs(max_age interval DEFAULT '24 hours', max_jobs int DEFAULT 100)$q$, NULL,
             $q$batch_on_shards('repair_stuck_jobs', max_age, max_jobs)$q$)
        ) AS f (signature, columns, answer)
    LOOP
        EXECUTE v_statement;
    END LOOP;
END;
$do$;

-- emergency_stop_jobs(...): each shard stops its jobs in one transaction.
-- Raises   connection_failure (08006) for a shard that is away, only after the others: their jobs are stopped
CREATE OR REPLACE FUNCTION emergency_stop_jobs(
    ids text[], reason text DEFAULT NULL, caller jsonb DEFAULT NULL, force boolean DEFAULT false,
    patience interval DEFAULT '5 ms')
RETURNS TABLE (id text, summary json) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_arguments jsonb;
    v_answers   json;
BEGIN
    SELECT jsonb_object_agg(s.shard, s.arguments) INTO v_arguments
    FROM (
        SELECT p.shard, jsonb_build_object(
            'ids', jsonb_agg(j.id ORDER BY j.number), 'reason', reason, 'force', force, 'patience', patience,
            'caller', CASE jsonb_typeof(caller)
                WHEN 'array' THEN jsonb_agg(COALESCE(caller -> (j.number - 1)::int, '{}') ORDER BY j.number)
                ELSE caller END) AS arguments
        FROM unnest(ids) WITH ORDINALITY AS j (id, number)
        JOIN partitions() p ON p.partition = partition_of(j.id)
        GROUP BY p.shard
    ) s;
    SELECT json_object_agg(o.shard, o.answer) INTO v_answers
    FROM on_shards('emergency_stop_jobs', v_arguments, NULL,
                   'The jobs on the other shards are stopped. Try again.') o;
    RETURN QUERY
        SELECT j.id, v_answers -> p.shard::text -> (row_number() OVER (PARTITION BY p.shard ORDER BY j.number) - 1)::int
        FROM unnest(ids) WITH ORDINALITY AS j (id, number)
        JOIN partitions() p ON p.partition = partition_of(j.id)
        ORDER BY j.number;
END;
$$;

-- runaway_jobs(minutes, max_jobs): those of all shards. "truncated" is true also where a shard is away, with a WARNING.
-- Raises   connection_failure (08006) where all shards are away
CREATE OR REPLACE FUNCTION runaway_jobs(minutes int DEFAULT 5, max_jobs int DEFAULT 20)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answers json[];
    v_away    text;
BEGIN
    SELECT array_agg(o.answer) FILTER (WHERE o.away IS NULL), max(o.away) INTO v_answers, v_away
    FROM on_shards('runaway_jobs', (
        SELECT jsonb_object_agg(p.shard, jsonb_build_object('minutes', minutes, 'max_jobs', max_jobs))
        FROM partitions() p), NULL, NULL) o;
    IF v_answers IS NULL THEN
        RAISE connection_failure USING SCHEMA = 'beacon_stop', MESSAGE = v_away;
    ELSIF v_away IS NOT NULL THEN
        RAISE WARNING USING MESSAGE = v_away;
    END IF;
    RETURN (
        SELECT json_build_object(
            'minutes', minutes,
            'jobs', COALESCE(json_agg(l.job ORDER BY l.place) FILTER (WHERE l.place <= max_jobs), '[]'),
            'truncated', v_away IS NOT NULL OR count(*) > max_jobs
                         OR (SELECT bool_or((a ->> 'truncated')::boolean) FROM unnest(v_answers) a))
        FROM (
            SELECT j.job, row_number() OVER (ORDER BY (j.job ->> 'started')::bigint DESC,
                                             (j.job ->> 'active')::bigint DESC, j.job ->> 'job_id') AS place
            FROM unnest(v_answers) a, json_array_elements(a -> 'jobs') AS j (job)
        ) l);
END;
$$;

-- emergency_stop_faults(): those of the front and of all shards, which are named. A shard that is away is a fault, too.
CREATE OR REPLACE FUNCTION emergency_stop_faults()
RETURNS SETOF text LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_caller CONSTANT name := COALESCE(NULLIF(current_setting('role'), 'none'), session_user)::name;
    v_shard  int;
BEGIN
    RETURN QUERY
        SELECT format('role %I may not execute function %s on the front', v_caller, p.oid::regprocedure)
        FROM pg_proc p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND p.proname IN ('emergency_stop_job', 'emergency_stop_jobs', 'emergency_stop_dry_run',
                            'emergency_stop_status', 'release_job', 'runaway_jobs', 'get_job', 'list_executions',
                            'timeout_stuck_jobs', 'repair_stuck_jobs')
          AND NOT has_function_privilege(v_caller, p.oid, 'EXECUTE')
        ORDER BY 1;
    FOR v_shard IN SELECT DISTINCT p.shard FROM partitions() p ORDER BY 1 LOOP
        BEGIN
            RETURN QUERY
                SELECT CASE WHEN f LIKE 'warning: %' THEN format('warning: shard p%s: %s', v_shard, substr(f, 10))
                            ELSE format('shard p%s: %s', v_shard, f) END
                FROM json_array_elements_text(on_shard(v_shard, 'emergency_stop_faults', '{}')) f;
        EXCEPTION
            WHEN connection_failure THEN
                RETURN NEXT SQLERRM;
            WHEN syntax_error_or_access_rule_violation OR lock_not_available THEN
                -- A function is missing there, or not to be executed, or a table is locked.
                RETURN NEXT format('shard p%s: %s', v_shard, SQLERRM);
        END;
    END LOOP;
END;
$$;

-- PUBLIC may execute nothing that this transaction has made.
DO $$
BEGIN
    EXECUTE (
        SELECT string_agg(format('REVOKE ALL ON FUNCTION %s FROM PUBLIC; COMMENT ON FUNCTION %1$s IS %L',
                                 p.oid::regprocedure, 'Router of Beacon Stop: ' || p.proname || ' on the shards'), '; ')
        FROM pg_proc p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND age(p.xmin) <= age(pg_current_xact_id()::xid)
          AND p.proconfig @> ARRAY['search_path=' || current_setting('search_path')]);
END;
$$;

COMMIT;
