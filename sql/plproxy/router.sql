-- The router: turns a front database into one over any number of shards, each of them a database with the files of sql/.
--
-- A front database gets this file alone and has no tables. Its functions have the names, arguments and answers of the
-- shards' functions, so the service runs on it unchanged. A call about one job goes to the shard on which the job lives;
-- a call about all jobs goes to one shard after the other. confirm_stopped is not offered here: the ids of executions
-- belong to their shard, and so the workers call it there.
--
-- Needs    the extension plproxy, and a server named beacon_stop, whose options p0, p1, ... name the shards' databases:
--          as many as a power of two, several of which may name the same one. A job is in partition
--          hashtext(id) & (number of partitions - 1), where id is written as the column jobs.id shows it.
-- Raises   what the shards raise, with their SQLSTATEs; connection_failure (08006) where a shard is away
-- Locks    on the shards, what their functions lock. A call is a transaction of its own there, committed when it
--          returns, whatever becomes of the one that it was made in here.
--
-- The file is one transaction. It can be loaded again, and over the one of version 1.0.

BEGIN;

DO $$
DECLARE
    v_old text;
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
            USING MESSAGE = 'server beacon_stop is missing: expected one of the wrapper plproxy with the options p0, p1, ...';
    END IF;
    IF to_regprocedure('emergency_stop_end_blockers(text)') IS NOT NULL THEN  -- of version 1.0
        FOREACH v_old IN ARRAY '{
            "shard_emergency_stop_job(text, text, text)", "emergency_stop_job(text, text)", "emergency_stop_blockers(text)",
            "emergency_stop_end_blockers(text)", "list_executions(text, text, bigint, bigint, bigint)",
            "shard_timeout_stuck_jobs(int, interval, int)", "shard_repair_stuck_jobs(int, interval, int)",
            "batch_on_all_shards(text, interval, int)"}'::text[] LOOP
            EXECUTE format('DROP FUNCTION IF EXISTS %s', v_old);
        END LOOP;
    END IF;
END;
$$;

-- partitions(): which partition is on which shard.
-- Returns  rows of partition and shard; a shard is known by the lowest number of its partitions
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION partitions()
RETURNS TABLE (partition int, shard int) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT p.number, min(p.number) OVER (PARTITION BY p.shard)
    FROM (SELECT substr(o.option_name, 2)::int AS number, o.option_value AS shard
          FROM pg_foreign_server s, pg_options_to_table(s.srvoptions) o
          WHERE s.srvname = 'beacon_stop' AND o.option_name ~ '^p[0-9]+$') p;
$$;
REVOKE ALL ON FUNCTION partitions() FROM PUBLIC;
COMMENT ON FUNCTION partitions() IS 'Which partition is on which shard; a shard is known by its lowest partition.';

-- raise_away(partition, sqlstate, message): raises what it means that a call has failed twice.
-- Raises   connection_failure (08006)  the shard is away
--          internal_error (XX000)      a function there has raised that: PL/Proxy's own errors begin with its name
-- Locks    nothing
CREATE OR REPLACE FUNCTION raise_away(partition int, sqlstate text, message text)
RETURNS void LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF raise_away.sqlstate = 'XX000' AND NOT starts_with(message, 'PL/Proxy function ') THEN
        RAISE internal_error USING MESSAGE = raise_away.message;
    END IF;
    RAISE connection_failure USING MESSAGE = format(
        'shard p%s is away: %s', (SELECT p.shard FROM partitions() p WHERE p.partition = raise_away.partition), raise_away.message);
END;
$$;
REVOKE ALL ON FUNCTION raise_away(int, text, text) FROM PUBLIC;
COMMENT ON FUNCTION raise_away(int, text, text) IS 'Raises 08006 for a shard that is away, or XX000 if a function there has raised that.';

-- shard_call(partition, call, arguments, lock_timeout): calls a function on a shard, under this lock_timeout.
-- Returns  the function's answer; of one that returns rows, an array of them, or NULL if there are none
-- Raises   what PL/Proxy makes of what the function raises: the SQLSTATE is kept, the texts get prefixes;
--          internal_error (XX000) where the shard is away
-- Locks    what the function locks
CREATE OR REPLACE FUNCTION shard_call(partition int, call text, arguments jsonb, lock_timeout text)
RETURNS json LANGUAGE plproxy VOLATILE
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON partition;
    SELECT CASE call
        WHEN 'emergency_stop_job' THEN
            emergency_stop_job(a ->> 'id', a ->> 'reason', (a ->> 'force')::boolean, NULLIF(a -> 'caller', 'null'))
        WHEN 'emergency_stop_jobs' THEN
            (SELECT json_agg(j.summary ORDER BY j.number)
             FROM emergency_stop_jobs(ARRAY(SELECT jsonb_array_elements_text(a -> 'ids')), a ->> 'reason', NULLIF(a -> 'caller', 'null'),
                                      (a ->> 'force')::boolean, (a ->> 'patience')::interval) WITH ORDINALITY AS j (id, summary, number))
        WHEN 'emergency_stop_blockers' THEN (SELECT json_agg(b) FROM emergency_stop_blockers(a ->> 'id') b)
        WHEN 'emergency_stop_dry_run' THEN emergency_stop_dry_run(a ->> 'id')
        WHEN 'emergency_stop_status' THEN emergency_stop_status(a ->> 'id')
        WHEN 'release_job' THEN release_job(a ->> 'id', a ->> 'reason', a ->> 'status', NULLIF(a -> 'caller', 'null'))
        WHEN 'get_job' THEN get_job(a ->> 'id')
        WHEN 'runaway_jobs' THEN runaway_jobs((a ->> 'minutes')::int, (a ->> 'max_jobs')::int)
        WHEN 'emergency_stop_faults' THEN (SELECT json_agg(f) FROM emergency_stop_faults() f)
        WHEN 'timeout_stuck_jobs' THEN timeout_stuck_jobs((a ->> 'span')::interval, (a ->> 'max_jobs')::int)
        WHEN 'repair_stuck_jobs' THEN repair_stuck_jobs((a ->> 'span')::interval, (a ->> 'max_jobs')::int)
    END
    FROM (SELECT set_config('lock_timeout', lock_timeout, true), arguments::jsonb AS a OFFSET 0) AS s;
$$;
REVOKE ALL ON FUNCTION shard_call(int, text, jsonb, text) FROM PUBLIC;
COMMENT ON FUNCTION shard_call(int, text, jsonb, text) IS 'Calls a function on the shard that has this partition, under this lock_timeout.';

-- on_shard(partition, call, arguments): as shard_call, under the lock_timeout of this session; once more where a session of
-- the shard was lost.
-- Returns  the function's answer; of one that returns rows, an array of them, or NULL if there are none
-- Raises   what the function raises, a locked job's DETAIL included; connection_failure (08006) where the shard is away
-- Locks    what the function locks
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
                RAISE lock_not_available USING
                    MESSAGE = SQLERRM,
                    DETAIL = CASE WHEN starts_with(v_detail, 'Remote detail: ') THEN substr(v_detail, 16) ELSE v_detail END,
                    HINT = CASE WHEN starts_with(v_hint, 'Remote hint: ') THEN substr(v_hint, 14) ELSE v_hint END;
            WHEN internal_error OR admin_shutdown OR crash_shutdown OR cannot_connect_now THEN
                -- The next call makes a new session there. All calls can be repeated.
                IF v_try = 2 THEN
                    PERFORM raise_away(partition, SQLSTATE, SQLERRM);
                END IF;
        END;
    END LOOP;
    RETURN v_answer;
END;
$$;
REVOKE ALL ON FUNCTION on_shard(int, text, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION on_shard(int, text, jsonb) IS
    'Calls a function on the shard that has this partition, under the lock_timeout of this session; raises 08006 where the shard is away.';

-- partition_of(id): the partition of a job.
-- Returns  its number
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION partition_of(id text)
RETURNS int LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT hashtext(COALESCE(partition_of.id, '')) & (count(*)::int - 1) FROM partitions();
$$;
REVOKE ALL ON FUNCTION partition_of(text) FROM PUBLIC;
COMMENT ON FUNCTION partition_of(text) IS 'The partition of this job.';

-- One job: on its shard. What each function returns, raises and locks, its file in sql/ says.

CREATE OR REPLACE FUNCTION emergency_stop_job(
    id text, reason text DEFAULT NULL, force boolean DEFAULT false, caller jsonb DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN on_shard(partition_of(id), 'emergency_stop_job',
                    jsonb_build_object('id', id, 'reason', reason, 'force', force, 'caller', caller));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) IS
    'emergency_stop_job on the job''s shard, under the lock_timeout of this session.';

CREATE OR REPLACE FUNCTION emergency_stop_blockers(id text)
RETURNS TABLE (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
        SELECT b.*
        FROM json_to_recordset(on_shard(partition_of(id), 'emergency_stop_blockers', jsonb_build_object('id', id)))
            AS b (pid int, application_name text, database_user text, state text, transaction_seconds numeric, query text);
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_blockers(text) IS 'emergency_stop_blockers on the job''s shard; pid means a session there.';

CREATE OR REPLACE FUNCTION emergency_stop_dry_run(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN on_shard(partition_of(id), 'emergency_stop_dry_run', jsonb_build_object('id', id));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_dry_run(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_dry_run(text) IS 'emergency_stop_dry_run on the job''s shard, under the lock_timeout of this session.';

CREATE OR REPLACE FUNCTION emergency_stop_status(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN on_shard(partition_of(id), 'emergency_stop_status', jsonb_build_object('id', id));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_status(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_status(text) IS 'emergency_stop_status on the job''s shard.';

CREATE OR REPLACE FUNCTION release_job(id text, reason text, status text, caller jsonb DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN on_shard(partition_of(id), 'release_job',
                    jsonb_build_object('id', id, 'reason', reason, 'status', status, 'caller', caller));
END;
$$;
REVOKE ALL ON FUNCTION release_job(text, text, text, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION release_job(text, text, text, jsonb) IS 'release_job on the job''s shard, under the lock_timeout of this session.';

CREATE OR REPLACE FUNCTION get_job(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN on_shard(partition_of(id), 'get_job', jsonb_build_object('id', id));
END;
$$;
REVOKE ALL ON FUNCTION get_job(text) FROM PUBLIC;
COMMENT ON FUNCTION get_job(text) IS 'get_job on the job''s shard.';

CREATE OR REPLACE FUNCTION shard_list_executions(
    partition int, job_id text, status text, after text, max_rows bigint, max_bytes bigint)
RETURNS TABLE (id text, execution json)
LANGUAGE plproxy VOLATILE
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON partition;
    SELECT id, execution FROM list_executions(job_id, status, after, max_rows, max_bytes);
$$;
REVOKE ALL ON FUNCTION shard_list_executions(int, text, text, text, bigint, bigint) FROM PUBLIC;
COMMENT ON FUNCTION shard_list_executions(int, text, text, text, bigint, bigint) IS 'list_executions on the shard that has this partition.';

CREATE OR REPLACE FUNCTION list_executions(
    job_id text, status text DEFAULT NULL, after text DEFAULT NULL, max_rows bigint DEFAULT NULL, max_bytes bigint DEFAULT NULL)
RETURNS TABLE (id text, execution json)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    FOR v_try IN 1 .. 2 LOOP
        BEGIN
            RETURN QUERY
                SELECT e.id, e.execution
                FROM shard_list_executions(partition_of(job_id), job_id, status, after, max_rows, max_bytes) e;
            RETURN;
        EXCEPTION WHEN internal_error OR admin_shutdown OR crash_shutdown OR cannot_connect_now THEN
            IF v_try = 2 THEN
                PERFORM raise_away(partition_of(job_id), SQLSTATE, SQLERRM);
            END IF;
        END;
    END LOOP;
END;
$$;
REVOKE ALL ON FUNCTION list_executions(text, text, text, bigint, bigint) FROM PUBLIC;
COMMENT ON FUNCTION list_executions(text, text, text, bigint, bigint) IS 'list_executions on the job''s shard.';

-- All jobs, or several: on one shard after the other.

-- emergency_stop_jobs(...): each shard stops its jobs in one transaction.
-- Returns  as on a shard, in the order given
-- Raises   as on a shard; connection_failure (08006) for a shard that is away, only after the others: their jobs are stopped
CREATE OR REPLACE FUNCTION emergency_stop_jobs(
    ids text[], reason text DEFAULT NULL, caller jsonb DEFAULT NULL, force boolean DEFAULT false, patience interval DEFAULT '5 ms')
RETURNS TABLE (id text, summary json) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_part      record;
    v_answers   json;
    v_summaries json[] := '{}'::json[];
    v_away      text;
BEGIN
    FOR v_part IN
        SELECT p.shard, array_agg(j.number ORDER BY j.number) AS numbers,
               jsonb_build_object(
                   'ids', jsonb_agg(j.id ORDER BY j.number), 'reason', reason, 'force', force, 'patience', patience,
                   'caller', CASE jsonb_typeof(caller)
                                 WHEN 'array' THEN jsonb_agg(COALESCE(caller -> (j.number - 1)::int, '{}') ORDER BY j.number)
                                 ELSE caller
                             END) AS arguments
        FROM unnest(ids) WITH ORDINALITY AS j (id, number)
        JOIN partitions() p ON p.partition = partition_of(j.id)
        GROUP BY p.shard
        ORDER BY p.shard
    LOOP
        BEGIN
            v_answers := on_shard(v_part.shard, 'emergency_stop_jobs', v_part.arguments);
        EXCEPTION WHEN connection_failure THEN
            v_away := COALESCE(v_away, SQLERRM);
            CONTINUE;
        END;
        FOR v_place IN 1 .. cardinality(v_part.numbers) LOOP
            v_summaries[v_part.numbers[v_place]] := v_answers -> v_place - 1;
        END LOOP;
    END LOOP;
    IF v_away IS NOT NULL THEN
        RAISE connection_failure USING MESSAGE = v_away, HINT = 'The jobs on the other shards are stopped. Try again.';
    END IF;
    RETURN QUERY SELECT j.id, j.summary FROM unnest(ids, v_summaries) AS j (id, summary);
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_jobs(text[], text, jsonb, boolean, interval) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_jobs(text[], text, jsonb, boolean, interval) IS
    'emergency_stop_jobs on all shards concerned, in one transaction on each. Raises 08006 for a shard that is away, after the others.';

-- runaway_jobs(minutes, max_jobs): those of all shards. "truncated" is true also where a shard is away, with a WARNING.
-- Raises   as on a shard; connection_failure (08006) where all shards are away
CREATE OR REPLACE FUNCTION runaway_jobs(minutes int DEFAULT 5, max_jobs int DEFAULT 20)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_shard   int;
    v_answers json[] := '{}'::json[];
    v_away    text;
BEGIN
    FOR v_shard IN SELECT DISTINCT p.shard FROM partitions() p ORDER BY 1 LOOP
        BEGIN
            v_answers := v_answers || on_shard(v_shard, 'runaway_jobs', jsonb_build_object('minutes', minutes, 'max_jobs', max_jobs));
        EXCEPTION WHEN connection_failure THEN
            v_away := SQLERRM;
            RAISE WARNING USING MESSAGE = v_away;
        END;
    END LOOP;
    IF cardinality(v_answers) = 0 THEN
        RAISE connection_failure USING MESSAGE = v_away;
    END IF;
    RETURN (
        WITH listed AS (
            SELECT j.job, row_number() OVER (ORDER BY (j.job ->> 'started')::bigint DESC, (j.job ->> 'active')::bigint DESC,
                                                      j.job ->> 'job_id') AS place
            FROM unnest(v_answers) AS a (answer), json_array_elements(a.answer -> 'jobs') AS j (job)
        )
        SELECT json_build_object(
            'minutes', minutes,
            'jobs', COALESCE(json_agg(l.job ORDER BY l.place) FILTER (WHERE l.place <= max_jobs), '[]'),
            'truncated', v_away IS NOT NULL OR count(*) > max_jobs
                         OR (SELECT bool_or((a.answer ->> 'truncated')::boolean) FROM unnest(v_answers) AS a (answer)))
        FROM listed l);
END;
$$;
REVOKE ALL ON FUNCTION runaway_jobs(int, int) FROM PUBLIC;
COMMENT ON FUNCTION runaway_jobs(int, int) IS 'runaway_jobs on all shards, their answers merged; truncated, with a warning, where a shard is away.';

-- emergency_stop_faults(): those of the front and of all shards, which are named. A shard that is away is a fault, too.
CREATE OR REPLACE FUNCTION emergency_stop_faults()
RETURNS SETOF text LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_caller CONSTANT name := COALESCE(NULLIF(current_setting('role'), 'none'), session_user)::name;
    v_called CONSTANT name[] := '{emergency_stop_job,emergency_stop_jobs,emergency_stop_dry_run,emergency_stop_status,release_job,
                                  runaway_jobs,get_job,list_executions,timeout_stuck_jobs,repair_stuck_jobs}'::name[];
    v_shard  int;
BEGIN
    RETURN QUERY
        SELECT format('role %I may not execute function %s on the front', v_caller, p.oid::regprocedure)
        FROM pg_proc p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.proname = ANY (v_called)
          AND NOT has_function_privilege(v_caller, p.oid, 'EXECUTE')
        ORDER BY 1;
    FOR v_shard IN SELECT DISTINCT p.shard FROM partitions() p ORDER BY 1 LOOP
        BEGIN
            RETURN QUERY
                SELECT CASE WHEN starts_with(f.fault, 'warning: ') THEN format('warning: shard p%s: %s', v_shard, substr(f.fault, 10))
                            ELSE format('shard p%s: %s', v_shard, f.fault)
                       END
                FROM json_array_elements_text(on_shard(v_shard, 'emergency_stop_faults', '{}')) AS f (fault);
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
REVOKE ALL ON FUNCTION emergency_stop_faults() FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_faults() IS 'emergency_stop_faults of all shards, which are named, and of the front itself.';

-- batch_on_all_shards(call, span, max_jobs): runs a batch on each shard, one after the other, for an equal share of what is
-- left of max_jobs; together they change max_jobs at most.
-- Returns  each shard's answer
-- Raises   what a shard raises; for one that is away only after the others; what was done there stays done, and is in
--          their batch_changes
-- Locks    what the batch locks
CREATE OR REPLACE FUNCTION batch_on_all_shards(call text, span interval, max_jobs int)
RETURNS json[] LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_left    int := max_jobs;
    v_share   int;
    v_shard   record;
    v_answer  json;
    v_answers json[] := '{}'::json[];
    v_away    text;
BEGIN
    FOR v_shard IN
        SELECT s.shard, count(*) OVER () - row_number() OVER (ORDER BY s.shard) + 1 AS shards_left
        FROM (SELECT DISTINCT p.shard FROM partitions() p) s
        ORDER BY s.shard
    LOOP
        -- A number out of range goes to the shard as it is, to be refused there.
        v_share := CASE WHEN max_jobs BETWEEN 0 AND 1000 THEN ceil(v_left::numeric / v_shard.shards_left) ELSE max_jobs END::int;
        BEGIN
            v_answer := on_shard(v_shard.shard, call, jsonb_build_object('span', span, 'max_jobs', v_share));
            v_left := v_left - COALESCE(v_answer ->> 'timed_out_count', v_answer ->> 'republished_count')::int;
            v_answers := v_answers || v_answer;
        EXCEPTION WHEN connection_failure THEN
            v_away := COALESCE(v_away, SQLERRM);
        END;
    END LOOP;
    IF v_away IS NOT NULL THEN
        RAISE connection_failure USING MESSAGE = v_away, HINT = 'The batch has run on the other shards.';
    END IF;
    RETURN v_answers;
END;
$$;
REVOKE ALL ON FUNCTION batch_on_all_shards(text, interval, int) FROM PUBLIC;
COMMENT ON FUNCTION batch_on_all_shards(text, interval, int) IS 'The answers of a batch on each shard, which together change max_jobs at most.';

CREATE OR REPLACE FUNCTION timeout_stuck_jobs(threshold interval DEFAULT '15 minutes', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answers CONSTANT json[] := batch_on_all_shards('timeout_stuck_jobs', threshold, max_jobs);
BEGIN
    RETURN json_build_object(
        'ok', true, 'message', v_answers[1] -> 'message',
        'timed_out_count', (SELECT sum((a ->> 'timed_out_count')::int) FROM unnest(v_answers) a),
        'timeout_threshold_minutes', v_answers[1] -> 'timeout_threshold_minutes',
        'timed_out_jobs', array_to_json(ARRAY(SELECT json_array_elements(a -> 'timed_out_jobs') FROM unnest(v_answers) a)),
        'more', (SELECT bool_or((a ->> 'more')::boolean) FROM unnest(v_answers) a));
END;
$$;
REVOKE ALL ON FUNCTION timeout_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION timeout_stuck_jobs(interval, int) IS 'timeout_stuck_jobs on all shards, their answers merged. All or nothing on each shard.';

CREATE OR REPLACE FUNCTION repair_stuck_jobs(max_age interval DEFAULT '24 hours', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answers CONSTANT json[] := batch_on_all_shards('repair_stuck_jobs', max_age, max_jobs);
BEGIN
    RETURN json_build_object(
        'ok', true, 'message', v_answers[1] -> 'message',
        'republished_count', (SELECT sum((a ->> 'republished_count')::int) FROM unnest(v_answers) a),
        'republished_jobs', array_to_json(ARRAY(SELECT json_array_elements(a -> 'republished_jobs') FROM unnest(v_answers) a)),
        'skipped', (SELECT json_build_object('emergency_stopped', sum((a #>> '{skipped,emergency_stopped}')::int),
                                             'attempts_exhausted', sum((a #>> '{skipped,attempts_exhausted}')::int),
                                             'active', sum((a #>> '{skipped,active}')::int))
                    FROM unnest(v_answers) a),
        'more', (SELECT bool_or((a ->> 'more')::boolean) FROM unnest(v_answers) a));
END;
$$;
REVOKE ALL ON FUNCTION repair_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION repair_stuck_jobs(interval, int) IS 'repair_stuck_jobs on all shards, their answers merged. All or nothing on each shard.';

COMMIT;
