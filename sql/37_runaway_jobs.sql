-- runaway_jobs(minutes, max_jobs): which jobs have started the most executions within the last minutes (1 to 1,440), and which
-- have the most active ones. At most max_jobs (1 to 100) of them: most started first, then most active.
-- Returns  {"minutes": 5, "jobs": [{"job_id": "a", "status": "processing", "started": 421, "per_minute": 84.2, "active": 42,
--           "oldest_active_at": "2025-09-29T23:48:00Z"}], "truncated": false}
--          "started" counts executions by their created_at. "truncated" tells that this is not all: there are more jobs, or
--          the numbers are too low, because not all executions were looked at.
-- Raises   invalid_parameter_value (22023)  minutes or max_jobs is out of range
-- Locks    nothing; it also works on a standby
--
-- The size of the tables has no part in the cost. It looks at the last 100,000 executions, as an index on created_at gives
-- them, or else an index on ascending ids; and at 100,000 that have not ended. It looks at fewer where a few are enough, or
-- where reading them is slow. Where neither index exists (ids of type uuid or text do not ascend), it only knows those that
-- have not ended.

-- execution_order(): by which index the latest executions can be found, whatever the size of the table.
-- Returns  'created_at'; else 'id', if the ids ascend; else 'none'
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION execution_order()
RETURNS text LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT COALESCE(min(a.attname::text), 'none')
    FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid
    JOIN pg_am m ON m.oid = c.relam AND m.amname = 'btree'
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = 'executions'::regclass AND i.indisvalid AND i.indpred IS NULL
      AND (a.attname = 'created_at' OR a.attname = 'id' AND a.atttypid IN ('bigint'::regtype, 'int'::regtype, 'smallint'::regtype));
$$;
REVOKE ALL ON FUNCTION execution_order() FROM PUBLIC;
COMMENT ON FUNCTION execution_order() IS 'The column by whose index the latest executions are found: created_at, id or none.';

-- executions_to_read(ordered_by, since): how many of the latest executions, and of those that have not ended, are to be read.
-- Returns  1,000, 10,000 or 100,000
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION executions_to_read(ordered_by text, since timestamptz)
RETURNS int LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_rows   int;
    v_began  timestamptz;
    v_enough boolean;
BEGIN
    FOREACH v_rows IN ARRAY '{1000,10000}'::int[] LOOP
        v_began := clock_timestamp();
        -- If fewer than half of them are new, then all new ones are among them.
        SELECT count(*) FILTER (WHERE l.created_at >= since) < v_rows / 2 INTO v_enough
        FROM ((SELECT e.created_at FROM executions e WHERE ordered_by = 'id' ORDER BY e.id DESC LIMIT v_rows)
              UNION ALL
              (SELECT e.created_at FROM executions e WHERE ordered_by = 'created_at' AND e.created_at >= since
               ORDER BY e.created_at DESC LIMIT v_rows)) l;
        SELECT v_enough AND count(*) < v_rows INTO v_enough
        FROM (SELECT e.created_at FROM executions e
              WHERE e.status NOT IN ('completed', 'failed', 'cancelled')
              ORDER BY e.job_id, e.status LIMIT v_rows) u;
        -- Ten times as many take ten times as long.
        IF v_enough OR clock_timestamp() - v_began > (CASE v_rows WHEN 1000 THEN '50 ms' ELSE '20 ms' END)::interval THEN
            RETURN v_rows;
        END IF;
    END LOOP;
    RETURN 100000;
END;
$$;
REVOKE ALL ON FUNCTION executions_to_read(text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION executions_to_read(text, timestamptz) IS 'How many of the latest executions runaway_jobs has to read.';

-- The settings leave the planner no plan that reads a whole table or a whole index, whatever the statistics say,
-- and keep it from compiling the plan, which would take longer than to run it.
CREATE OR REPLACE FUNCTION runaway_jobs(minutes int DEFAULT 5, max_jobs int DEFAULT 20)
RETURNS json LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT
SET row_security = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_incremental_sort = off
SET jit = off
AS $$
DECLARE
    v_since executions.created_at%TYPE;
    v_order text;
    v_rows  int;
    v_jobs  json;
    v_more  boolean;
BEGIN
    IF (minutes BETWEEN 1 AND 1440) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('minutes is %s: expected 1 to 1440', COALESCE(minutes::text, 'null'));
    END IF;
    IF (max_jobs BETWEEN 1 AND 100) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_jobs is %s: expected 1 to 100', COALESCE(max_jobs::text, 'null'));
    END IF;
    v_since := clock_timestamp() - make_interval(mins => minutes);
    v_order := execution_order();
    v_rows := executions_to_read(v_order, v_since);

    WITH unfinished AS MATERIALIZED (
        SELECT u.job_id, count(*) AS executions, count(*) FILTER (WHERE u.created_at >= v_since) AS started,
               count(*) FILTER (WHERE u.is_active) AS active, min(u.created_at) FILTER (WHERE u.is_active) AS oldest
        FROM (SELECT e.job_id, e.created_at, e.status IN ('pending', 'running', 'processing') AS is_active
              FROM executions e
              WHERE e.status NOT IN ('completed', 'failed', 'cancelled')
              ORDER BY e.job_id, e.status
              LIMIT v_rows) u
        GROUP BY u.job_id
    ), latest AS MATERIALIZED (
        SELECT l.job_id, count(*) AS started
        FROM ((SELECT e.job_id, e.created_at FROM executions e WHERE v_order = 'id' ORDER BY e.id DESC LIMIT v_rows)
              UNION ALL
              (SELECT e.job_id, e.created_at FROM executions e WHERE v_order = 'created_at' AND e.created_at >= v_since
               ORDER BY e.created_at DESC LIMIT v_rows)) l
        WHERE l.created_at >= v_since
        GROUP BY l.job_id
        UNION ALL
        SELECT u.job_id, u.started FROM unfinished u WHERE v_order = 'none'
    ), looked AS MATERIALIZED (
        SELECT (SELECT sum(u.executions) = v_rows FROM unfinished u) AS active_cut,
               -- A transaction that took long has added rows that look old: a tenth of them may be such.
               (SELECT sum(l.started) >= v_rows * 0.9 FROM latest l) AS latest_cut
    ), listed AS (
        SELECT job_id, COALESCE(l.started, 0) AS started, COALESCE(u.active, 0) AS active, u.oldest, count(*) OVER () AS jobs
        FROM latest l FULL JOIN unfinished u USING (job_id)
        WHERE l.started > 0 OR u.active > 0
        ORDER BY 2 DESC, 3 DESC, 1
        LIMIT max_jobs
    ), answer AS (
        -- Where there are more than were looked at, those of each job listed are counted anew, up to a tenth as many.
        SELECT l.job_id::text AS job_id, j.status, l.started, trim_scale(round(l.started / minutes::numeric, 1)) AS per_minute,
               greatest(l.active, c.active) AS active, utc_seconds(least(l.oldest, c.oldest)) AS oldest_active_at, l.jobs
        FROM listed l
        LEFT JOIN jobs j ON j.id = l.job_id
        CROSS JOIN LATERAL (
            SELECT count(*) AS active, min(a.created_at) AS oldest
            FROM (SELECT e.created_at FROM executions e, looked
                  WHERE looked.active_cut AND e.job_id = l.job_id AND e.status IN ('pending', 'running', 'processing')
                  LIMIT v_rows / 10) a) c
    )
    SELECT json_agg(json_build_object('job_id', a.job_id, 'status', a.status, 'started', a.started, 'per_minute', a.per_minute,
                                      'active', a.active, 'oldest_active_at', a.oldest_active_at)
                    ORDER BY a.started DESC, a.active DESC, a.job_id),
           v_order = 'none' OR COALESCE(max(a.jobs), 0) > max_jobs OR (SELECT COALESCE(l.active_cut OR l.latest_cut, false) FROM looked l)
    INTO v_jobs, v_more
    FROM answer a;
    RETURN json_build_object('minutes', minutes, 'jobs', COALESCE(v_jobs, '[]'), 'truncated', v_more);
END;
$$;
REVOKE ALL ON FUNCTION runaway_jobs(int, int) FROM PUBLIC;
COMMENT ON FUNCTION runaway_jobs(int, int) IS
    'The jobs that started the most executions within the last minutes, and those with the most active ones, as JSON; '
    'the size of the tables has no part in the cost. Raises 22023 for arguments out of range. Locks nothing.';
