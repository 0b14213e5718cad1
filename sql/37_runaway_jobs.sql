-- runaway_jobs(minutes, max_jobs): which jobs have started the most executions within the last minutes (1 to 1,440),
-- and which have the most active ones. At most max_jobs (1 to 100) of them: most started first, then most active.
-- Returns  {"minutes": 5, "jobs": [{"job_id": "a", "status": "processing", "started": 421, "per_minute": 84.2,
--           "active": 42, "oldest_active_at": "2025-09-29T23:48:00Z"}], "truncated": false}
--          "started" counts executions by their created_at. "truncated" tells that this is not all: there are more
--          jobs, or the numbers are too low, because not all executions were looked at, or some have no created_at.
-- Raises   invalid_parameter_value (22023)  minutes or max_jobs is out of range
-- Locks    nothing; it also works on a standby
--
-- The size of the tables has no part in the cost. It looks at the last 100,000 executions, as an index on created_at
-- gives them, or else an index on ascending ids; and at 100,000 that have not ended. It looks at fewer where a few are
-- enough, or where reading them is slow. Where neither index exists (ids of type uuid or text do not ascend), it only
-- knows those that have not ended.

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
    v_now   CONSTANT timestamptz := clock_timestamp();
    v_since CONSTANT executions.created_at%TYPE := v_now - make_interval(mins => minutes);
    v_order CONSTANT text := COALESCE((  -- by which index the latest executions are found
        SELECT min(a.attname::text)
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_am m ON m.oid = c.relam
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = 'executions'::regclass AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree'
          AND (a.attname = 'created_at' OR a.attname = 'id' AND a.atttypid::regtype IN ('bigint', 'int', 'smallint'))),
        'none');
    v_rows  int := 1000;
    v_began timestamptz;
    v_found record;
    v_times numeric;
BEGIN
    IF (minutes BETWEEN 1 AND 1440) IS NOT TRUE THEN
        RAISE invalid_parameter_value USING MESSAGE = format('minutes is %L: expected 1 to 1440', minutes);
    ELSIF (max_jobs BETWEEN 1 AND 100) IS NOT TRUE THEN
        RAISE invalid_parameter_value USING MESSAGE = format('max_jobs is %L: expected 1 to 100', max_jobs);
    END IF;
    LOOP
        v_began := clock_timestamp();
        WITH counted AS (
            SELECT r.job_id, count(*) FILTER (WHERE r.is_new) AS started, bool_or(r.is_new IS NULL) AS is_unknown,
                   count(r.is_active) AS unfinished,
                   count(*) FILTER (WHERE r.is_active) AS active, min(r.created_at) FILTER (WHERE r.is_active) AS oldest
            FROM (SELECT l.job_id, l.created_at, l.created_at >= v_since AS is_new, NULL::boolean AS is_active
                  FROM (SELECT * FROM executions e WHERE v_order = 'id' ORDER BY e.id DESC LIMIT v_rows) l
                  WHERE (l.created_at >= v_since) IS NOT FALSE
                  UNION ALL
                  (SELECT e.job_id, e.created_at, true, NULL
                   FROM executions e WHERE v_order = 'created_at' AND e.created_at >= v_since
                   ORDER BY e.created_at DESC LIMIT v_rows)
                  UNION ALL
                  (SELECT e.job_id, e.created_at, v_order = 'none' AND e.created_at >= v_since,
                          e.status IN ('pending', 'running', 'processing')
                   FROM executions e WHERE e.status NOT IN ('completed', 'failed', 'cancelled')
                   ORDER BY e.job_id, e.status LIMIT v_rows)) r
            GROUP BY r.job_id
        ), total AS (
            SELECT COALESCE(sum(c.started), 0) AS started, COALESCE(sum(c.unfinished) = v_rows, false) AS is_cut,
                   COALESCE(bool_or(c.is_unknown), false) AS is_unknown,
                   count(*) FILTER (WHERE c.started > 0 OR c.active > 0) AS jobs
            FROM counted c
        ), listed AS (
            -- Where more have not ended than were looked at, the active ones of each job listed are counted anew.
            SELECT c.job_id, c.started, greatest(c.active, a.active) AS active, least(c.oldest, a.oldest) AS oldest
            FROM (SELECT * FROM counted WHERE started > 0 OR active > 0
                  ORDER BY started DESC, active DESC, job_id LIMIT runaway_jobs.max_jobs) c
            CROSS JOIN LATERAL (
                SELECT count(*) AS active, min(n.created_at) AS oldest
                FROM (SELECT e.created_at FROM executions e, total t
                      WHERE t.is_cut AND e.job_id = c.job_id AND e.status IN ('pending', 'running', 'processing')
                      LIMIT greatest(100, v_rows / runaway_jobs.max_jobs)) n) a
        )
        SELECT t.started, t.is_cut, t.is_unknown, t.jobs > runaway_jobs.max_jobs AS has_more, (
            SELECT json_agg(json_build_object(
                'job_id', l.job_id::text, 'status', j.status, 'started', l.started,
                'per_minute', trim_scale(round(l.started / runaway_jobs.minutes::numeric, 1)), 'active', l.active,
                'oldest_active_at', utc_seconds(l.oldest)) ORDER BY l.started DESC, l.active DESC, l.job_id)
            FROM listed l LEFT JOIN jobs j ON j.id = l.job_id) AS jobs
        INTO v_found
        FROM total t;
        -- If fewer than half of the latest are new, then all new ones are among them. Else it looks at more, as many as
        -- can be read until 300 ms are over.
        EXIT WHEN v_found.started < v_rows / 2 AND NOT v_found.is_cut OR v_rows = 100000;
        v_times := extract(epoch FROM v_now + '300 ms' - clock_timestamp())
                   / extract(epoch FROM clock_timestamp() - v_began);
        EXIT WHEN v_times < 2;
        v_rows := least(v_rows * least(v_times, 10), 100000)::int;
    END LOOP;
    -- A transaction that took long has added rows that look old: a tenth of the latest may be such.
    RETURN json_build_object(
        'minutes', minutes, 'jobs', COALESCE(v_found.jobs, '[]'),
        'truncated', v_order = 'none' OR v_found.has_more OR v_found.is_cut OR v_found.is_unknown
                     OR v_found.started >= v_rows * 0.9);
END;
$$;
REVOKE ALL ON FUNCTION runaway_jobs(int, int) FROM PUBLIC;
COMMENT ON FUNCTION runaway_jobs(int, int) IS
    'The jobs that started the most executions within the last minutes, and those with the most active ones, as JSON; '
    'the size of the tables has no part in the cost. Raises 22023 for arguments out of range. Locks nothing.';
