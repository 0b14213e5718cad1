-- The router: turns a front database into one over any number of shards, each of them a database with the files of sql/.
--
-- It is not loaded with those: a front database gets this file alone and has no tables. Its functions have the names,
-- arguments and answers of the shards', so that the service runs on it unchanged. PL/Proxy sends a call to the shard
-- on which the job lives; a batch is run on one shard after the other.
--
-- Needs    the extension plproxy, and a server named beacon_stop, whose options p0, p1, ... name the shards' databases:
--          as many as a power of two, several of which may name the same one. A job is in partition
--          hashtext(id) & (number of partitions - 1).
-- Raises   what the shards raise, with their SQLSTATEs; internal_error (XX000) where a shard is away
-- Locks    on the shards, what their functions lock. A call is a transaction of its own there, committed when it
--          returns, whatever becomes of the one that it was made in here.

DO $$
BEGIN
    PERFORM pg_advisory_lock(hashtext('beacon-stop install'));
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), false);
    IF to_regclass('jobs') IS NOT NULL THEN
        RAISE duplicate_table
            USING MESSAGE = 'this database has jobs of its own: expected a front database without any';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_foreign_server s WHERE s.srvname = 'beacon_stop') THEN
        RAISE undefined_object
            USING MESSAGE = 'server beacon_stop is missing: expected one of the wrapper plproxy with the options p0, p1, ...';
    END IF;
END;
$$;

-- One job: on its shard.

CREATE OR REPLACE FUNCTION shard_emergency_stop_job(id text, reason text, lock_timeout text)
RETURNS json LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON hashtext(COALESCE(id, ''));
    SELECT emergency_stop_job(id, reason) FROM (SELECT set_config('lock_timeout', lock_timeout, true) OFFSET 0) AS s;
$$;
REVOKE ALL ON FUNCTION shard_emergency_stop_job(text, text, text) FROM PUBLIC;
COMMENT ON FUNCTION shard_emergency_stop_job(text, text, text) IS 'emergency_stop_job on the job''s shard, under this lock_timeout.';

CREATE OR REPLACE FUNCTION emergency_stop_job(id text, reason text DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN shard_emergency_stop_job(id, reason, current_setting('lock_timeout'));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_job(text, text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_job(text, text) IS 'emergency_stop_job on the job''s shard, under the lock_timeout of this session.';

CREATE OR REPLACE FUNCTION emergency_stop_blockers(id text)
RETURNS TABLE (pid int, application_name text, state text, transaction_seconds numeric)
LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON hashtext(COALESCE(id, ''));
$$;
REVOKE ALL ON FUNCTION emergency_stop_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_blockers(text) IS 'emergency_stop_blockers on the job''s shard; pid means a session there.';

CREATE OR REPLACE FUNCTION emergency_stop_end_blockers(id text)
RETURNS json LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON hashtext(COALESCE(id, ''));
$$;
REVOKE ALL ON FUNCTION emergency_stop_end_blockers(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_end_blockers(text) IS 'emergency_stop_end_blockers on the job''s shard.';

CREATE OR REPLACE FUNCTION get_job(id text)
RETURNS json LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON hashtext(COALESCE(id, ''));
$$;
REVOKE ALL ON FUNCTION get_job(text) FROM PUBLIC;
COMMENT ON FUNCTION get_job(text) IS 'get_job on the job''s shard.';

CREATE OR REPLACE FUNCTION list_executions(
    job_id text, status text DEFAULT NULL, after bigint DEFAULT NULL, max_rows bigint DEFAULT NULL, max_bytes bigint DEFAULT NULL)
RETURNS TABLE (id bigint, execution json)
LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON hashtext(COALESCE(job_id, ''));
$$;
REVOKE ALL ON FUNCTION list_executions(text, text, bigint, bigint, bigint) FROM PUBLIC;
COMMENT ON FUNCTION list_executions(text, text, bigint, bigint, bigint) IS 'list_executions on the job''s shard.';

-- Batches: on all shards.

CREATE OR REPLACE FUNCTION shard_timeout_stuck_jobs(partition int, threshold interval, max_jobs int)
RETURNS json LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON partition;
    SELECT timeout_stuck_jobs(threshold, max_jobs);
$$;
REVOKE ALL ON FUNCTION shard_timeout_stuck_jobs(int, interval, int) FROM PUBLIC;
COMMENT ON FUNCTION shard_timeout_stuck_jobs(int, interval, int) IS 'timeout_stuck_jobs on the shard that has this partition.';

CREATE OR REPLACE FUNCTION shard_repair_stuck_jobs(partition int, max_age interval, max_jobs int)
RETURNS json LANGUAGE plproxy VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    CLUSTER 'beacon_stop';
    RUN ON partition;
    SELECT repair_stuck_jobs(max_age, max_jobs);
$$;
REVOKE ALL ON FUNCTION shard_repair_stuck_jobs(int, interval, int) FROM PUBLIC;
COMMENT ON FUNCTION shard_repair_stuck_jobs(int, interval, int) IS 'repair_stuck_jobs on the shard that has this partition.';

-- batch_on_all_shards(operation, span, max_jobs): runs a batch on each shard, one after the other, for an equal share of
-- what is left of max_jobs; together they change max_jobs at most.
-- Returns  each shard's answer
-- Raises   what a shard raises; for one that is away only after the others; what was done there stays done, and is in
--          their batch_changes
CREATE OR REPLACE FUNCTION batch_on_all_shards(operation text, span interval, max_jobs int)
RETURNS SETOF json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_left   int := max_jobs;
    v_share  int;
    v_shard  record;
    v_answer json;
    v_away   text;
BEGIN
    FOR v_shard IN
        SELECT min(p.number) AS partition, count(*) OVER () - row_number() OVER (ORDER BY min(p.number)) + 1 AS shards_left
        FROM (SELECT substr(o.option_name, 2)::int AS number, o.option_value AS shard
              FROM pg_foreign_server s, pg_options_to_table(s.srvoptions) o
              WHERE s.srvname = 'beacon_stop' AND o.option_name ~ '^p[0-9]+$') p
        GROUP BY p.shard
        ORDER BY 1
    LOOP
        -- A number out of range goes to the shard as it is, to be refused there.
        v_share := CASE WHEN max_jobs BETWEEN 0 AND 1000 THEN ceil(v_left::numeric / v_shard.shards_left) ELSE max_jobs END::int;
        BEGIN
            IF operation = 'timeout_stuck_jobs' THEN
                v_answer := shard_timeout_stuck_jobs(v_shard.partition, span, v_share);
                v_left := v_left - (v_answer ->> 'timed_out_count')::int;
            ELSE
                v_answer := shard_repair_stuck_jobs(v_shard.partition, span, v_share);
                v_left := v_left - (v_answer ->> 'republished_count')::int;
            END IF;
            RETURN NEXT v_answer;
        EXCEPTION WHEN internal_error THEN
            v_away := COALESCE(v_away, SQLERRM);
        END;
    END LOOP;
    IF v_away IS NOT NULL THEN
        RAISE internal_error USING MESSAGE = v_away;
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION batch_on_all_shards(text, interval, int) FROM PUBLIC;
COMMENT ON FUNCTION batch_on_all_shards(text, interval, int) IS 'The answers of a batch on each shard, which together change max_jobs at most.';

CREATE OR REPLACE FUNCTION timeout_stuck_jobs(threshold interval DEFAULT '15 minutes', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_answers CONSTANT json[] := ARRAY(SELECT batch_on_all_shards('timeout_stuck_jobs', threshold, max_jobs));
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
    v_answers CONSTANT json[] := ARRAY(SELECT batch_on_all_shards('repair_stuck_jobs', max_age, max_jobs));
BEGIN
    RETURN json_build_object(
        'ok', true, 'message', v_answers[1] -> 'message',
        'republished_count', (SELECT sum((a ->> 'republished_count')::int) FROM unnest(v_answers) a),
        'republished_jobs', array_to_json(ARRAY(SELECT json_array_elements(a -> 'republished_jobs') FROM unnest(v_answers) a)),
        'skipped', (SELECT json_build_object('emergency_stopped', sum((a #>> '{skipped,emergency_stopped}')::int),
                                             'attempts_exhausted', sum((a #>> '{skipped,attempts_exhausted}')::int))
                    FROM unnest(v_answers) a),
        'more', (SELECT bool_or((a ->> 'more')::boolean) FROM unnest(v_answers) a));
END;
$$;
REVOKE ALL ON FUNCTION repair_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION repair_stuck_jobs(interval, int) IS 'repair_stuck_jobs on all shards, their answers merged. All or nothing on each shard.';

DO $$
BEGIN
    PERFORM pg_advisory_unlock(hashtext('beacon-stop install'));
END;
$$;
